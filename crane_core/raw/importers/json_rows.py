"""Read the objects of JSON files: one a line, or the members of one array."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from crane_core.errors import DataError
from crane_core.raw.importers.account import Account, one_of, place
from crane_core.raw.importers.layout import CHUNK_ROWS, Chunk, JsonNumber, Layout, open_text
from crane_core.raw.importers.nested import ABSENT, field_paths, value_at

BLOCK = 1 << 20
"""Characters of an array that are read at a time."""
MOST_CHARACTERS = 1 << 24
"""Longest member of an array."""
_SHOWN_FIELDS, _ROWS_LOOKED_AT = 30, 1000
_SPACE = re.compile(r"\s*")
_AFTER = re.compile(r"\s*([,\]])")
_TWICE = "an object names a field twice"
_ONE_A_LINE = (
    "Write one JSON object a line, or one array of objects: jq -c . FILE > FILE.jsonl does it for objects over "
    "several lines, jq -c '.NAME[]' FILE > FILE.jsonl for the list NAME inside an object."
)
_NO_COMMAS = "Take the commas from the ends of the lines: sed 's/,[[:space:]]*$//' FILE > FILE.jsonl."


def read_json(
    path: Path, layout: Layout, wanted: list[Any], account: Account, optional: Sequence[str]
) -> Iterator[Chunk]:
    """Yield fields of the objects of a file.

    Args:
        path: the file.
        layout: how it is written.
        wanted: names of fields; `user.id` is the field `id` of the object in the field `user`.
        account: counts lines and objects.
        optional: fields that no object needs to have.

    Raises:
        DataError: the file holds no objects, or none has one of the fields.
        OSError, EOFError, zlib.error, UnicodeError: it cannot be read.
    """
    is_array = _is_array(path, layout.encoding)
    objects = (_members if is_array else _lines)(path, layout.encoding, account)
    absent = set(wanted) - set(optional)
    names: dict[str, None] = {}
    columns: dict[Any, list[Any]] = {name: [] for name in wanted}
    places: list[int] = []
    count = 0
    for number, row in objects:
        if count < _ROWS_LOOKED_AT:
            names |= dict.fromkeys(field_paths(row))
        count += 1
        for name, values in columns.items():
            value = value_at(row, name)
            values.append(None if value is ABSENT else value)
            # An empty list does not tell whether its members would have the field.
            if name in absent and value is not ABSENT and (value != [] or name in row):
                absent.discard(name)
        places.append(number)
        if len(places) == CHUNK_ROWS:
            yield Chunk(path, columns, places, "object" if is_array else "line")
            columns, places = {name: [] for name in wanted}, []
    if absent:
        raise _without(path, count, sorted(map(str, absent)), list(names), account)
    if places:
        yield Chunk(path, columns, places, "object" if is_array else "line")


def _without(path: Path, count: int, absent: list[str], names: list[str], account: Account) -> DataError:
    """Return the error of a file none of whose objects has some fields."""
    if not count:
        return DataError(f"{path} is empty: 0 objects.", account.deliver_again("objects"))
    more = ", ..." if len(names) > _SHOWN_FIELDS else ""
    inner = next((name.removesuffix(f".{absent[0]}") for name in names if name.endswith(f".{absent[0]}")), None)
    ways = [f"take the objects out of the list {inner}: jq -c '.{inner}[]' FILE > FILE.jsonl"] if inner else []
    ways += [account.way("name in {}.columns fields that they have"), "deliver the file again with these fields"]
    return DataError(
        f"{path}: none of {count} objects has {', '.join(absent)}; they have "
        f"{', '.join(names[:_SHOWN_FIELDS]) or 'no field'}{more}.",
        one_of(ways),
    )


def _is_array(path: Path, encoding: str) -> bool:
    with open_text(path, encoding, None) as text:
        block = text.read(BLOCK)
        while block and not block.strip():
            block = text.read(BLOCK)
        return block.lstrip().startswith("[")


def _lines(path: Path, encoding: str, account: Account) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line and the object of each line that is not empty."""
    is_first = True
    with open_text(path, encoding, None) as text:
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
                if is_first:
                    raise DataError(
                        f"{path} line {number} is no JSON object ({error}): {line.strip()[:40]!r}.",
                        _way_out(line, error),
                    ) from error
                account.drop("not_json", place(path, number, "", f"{error}: {line.strip()}"))
                continue
            is_first = False
            yield number, row


def _way_out(line: str, error: Exception) -> str:
    """Return the remedy of a first line that is no object."""
    if str(error) == _TWICE:
        return "Write each field of an object once, under a name of its own."
    if line.rstrip().endswith("},"):
        return _NO_COMMAS
    # An object over several lines begins on this one.
    return _ONE_A_LINE if line.lstrip().startswith("{") else "Write one JSON object a line, or one array of objects."


def _members(path: Path, encoding: str, account: Account) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number, from 1, and the object of each member of an array."""
    number = 0
    with open_text(path, encoding, None) as text:
        try:
            for number, member in enumerate(_values(text), 1):
                account.rows += 1
                if isinstance(member, dict):
                    yield number, member
                elif number > 1:
                    account.drop("not_json", place(path, number, "", f"{member}, not an object", "object"))
                else:
                    raise DataError(
                        f"{path} is an array of which the first member is no object: {str(member)[:40]!r}.",
                        f"Write one JSON object a line, or one array of objects{_table_of(path, encoding, member)}.",
                    )
        except (ValueError, RecursionError) as error:
            if isinstance(error, UnicodeError):
                raise
            raise DataError(
                f"{path} is an array that cannot be read after {number} objects: {getattr(error, 'msg', error)}.",
                "Deliver the file again, complete, as one JSON array of objects or as one object a line.",
            ) from error


def _table_of(path: Path, encoding: str, member: Any) -> str:
    """Return how jq makes a table of an array of lists, or of a list a line; nothing of others."""
    with open_text(path, encoding, None) as text:
        line = text.readline(BLOCK)
    try:
        is_line = isinstance(json.loads(line), list)
    except (ValueError, RecursionError):
        is_line = False
    if not isinstance(member, list) and not is_line:
        return ""
    query = ".[] | @csv" if isinstance(member, list) else "@csv"
    return f"; or make a table without a header: jq -r '{query}' FILE > FILE.csv, which goes with header: false"


def _values(text: IO[str]) -> Iterator[Any]:
    """Yield the members of the array that a file holds, in bounded memory.

    Raises:
        ValueError: what follows is no array, or is more than one.
    """
    buffer = text.read(BLOCK)
    while not buffer.strip().removeprefix("[").lstrip() and (more := text.read(BLOCK)):
        buffer += more
    at = _skipped(buffer, _skipped(buffer, 0) + 1)
    is_open = not buffer.startswith("]", at)
    at += not is_open
    while is_open:
        try:
            value, end = _DECODER.raw_decode(buffer, _skipped(buffer, at))
            after = _AFTER.match(buffer, end)
            if after is None:
                raise ValueError(f"a comma or ] is missing: {buffer[end : end + 40]!r}")
        except (ValueError, RecursionError):
            more = text.read(max(BLOCK, len(buffer) - at)) if len(buffer) - at < MOST_CHARACTERS else ""
            if not more:
                raise
            buffer, at = buffer[at:] + more, 0
            continue
        yield value
        at, is_open = after.end(), after[1] == ","
    rest = buffer[at:]
    while not (rest := rest.lstrip()) and (rest := text.read(BLOCK)):
        pass
    if rest:
        raise ValueError(f"more follows after the array: {rest[:40]!r}")


def _skipped(buffer: str, at: int) -> int:
    """Return the place of the next character that is no space."""
    found = _SPACE.match(buffer, at)
    return found.end() if found else at


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError(_TWICE)
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=JsonNumber, parse_constant=JsonNumber)
