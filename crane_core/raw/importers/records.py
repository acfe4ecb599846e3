"""Split delimited text into records, each with its lines, and tell values that look like rows behind a stray quote."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from crane_core.errors import DataError
from crane_core.raw.importers.account import Account, one_of

MOST_FIELD_CHARACTERS = 1 << 24
"""Longest value of a CSV file. A quote that is never closed is found after as many characters."""
_LINE_END = re.compile(r"\r\n|\r|\n")

Record = tuple[int, int, list[str]]
"""First line, last line and values."""


@dataclass(frozen=True)
class Dialect:
    """Characters of a file of records.

    Attributes:
        separator: between values, one character.
        quote: around values; None where quotes are ordinary characters.
        escape: before a character that would have a meaning; None without one.
    """

    separator: str
    quote: str | None = '"'
    escape: str | None = None


def plain_records(text: IO[str], separator: str, start: int) -> Iterator[Record]:
    """Yield each line of a file without quotes; `start` is its first line."""
    for number, line in enumerate(text, start):
        line = line.removesuffix("\n")
        yield number, number, line.split(separator) if line else []


def quoted_records(path: Path, text: IO[str], dialect: Dialect, start: int, account: Account) -> Iterator[Record]:
    """Yield each record of a file with quotes, with an escape character or with both.

    Args:
        path: the file, for messages.
        text: it, opened with its own line ends.
        dialect: its characters.
        start: number of the first line.
        account: of the section, for messages.

    Raises:
        DataError: a quote is not closed.
    """
    csv.field_size_limit(MOST_FIELD_CHARACTERS)
    separator, quote, escape = dialect.separator, dialect.quote, dialect.escape
    if escape == quote:
        # A quote before a quote is what doubles it.
        escape = None
    lines = text if escape is None else _kept_escapes(text, separator, quote, escape)
    reader = csv.reader(
        lines,
        delimiter=separator,
        quotechar=quote or '"',
        quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
        escapechar=escape,
        strict=True,
    )
    first = start
    try:
        for row in reader:
            last = reader.line_num + start - 1
            yield first, last, row
            first = last + 1
    except csv.Error as error:
        raise DataError(
            f"{path} line {first}, after {account.rows} rows: a quote {quote} that opens there is not closed as CSV "
            f"has it; the reader came to line {reader.line_num + start - 1} ({error}).",
            one_of(
                [
                    f"close or double the quote in line {first}",
                    account.way("set {}.quote: none if quotes are ordinary characters"),
                    account.way("set {}.escape to the character that stands before a quote inside quotes"),
                ]
            ),
        ) from error


def _kept_escapes(lines: Iterable[str], separator: str, quote: str | None, escape: str) -> Iterator[str]:
    """Yield lines in which an escape character that has nothing to escape is doubled, so that the reader keeps it.

    It has something to escape before itself, before a quote and, outside quotes, before a separator. A line that ends
    in it ends there: the next one is a record of its own, or goes on inside quotes.
    """
    mark = re.escape(escape)
    outside = re.compile(mark + (f"|{re.escape(quote)}" if quote else ""))
    inside = re.compile(f"{mark}|{re.escape(quote)}{{1,2}}") if quote else outside
    is_inside = False
    for line in lines:
        parts: list[str] = []
        at = 0
        while found := (inside if is_inside else outside).search(line, at):
            begin, end = found.span()
            text = found[0]
            if text == escape:
                special = line[end : end + 1] in ({escape, quote} if is_inside else {escape, quote, separator})
                end += special
                text = line[begin:end] if special else escape * 2
            elif is_inside:
                is_inside = text != quote
            else:
                is_inside = begin == 0 or (begin > at and line[begin - 1] == separator)
            parts += [line[at:begin], text]
            at = end
        yield "".join([*parts, line[at:]])


def lines_like_rows(row: Sequence[str], separator: str, least: int, most: int) -> int:
    """Return how many lines of the values of a record, beyond its first line, look like rows of the file.

    A stray quote opens in one row and a second one closes in another. Then the lines between them have as many values
    as a row has, and what stands before the first line end and after the last one makes up a row, too.

    Args:
        row: values of the record.
        separator: of the file.
        least, most: values of a row.
    """
    found = 0
    for index, value in enumerate(row if most > 1 else ()):
        sizes = [line.count(separator) + 1 for line in _LINE_END.split(value)]
        if len(sizes) > 1:
            found += sum(least <= size <= most for size in sizes[1:-1])
            found += sizes[-1] == index + 1 and least <= index + sizes[0] <= most
    return found
