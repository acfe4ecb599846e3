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
from crane_core.raw.importers import json_rows, records, rows
from crane_core.raw.importers.account import Account
from crane_core.raw.importers.layout import Layout, file_format
from crane_core.raw.importers.rows import read_chunks


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
    for module in (rows, json_rows):
        monkeypatch.setattr(module, "CHUNK_ROWS", 2)
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
        {"decimal": ",", "thousands": ","},
        {"thousands": "x"},
    ],
)
def test_layouts_that_cannot_be_read_are_refused(layout: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Layout(files=("*",), **layout)


def test_a_long_value_is_read_and_an_endless_one_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("a,b\n" + "x" * 200_000 + ",y\n")
    assert read(tmp_path / "a.csv", ["b"]) == [(2, ["y"])]
    monkeypatch.setattr(records, "MOST_FIELD_CHARACTERS", 1000)
    (tmp_path / "a.csv").write_text('a,b\n1,2\n"' + "x\n" * 1000)
    with pytest.raises(DataError, match=r"a\.csv line 3, after 1 rows: a quote .*field larger than field limit"):
        read(tmp_path / "a.csv", ["b"])


@pytest.mark.parametrize("first", ["sep=;\n", "SEP=;\r\n", "\ufeffsep=;\n"])
@pytest.mark.parametrize("quote", [None, "none"])
def test_a_first_line_of_excel_tells_the_separator(tmp_path: Path, first: str, quote: str | None) -> None:
    (tmp_path / "a.csv").write_text(f"{first}a;b\n1;2\n\n3;4\n", encoding="utf-8")
    account = Account("interactions", written=2)
    assert read(tmp_path / "a.csv", ["b"], account, quote=quote) == [(3, ["2"]), (5, ["4"])]
    assert (account.lines, account.headers, account.blank) == (5, 2, 1)
    account.settle()
    (tmp_path / "a.csv").write_text("sep=a;b\n1;2\n")
    assert read(tmp_path / "a.csv", ["b"], separator=";", quote=quote) == [(2, ["2"])]


def test_empty_values_at_the_end_of_a_row_may_be_more_or_fewer(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b,,\n1,2\n3,4,,,,\n5,6,x\n7\n8,9,,,y\n")
    account = Account("interactions", 0.5, written=3)
    assert read(tmp_path / "a.csv", ["b", 3], account) == [(2, ["2", ""]), (3, ["4", ""]), (4, ["6", "x"])]
    assert account.set_aside == {"wrong_fields": 2}
    account.settle()
    (tmp_path / "b.csv").write_text("1,2,\n3,4\n5,6,,\n")
    assert read(tmp_path / "b.csv", [1], header=False) == [(1, ["1"]), (3, ["5"])]


@pytest.mark.parametrize(
    ("header", "wanted", "guess"),
    [("User_ID,i", "user_id", "'User_ID' for 'user_id'"), ("movieId,i", "movie_id", "'movieId' for 'movie_id'"),
     (" item,i", "item", "' item' for 'item'"), ("{item,i", "item", "'{item' for 'item'")],
)  # fmt: skip
def test_a_column_of_almost_that_name_is_named(tmp_path: Path, header: str, wanted: str, guess: str) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n1,2\n")
    with pytest.raises(DataError, match=f"has no column {wanted}; its first line has 2") as caught:
        read(tmp_path / "a.csv", [wanted])
    assert f"perhaps {guess}" in caught.value.remedy


@pytest.mark.parametrize("encoding", ["utf-16-le", "cp1252"])
def test_a_header_of_another_encoding_leads_to_that_setting(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_bytes("größe,i\n1,2\n".encode(encoding))
    with pytest.raises(DataError, match="has no column größe") as caught:
        read(tmp_path / "a.csv", ["größe"])
    assert "set interactions.encoding" in caught.value.remedy.lower()
    assert read(tmp_path / "a.csv", ["größe"], encoding=encoding) == [(2, ["1"])]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("declared", ["utf-8", "cp1252", "utf-16-le"])
def test_a_mark_tells_the_encoding_whatever_is_declared(tmp_path: Path, encoding: str, declared: str) -> None:
    (tmp_path / "a.csv").write_bytes("größe,i\n1,2\n".encode(encoding))
    assert read(tmp_path / "a.csv", ["größe"], encoding=declared) == [(2, ["1"])]


def test_columns_within_columns_of_parquet_are_named_with_dots(tmp_path: Path) -> None:
    table = pa.table({"user": [{"id": "a"}, None], "tags": [[{"n": 1}, {"n": 2}], []], "user.x": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", ["user.id", "tags.n", "user.x"]) == [
        (1, ["a", [1, 2], 1]),
        (2, [None, [], 2]),
    ]
    with pytest.raises(DataError, match=r"no column user\.name; it has 'user', 'user\.id', 'tags', 'tags\.n'"):
        read(tmp_path / "a.parquet", ["user.name"])


def test_names_tell_the_format() -> None:
    names = ("a.csv", "a.CSV.gz", "a.tsv", "a.ndjson", "a.json", "a.parquet", "a.xls", "a")
    assert [file_format(Path(name)) for name in names] == ["csv", "csv", "tsv", "jsonl", "json", "parquet", None, None]


def test_a_truncated_archive_asks_for_the_file_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a,b\n" * 1000)[:-9])
    with pytest.raises(DataError, match="cannot be read after") as caught:
        read(tmp_path / "a.csv.gz", ["a"])
    assert caught.value.remedy == "Deliver the file again, complete, as csv."
