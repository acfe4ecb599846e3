"""Files of other formats are told for what they are, whatever their name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import sqlite3
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from crane_core.errors import DataError
from crane_core.raw.importers.account import Account
from crane_core.raw.importers.foreign import check_text, check_unpacked, foreign_kind

TEXT = b"u,i,t\na,b,1\n"


def database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE log (u TEXT)")


def workbook() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return buffer.getvalue()


def matrix() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(2))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (workbook(), "Excel"),
        (bz2.compress(TEXT), "bzip2"),
        (lzma.compress(TEXT), "xz"),
        (pa.compress(TEXT, codec="zstd", asbytes=True), "zstd"),
        (b"\xff\xd8\xff\xe0 JFIF", "picture"),
        (b"\x89PNG\r\n\x1a\n", "picture"),
        (matrix(), "matrix"),
        (b"\xef\xbb\xbf\n<!DOCTYPE HTML><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b'<?xml version="1.0"?><Workbook/>', "XML"),
    ],
)
def test_a_file_of_another_format_is_refused_with_what_helps(tmp_path: Path, data: bytes, what: str) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.csv \({len(data)} bytes\) is .*{what}") as caught:
        check_text(tmp_path / "a.csv", Account("interactions").way)
    assert caught.value.remedy


def test_databases_and_tables_are_told(tmp_path: Path) -> None:
    database(tmp_path / "a.csv")
    pa.feather.write_feather(pa.table({"a": [1]}), str(tmp_path / "b.csv"))
    pq.write_table(pa.table({"a": [1]}), tmp_path / "c.csv")
    kinds = [foreign_kind(tmp_path / name) for name in ("a.csv", "b.csv", "c.csv")]
    assert [kind[0] if kind else None for kind in kinds] == ["an SQLite database", "an Arrow file", "a Parquet file"]
    np.savez(tmp_path / "d.npz", a=np.ones(2))
    assert (foreign_kind(tmp_path / "d.npz") or ("",))[0] == "an archive of arrays"
    with pytest.raises(DataError) as caught:
        check_text(tmp_path / "c.csv", Account("items").way)
    assert caught.value.remedy == "Set items.format: parquet."


@pytest.mark.parametrize("data", [TEXT, b"", b"PAR1,u\n", b"BZh,u\n", b"PAR1", b"\xef\xbb\xbfu", b"\xff\xfeu\0"])
def test_text_is_text(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    assert foreign_kind(tmp_path / "a.csv") is None or data == b"PAR1"


@pytest.mark.parametrize(
    ("inner", "what"), [(gzip.compress(TEXT), "gzip twice"), (workbook(), "Excel workbook, packed")]
)
def test_what_is_within_an_archive_is_told(tmp_path: Path, inner: bytes, what: str) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(inner))
    with pytest.raises(DataError, match=what) as caught:
        check_text(tmp_path / "a.csv.gz", Account("interactions").way)
    command = re.findall(r"gunzip .*? > \S+\b", caught.value.remedy)[0]
    subprocess.run(command, shell=True, check=True)
    assert [path.read_bytes() for path in tmp_path.glob("unpacked-a.csv*")] == [inner]


@pytest.mark.parametrize("name", ["f.npy", "f.parquet"])
def test_a_packed_matrix_or_table_is_unpacked_by_the_command_of_the_remedy(tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "f.npy", np.ones((2, 2)))
    pq.write_table(pa.table({"a": [1]}), tmp_path / "f.parquet")
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data))
    with pytest.raises(DataError, match="is packed with gzip, which only text files may be") as caught:
        check_unpacked(tmp_path / name)
    subprocess.run(caught.value.remedy.partition("place: ")[2].rstrip("."), shell=True, check=True)
    assert (tmp_path / f"unpacked-{name}").read_bytes() == data
