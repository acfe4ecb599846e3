"""A first line without the columns that are asked for is told for what it is, and its remedy works."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from crane_core.errors import DataError
from crane_core.raw.importers.account import Account
from crane_core.raw.importers.layout import Layout
from crane_core.raw.importers.rows import read_chunks


def read(path: Path, columns: list[Any], account: Account | None = None, **layout: Any) -> list[tuple[int, list[Any]]]:
    """Line and values of each row."""
    found = []
    for chunk in read_chunks(path, Layout(files=("*",), **layout), columns, account or Account("interactions")):
        values = list(chunk.columns.values())
        found += [(line, list(row)) for line, row in zip(chunk.lines, zip(*values, strict=True), strict=True)]
    return found


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("packed", [False, True])
def test_lines_before_the_header_are_removed_by_the_command_of_the_remedy(
    tmp_path: Path, packed: bool, encoding: str
) -> None:
    data = "# export, of a shop\n\n# today\na,b\n1,x\n".encode(encoding)
    path = tmp_path / ("my log.csv.gz" if packed else "my log.csv")
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(DataError, match="Line 4 has them") as caught:
        read(path, ["a", "b"])
    subprocess.run(caught.value.remedy.partition("file: ")[2].rstrip("."), shell=True, check=True)
    assert read(tmp_path / "clean-my log.csv", ["a", "b"]) == [(2, ["1", "x"])]


@pytest.mark.parametrize("separator", ["::", "||", ";", "|", "\t", "~"])
@pytest.mark.parametrize("header", [True, False])
def test_the_separator_of_the_remedy_works(tmp_path: Path, separator: str, header: bool) -> None:
    lines = [["a", "z", "b,c"], ["1", "2", "x, y"]][not header :]
    (tmp_path / "a.csv").write_text("".join(separator.join(line) + "\n" for line in lines))
    columns: list[str | int] = ["a", "b,c"] if header else [1, 3]
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.csv", columns, header=header)
    told = json.loads(re.findall(r"separator: (\".*?\")", caught.value.remedy)[0])
    assert [row for _, row in read(tmp_path / "a.csv", columns, header=header, separator=told)] == [["1", "x, y"]]


def test_a_separator_that_is_set_is_not_advised(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a, b\n1, x\n")
    with pytest.raises(DataError, match="has no column b") as caught:
        read(tmp_path / "a.csv", ["a", "b"])
    assert "separator" not in caught.value.remedy and "perhaps ' b' for 'b'" in caught.value.remedy


def test_a_header_below_with_another_separator_names_both(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("# export\na;b\n1;x\n")
    with pytest.raises(DataError, match="Line 2 has them") as caught:
        read(tmp_path / "a.csv", ["a", "b"])
    assert caught.value.remedy.endswith('clean-a.csv. Then set interactions.separator: ";".')


def test_a_value_that_is_the_name_of_a_column_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,c\n1,b\n")
    with pytest.raises(DataError, match="has no column b") as caught:
        read(tmp_path / "a.csv", ["a", "b"])
    assert "tail" not in caught.value.remedy


def test_a_header_that_quotes_join_with_the_lines_below_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"a,b\n1,x\n2,y"\n')
    with pytest.raises(DataError, match="Quotes join it with the lines below") as caught:
        read(tmp_path / "a.csv", ["a", "b"])
    assert caught.value.remedy.startswith("Close or remove the quote")
