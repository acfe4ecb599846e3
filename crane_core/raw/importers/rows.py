"""Read the rows of CSV, TSV, JSON and Parquet files in chunks, each row with its line, and count every line."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from crane_core.errors import DataError
from crane_core.raw.importers.account import Account, one_of, place
from crane_core.raw.importers.foreign import check_text, check_unpacked
from crane_core.raw.importers.headers import guess_of, without_columns
from crane_core.raw.importers.json_rows import read_json
from crane_core.raw.importers.layout import CHUNK_ROWS, Chunk, Layout, file_format, open_text
from crane_core.raw.importers.nested import column_at, column_path, type_paths
from crane_core.raw.importers.records import Dialect, lines_like_rows, plain_records, quoted_records
from crane_core.raw.parquet import int96_instants, open_parquet

_EXCEL = re.compile(r"sep=([,;|\t])\r?\n?", re.IGNORECASE)
_EXCEL_CHARACTERS = 8
_TAKEN_FOR_HEADER = "taken for a header, though columns are given by position: set header: false if it is a row"


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
        optional: columns of text files that no row or object needs to have.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    wanted = list(dict.fromkeys(columns))
    kind = layout.format or file_format(path) or "csv"
    try:
        if kind == "parquet":
            check_unpacked(path)
        else:
            check_text(path, account.way)
        if kind == "parquet":
            yield from _read_parquet(path, wanted, account)
        elif kind in ("json", "jsonl"):
            yield from read_json(path, layout, wanted, account, optional)
        else:
            yield from _read_delimited(path, layout, kind, wanted, account, optional)
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeError, MemoryError) as error:
        is_text = kind != "parquet" and isinstance(error, UnicodeError)
        ways = [account.way("set {}.encoding to that of the file, such as cp1252")] if is_text else []
        raise DataError(
            f"{path} ({_size(path)} bytes) cannot be read after {account.rows} rows: {error or type(error).__name__}.",
            one_of([*ways, f"deliver the file again, complete, as {kind}", *_other_format(kind, account)]),
        ) from error


def _other_format(kind: str, account: Account) -> list[str]:
    """Return the remedy for a file that is no Parquet file, although its name says so."""
    return [account.way("set {}.format to csv, tsv or json if it is such a file")] if kind == "parquet" else []


def _read_delimited(
    path: Path, layout: Layout, kind: str, wanted: list[Any], account: Account, optional: Sequence[str]
) -> Iterator[Chunk]:
    quote = layout.quote_of(kind)
    is_csv = bool(quote or layout.escape)
    with open_text(path, layout.encoding, "" if is_csv else None) as text:
        told = _told_separator(text)
        account.lines += told is not None
        account.headers += told is not None
        separator = layout.separator or told or ("\t" if kind == "tsv" else ",")
        start = 2 if told else 1
        records = plain_records(text, separator, start)
        if is_csv:
            records = quoted_records(path, text, Dialect(separator, quote, layout.escape), start, account)
        places: dict[Any, int | None] | None = None
        least = most = 0
        rows: list[list[str]] = []
        lines: list[int] = []
        for first, last, row in records:
            account.lines += last - first + 1
            if not row or (len(row) == 1 and not row[0].strip() and most != 1):
                account.blank += last - first + 1
                continue
            if places is None:
                places = _found_places(path, row, wanted, layout, account, optional)
                most = len(row)
                least = len(_without_end(row)) if layout.header else most
                if layout.header:
                    account.headers += last - first + 1
                    if all(isinstance(name, int) for name in wanted):
                        account.notice(_TAKEN_FOR_HEADER, place(path, first, "", separator.join(row)))
                    continue
            filled = _filled(row, least, most)
            # Where a quote has joined rows to one that does not fit, each of its lines counts as a row.
            size = 1 if filled else last - first + 1
            account.rows += size
            account.text_rows += size
            if filled is None:
                over = f" over lines {first} to {last}" if size > 1 else ""
                account.drop("wrong_fields", place(path, first, "", f"{len(row)} values{over}, expected {most}"), size)
                continue
            if last > first:
                alike = 0 if layout.multiline else lines_like_rows(row, separator, least, most)
                # Text of which three lines all look like rows of three values and more is none.
                is_sure = alike == last - first and alike > 1 and most > 2
                account.go_on(f"{path} lines {first} to {last}", last - first, alike, is_sure)
            rows.append(filled)
            lines.append(first)
            if len(rows) == CHUNK_ROWS:
                yield _chunk_of(path, rows, lines, places)
                rows, lines = [], []
        if places is None:
            raise DataError(f"{path} is empty: 0 rows.", account.deliver_again("rows"))
        if rows:
            yield _chunk_of(path, rows, lines, places)


def _told_separator(text: IO[str]) -> str | None:
    """Return the separator that a first line `sep=;` of Excel tells; read nothing where there is no such line."""
    found = _EXCEL.fullmatch(text.readline(_EXCEL_CHARACTERS))
    if not found:
        text.seek(0)
    return found[1] if found else None


def _without_end(row: list[str]) -> list[str]:
    """Return a row without the empty values at its end."""
    size = len(row)
    while size and not row[size - 1]:
        size -= 1
    return row[:size]


def _filled(row: list[str], least: int, most: int) -> list[str] | None:
    """Return a row with as many values as the first line has, None where it has others.

    Spreadsheets write separators without a value at the end of some rows, and leave them out in others.
    """
    if len(row) == most:
        return row
    if len(row) > most:
        return None if any(row[most:]) else row[:most]
    return None if len(row) < least else [*row, *[""] * (most - len(row))]


def _chunk_of(path: Path, rows: list[list[str]], lines: list[int], places: Mapping[Any, int | None]) -> Chunk:
    columns: dict[Any, list[Any]] = {
        name: [None] * len(rows) if index is None else [row[index] for row in rows] for name, index in places.items()
    }
    return Chunk(path, columns, lines)


def _found_places(
    path: Path, first: list[str], wanted: list[Any], layout: Layout, account: Account, optional: Sequence[str]
) -> dict[Any, int | None]:
    """Return the index of each wanted column, None for an optional one that is not there.

    Raises:
        DataError: another one is not there, or is there twice.
    """
    names = first if layout.header else []
    twice = sorted({name for name in wanted if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path} names a column twice in its header: {', '.join(map(repr, twice))}.",
            one_of(["rename one of the two", account.way("give in {}.columns the position, such as {{item_id: 2}}")]),
        )
    index: dict[Any, int | None] = {name: names.index(name) if name in names else None for name in wanted}
    index |= {name: name - 1 for name in wanted if isinstance(name, int) and 1 <= name <= len(first)}
    missing = [name for name, place in index.items() if place is None and name not in optional]
    if missing:
        raise without_columns(path, first, missing, wanted, layout, account)
    return index


def _read_parquet(path: Path, wanted: list[Any], account: Account) -> Iterator[Chunk]:
    with open_parquet(path) as parquet:
        schema = parquet.schema_arrow
        paths = {name: found for name in wanted if (found := column_path(schema, name))}
        missing = [name for name in wanted if name not in paths]
        twice = [name for name, (root, _) in paths.items() if schema.names.count(root) > 1]
        if missing or twice:
            shown = [repr(each) for each, _ in zip(type_paths(schema), range(20), strict=False)]
            raise DataError(
                f"{path} ({parquet.metadata.num_rows} rows) has {'no column' if missing else 'twice the column'} "
                f"{', '.join(map(str, missing or twice))}; it has {', '.join(shown) or 'none'}.",
                one_of(
                    [
                        account.way("name in {}.columns columns that it has once") + guess_of(schema.names, missing),
                        "deliver the file again with them",
                    ]
                ),
            )
        before, instants = account.rows, int96_instants(parquet)
        for batch in parquet.iter_batches(CHUNK_ROWS, columns=list(dict.fromkeys(root for root, _ in paths.values()))):
            first = account.rows - before + 1
            account.rows += batch.num_rows
            columns = {
                name: _zoned(column_at(batch.column(root), steps), ".".join([root, *steps]) in instants)
                for name, (root, steps) in paths.items()
            }
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
