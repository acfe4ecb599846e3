"""Files of several formats give the same rows, each with its line, and every line is counted."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from crane_core.errors import DataError
from crane_core.raw.importers import rows
from crane_core.raw.importers.account import Account
from crane_core.raw.importers.rows import Layout, file_format, read_chunks


def read(path: Path, columns: list[Any], account: Account | None = None, **layout: Any) -> list[tuple[int, list[Any]]]:
    """Line and values of each row."""
    found = []
    for chunk in read_chunks(path, Layout(files=("*",), **layout), columns, account or Account("interactions")):
        values = [each.to_pylist() if isinstance(each, pa.Array) else each for each in chunk.columns.values()]
        found += [(line, list(row)) for line, row in zip(chunk.lines, zip(*values, strict=True), strict=True)]
    return found


def test_formats_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sku,price,note\n007,1,x\n\nb,2,y\n")
    (tmp_path / "b.tsv").write_text("price\tsku\n1\t007\n2\tb\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"sku": "007", "price": "1"}\n\n{"sku": "b", "price": "2"}'))
    pq.write_table(pa.table({"sku": ["007", "b"], "price": ["1", "2"]}), tmp_path / "d.parquet")
    (tmp_path / "e.csv").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    lines = {"a.csv": [2, 4], "b.tsv": [2, 3], "c.jsonl.gz": [1, 3], "d.parquet": [1, 2], "e.csv": [2, 4]}
    for name, numbers in lines.items():
        found = read(tmp_path / name, ["sku", "price"])
        assert found == [(numbers[0], ["007", "1"]), (numbers[1], ["b", "2"])], name


def test_every_line_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b\n1,"x\ny"\n\n2\n3,z\n')
    account = Account("interactions")
    assert read(tmp_path / "a.csv", ["b"], account) == [(2, ["x\ny"]), (6, ["z"])]
    assert (account.lines, account.headers, account.blank, account.continued, account.rows) == (6, 1, 1, 1, 3)
    assert account.set_aside == {"wrong_fields": 1}
    assert account.examples["wrong_fields"] == [f"{tmp_path / 'a.csv'} line 5: '1 values, expected 2'"]
    account.written = 2
    account.max_set_aside = 0.5
    account.settle()


def test_chunks_keep_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_ROWS", 2)
    (tmp_path / "a.csv").write_text("a\n1\n2\n3\n4\n5\n")
    (tmp_path / "b.jsonl").write_text("".join(f'{{"a": {n}}}\n' for n in range(5)))
    pq.write_table(pa.table({"a": list(range(5))}), tmp_path / "c.parquet", row_group_size=3)
    assert [line for line, _ in read(tmp_path / "a.csv", ["a"])] == [2, 3, 4, 5, 6]
    assert [line for line, _ in read(tmp_path / "b.jsonl", ["a"])] == [1, 2, 3, 4, 5]
    assert read(tmp_path / "c.parquet", [1]) == [(n + 1, [n]) for n in range(5)]


@pytest.mark.parametrize(
    ("text", "layout", "expected"),
    [
        ("'a,b',c\n", {"quote": "'"}, ["a,b", "c"]),
        (r'"a\"b",c' + "\n", {"escape": "\\"}, ['a"b', "c"]),
        ("a::b\n", {"separator": "::"}, ["a", "b"]),
        ('a "x" b,c\n', {}, ['a "x" b', "c"]),
        ('"a""b",\n', {}, ['a"b', ""]),
    ],
)
def test_quotes_and_separators_are_settings(
    tmp_path: Path, text: str, layout: dict[str, Any], expected: list[str]
) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert read(tmp_path / "a.csv", [1, 2], header=False, **layout) == [(1, expected)]


@pytest.mark.parametrize(
    "layout",
    [
        {"separator": ""},
        {"separator": "\n"},
        {"separator": '"', "quote": '"'},
        {"quote": "''"},
        {"separator": "::", "quote": '"'},
        {"escape": '"', "quote": '"'},
        {"encoding": "latin-99"},
        {"encoding": "base64"},
        {"max_set_aside": 2},
    ],
)
def test_layouts_that_cannot_be_read_are_refused(layout: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Layout(files=("*",), **layout)


def test_a_long_value_is_read_and_an_endless_one_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("a,b\n" + "x" * 200_000 + ",y\n")
    assert read(tmp_path / "a.csv", ["b"]) == [(2, ["y"])]
    monkeypatch.setattr(rows, "MOST_FIELD_CHARACTERS", 1000)
    (tmp_path / "a.csv").write_text('a,b\n1,2\n"' + "x\n" * 1000)
    with pytest.raises(DataError, match=r"a\.csv line 3, after 1 rows: a quote .*field larger than field limit"):
        read(tmp_path / "a.csv", ["b"])


def test_names_tell_the_format() -> None:
    names = ("a.csv", "a.CSV.gz", "a.tsv", "a.ndjson", "a.parquet", "a.xls", "a")
    assert [file_format(Path(name)) for name in names] == ["csv", "csv", "tsv", "jsonl", "parquet", None, None]
