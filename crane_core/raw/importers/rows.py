"""Read the rows of CSV, TSV, JSON lines and Parquet files in chunks, each row with its line, and count every line."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from crane_core.errors import DataError
from crane_core.raw.importers.account import Account, one_of, place
from crane_core.raw.parquet import int96_instants, open_parquet
from crane_core.section import Section

CHUNK_ROWS = 65_536
MOST_FIELD_CHARACTERS = 1 << 24
"""Longest value of a CSV file. A quote that is never closed is found after as many characters."""
SUFFIXES: dict[str, Literal["csv", "tsv", "jsonl", "parquet"]] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
NO_QUOTE = "none"
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_GZIP = b"\x1f\x8b"


class Layout(Section):
    """Files of rows, and how they are written."""

    files: tuple[str, ...] = Field((), min_length=1)
    """Patterns, relative to the mapping file or absolute."""
    format: Literal["csv", "tsv", "jsonl", "parquet"] | None = None
    """Format of the files; by default told by their names."""
    separator: str | None = Field(None, min_length=1)
    """What separates values: by default a comma in CSV and a tab in TSV. It may be longer, as `::`, without quotes."""
    quote: str | None = None
    """The quote around values, or `none` where quotes are ordinary characters: by default `"` in CSV, `none` in TSV."""
    escape: str | None = Field(None, min_length=1, max_length=1)
    """Character before a quote inside quotes, such as a backslash; by default such a quote is doubled."""
    header: bool = True
    """Whether the first line names the columns. Without it a column is its position: `{user_id: 1, item_id: 2}`."""
    encoding: str = "utf-8"
    """Encoding of text files, such as `latin-1`, `cp1252` or `utf-16-le`; a byte order mark tells UTF-8 and UTF-16."""
    missing: tuple[str, ...] | None = None
    """Words that stand for no value, in every column. By default NA, null and the like, but not in ids and text."""
    decimal: Literal[".", ","] = "."
    """The decimal separator of numbers."""
    numeric: tuple[Literal["user_id", "item_id"], ...] = ()
    """Ids that are whole numbers, so that 7, 007 and 7.0 are the same one. By default text is taken as it stands."""
    max_set_aside: float = Field(0.0, ge=0, le=1)
    """Share of the rows that may be left out, with a reason, because a value does not fit."""

    @field_validator("encoding")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            "".encode(name)
        except (LookupError, ValueError) as error:
            raise ValueError("not an encoding that Python knows, such as utf-8, latin-1 or cp1252") from error
        return name

    @field_validator("quote")
    @classmethod
    def _one_character(cls, quote: str | None) -> str | None:
        if quote is not None and quote != NO_QUOTE and len(quote) != 1:
            raise ValueError("one character or none")
        return quote

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        marks = [mark for mark in (self.separator, self.given_quote, self.escape) if mark]
        if len(set(marks)) != len(marks) or set("\r\n") & set("".join(marks)):
            raise ValueError("separator, quote and escape must differ and be no line breaks")
        if self.given_quote and len(self.separator or ",") > 1:
            raise ValueError(f"a separator of several characters goes with quote: {NO_QUOTE}")
        return self

    @property
    def given_quote(self) -> str | None:
        """The quote that the layout names, None where quotes are ordinary characters."""
        return None if self.quote == NO_QUOTE else self.quote

    def quote_of(self, kind: str) -> str | None:
        """Return the quote of files of a format, None where quotes are ordinary characters."""
        if self.quote:
            return self.given_quote
        return '"' if kind == "csv" and len(self.separator or ",") == 1 and self.separator != '"' else None


class JsonNumber(str):
    """A number of a JSON file with a point or an exponent, as it is written."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file.

    Attributes:
        path: the file.
        columns: column of the file to its values: an Arrow array, or a list of text and of what JSON holds.
        lines: line of each row; in a Parquet file its number, from 1.
        unit: `line` or `row`.
    """

    path: Path
    columns: Mapping[str | int, pa.Array | list[Any]]
    lines: Sequence[int]
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int, column: str | int) -> str:
        """Return where a value is, and the value."""
        return place(self.path, self.lines[row], str(column), plain(self.columns[column][row]), self.unit)


def plain(value: Any) -> Any:
    """Return a value of a column as Python shows it; bytes that are no UTF-8 as replacement characters."""
    try:
        return value.as_py() if isinstance(value, pa.Scalar) else value
    except UnicodeDecodeError:
        is_text = isinstance(value, pa.StringScalar)
        return value.as_buffer().to_pybytes().decode(errors="replace") if is_text else "text that is not UTF-8"


def read_chunks(
    path: Path,
    layout: Layout,
    columns: Sequence[str | int],
    account: Account,
    optional: Sequence[str] = (),
) -> Iterator[Chunk]:
    """Yield some columns of a file.

    Args:
        path: the file.
        layout: how it is written.
        columns: names or, from 1, positions of the columns.
        account: counts lines and rows.
        optional: columns of JSON lines that no object needs to have.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    wanted = list(dict.fromkeys(columns))
    kind = layout.format or file_format(path)
    try:
        if kind == "parquet":
            yield from _read_parquet(path, wanted, account)
        elif kind == "jsonl":
            yield from _read_json(path, layout, wanted, account, optional)
        else:
            yield from _read_delimited(path, layout, kind or "csv", wanted, account, optional)
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeError, MemoryError) as error:
        raise DataError(
            f"{path} ({_size(path)} bytes) cannot be read after {account.rows} rows: {error or type(error).__name__}.",
            one_of(
                [
                    f"deliver the file again, complete, as {kind}",
                    account.way("set {0}.format and {0}.encoding to those of the file"),
                ]
            ),
        ) from error


def file_format(path: Path) -> str | None:
    """Return the format that the name of a file tells, without the suffix of a compression; None for others."""
    return SUFFIXES.get(Path(path.name.removesuffix(".gz")).suffix.lower())


@contextmanager
def open_text(path: Path, encoding: str, newline: str | None) -> Iterator[IO[str]]:
    """Open a text file, unpacked where it is packed with gzip.

    Bytes that are none of the encoding become lone surrogates, so that the value which holds them is found.
    """
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    with gzip.open(path, "rb") if packed else path.open("rb") as file:
        mark = file.read(2)
    if encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        encoding = _MARKS.get(mark, "utf-8-sig")
    opened = gzip.open if packed else open
    with opened(path, "rt", encoding=encoding, errors="surrogateescape", newline=newline) as text:
        yield text


def _read_delimited(
    path: Path, layout: Layout, kind: str, wanted: list[Any], account: Account, optional: Sequence[str]
) -> Iterator[Chunk]:
    separator = layout.separator or ("\t" if kind == "tsv" else ",")
    quote = layout.quote_of(kind)
    with open_text(path, layout.encoding, "" if quote else None) as text:
        records = _quoted(path, text, separator, quote, layout.escape, account) if quote else _plain(text, separator)
        places: dict[Any, int | None] | None = None
        width = 0
        rows: list[list[str]] = []
        lines: list[int] = []
        for first, last, row in records:
            account.lines += last - first + 1
            if not row or (len(row) == 1 and not row[0].strip() and width != 1):
                account.blank += last - first + 1
                continue
            account.continued += last - first
            if places is None:
                width = len(row)
                places = _places(path, row, wanted, layout, account)
                missing = [name for name, index in places.items() if index is None and name not in optional]
                if missing:
                    raise _without(path, row, missing, layout, account)
                if layout.header:
                    account.headers += 1
                    continue
            account.rows += 1
            account.text_rows += 1
            if len(row) != width:
                account.drop("wrong_fields", place(path, first, "", f"{len(row)} values, expected {width}"))
                continue
            rows.append(row)
            lines.append(first)
            if len(rows) == CHUNK_ROWS:
                yield _chunk_of(path, rows, lines, places)
                rows, lines = [], []
        if places is None:
            raise DataError(f"{path} is empty: 0 rows.", "Deliver the file again with rows, or leave it out.")
        if rows:
            yield _chunk_of(path, rows, lines, places)


def _chunk_of(path: Path, rows: list[list[str]], lines: list[int], places: Mapping[Any, int | None]) -> Chunk:
    columns: dict[Any, list[Any]] = {
        name: [None] * len(rows) if index is None else [row[index] for row in rows] for name, index in places.items()
    }
    return Chunk(path, columns, lines)


def _plain(text: IO[str], separator: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield first line, last line and values of each line of a file without quotes."""
    for number, line in enumerate(text, 1):
        line = line.removesuffix("\n")
        yield number, number, line.split(separator) if line else []


def _quoted(
    path: Path, text: IO[str], separator: str, quote: str, escape: str | None, account: Account
) -> Iterator[tuple[int, int, list[str]]]:
    """Yield first line, last line and values of each record of a file with quotes."""
    csv.field_size_limit(MOST_FIELD_CHARACTERS)
    reader = csv.reader(text, delimiter=separator, quotechar=quote, escapechar=escape, strict=True)
    first = 1
    try:
        for row in reader:
            yield first, reader.line_num, row
            first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path} line {first}, after {account.rows} rows: a quote {quote} that opens there is not closed as CSV "
            f"has it; the reader came to line {reader.line_num} ({error}).",
            one_of(
                [
                    f"close or double the quote in line {first}",
                    account.way("set {}.quote: none if quotes are ordinary characters"),
                    account.way("set {}.escape to the character that stands before a quote inside quotes"),
                ]
            ),
        ) from error


def _places(path: Path, first: list[str], wanted: list[Any], layout: Layout, account: Account) -> dict[Any, int | None]:
    """Return the index of each wanted column, None for one that is not there."""
    names = first if layout.header else []
    twice = sorted({name for name in wanted if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path} line 1 names a column twice: {', '.join(map(repr, twice))}.",
            one_of(["rename one of the two", account.way("give in {}.columns the position, such as {{item_id: 2}}")]),
        )
    index: dict[Any, int | None] = {name: names.index(name) if name in names else None for name in wanted}
    return index | {name: name - 1 for name in wanted if isinstance(name, int) and 1 <= name <= len(first)}


def _without(path: Path, first: list[str], missing: list[Any], layout: Layout, account: Account) -> DataError:
    """Return the error of a file that lacks columns."""
    shown = ", ".join(map(repr, first[:20]))
    other = next((each for each in ";\t|," if len(first) == 1 and each in first[0]), None)
    ways = [account.way(f"set {{}}.separator: {json.dumps(other)}")] if other else []
    ways += [account.way("set {}.encoding: utf-16-le")] if "\0" in "".join(first) else []
    ways.append(account.way(f"name in {{}}.columns columns that it has, or positions from 1 to {len(first)}"))
    if layout.header:
        ways.append(account.way("if that line is a row, set {0}.header: false and give positions in {0}.columns"))
    return DataError(
        f"{path} has no column {', '.join(map(str, missing))}; line 1 has {len(first)}: {shown}.", one_of(ways)
    )


def _read_json(
    path: Path, layout: Layout, wanted: list[Any], account: Account, optional: Sequence[str]
) -> Iterator[Chunk]:
    absent = set(wanted) - set(optional)
    names: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    start = account.rows
    with open_text(path, layout.encoding, None) as text:
        for number, line in enumerate(text, 1):
            account.lines += 1
            if not line.strip():
                account.blank += 1
                continue
            account.rows += 1
            account.text_rows += 1
            try:
                row = _DECODER.decode(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{type(row).__name__}, not an object")
            except (ValueError, RecursionError) as error:
                if account.rows == start + 1:
                    raise DataError(
                        f"{path} line {number} is no JSON object ({error}): {line.strip()[:40]!r}.",
                        "Write one JSON object a line: jq -c '.[]' FILE > FILE.jsonl does it for an array, jq -c . for "
                        "objects over several lines.",
                    ) from error
                account.drop("not_json", place(path, number, "", f"{error}: {line.strip()}"))
                continue
            if len(names) < 1000:
                names |= dict.fromkeys(row)
            absent -= row.keys()
            rows.append(row)
            lines.append(number)
            if len(rows) == CHUNK_ROWS:
                yield Chunk(path, {name: [row.get(name) for row in rows] for name in wanted}, lines)
                rows, lines = [], []
    if absent:
        raise DataError(
            f"{path}: none of {account.rows - start} objects has {', '.join(map(str, sorted(absent, key=str)))}; they "
            f"have {', '.join(names) or 'no field'}.",
            one_of(
                [account.way("name in {}.columns fields that they have"), "deliver the file again with these fields"]
            ),
        )
    if rows:
        yield Chunk(path, {name: [row.get(name) for row in rows] for name in wanted}, lines)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object names a field twice")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=JsonNumber, parse_constant=JsonNumber)


def _read_parquet(path: Path, wanted: list[Any], account: Account) -> Iterator[Chunk]:
    with open_parquet(path) as parquet:
        names = parquet.schema_arrow.names
        keys = {name: names[name - 1] if isinstance(name, int) and 1 <= name <= len(names) else name for name in wanted}
        missing = [name for name, key in keys.items() if key not in names]
        twice = [name for name, key in keys.items() if names.count(key) > 1]
        if missing or twice:
            raise DataError(
                f"{path} ({parquet.metadata.num_rows} rows) has {'no column' if missing else 'twice the column'} "
                f"{', '.join(map(str, missing or twice))}; it has {', '.join(map(repr, names[:20])) or 'none'}.",
                one_of(
                    [account.way("name in {}.columns columns that it has once"), "deliver the file again with them"]
                ),
            )
        before, instants = account.rows, int96_instants(parquet)
        for batch in parquet.iter_batches(CHUNK_ROWS, columns=list(dict.fromkeys(keys.values()))):
            first = account.rows - before + 1
            account.rows += batch.num_rows
            columns = {name: _zoned(batch.column(key), key in instants) for name, key in keys.items()}
            yield Chunk(path, columns, range(first, first + batch.num_rows), "row")
        if account.rows - before != parquet.metadata.num_rows:
            raise pa.ArrowInvalid(f"the footer tells {parquet.metadata.num_rows} rows, found {account.rows - before}")


def _zoned(values: pa.Array, is_instant: bool) -> pa.Array:
    return values.cast(pa.timestamp(values.type.unit, "UTC")) if is_instant else values


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
