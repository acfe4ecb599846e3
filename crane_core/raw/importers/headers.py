"""Tell what the first line of a file is that does not have the columns which are asked for."""

from __future__ import annotations

import difflib
import itertools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crane_core.errors import DataError
from crane_core.raw.importers.account import Account, one_of
from crane_core.raw.importers.foreign import is_packed
from crane_core.raw.importers.layout import Layout, open_text

SEPARATORS = ("::", "||", "\t", ";", "|", ",", "^", "~", "\x01", " ")
LINES_LOOKED_AT = 100
NUL = "\0"


def without_columns(
    path: Path, first: list[str], missing: list[Any], wanted: list[Any], layout: Layout, account: Account
) -> DataError:
    """Return the error of a file that lacks columns.

    Args:
        path: the file.
        first: values of its first line.
        missing: names or positions that it lacks.
        wanted: all that are asked for.
        layout: how the file is read.
        account: puts remedies into words.
    """
    shown = ", ".join(map(repr, first[:20]))
    kind = "column" if len(missing) == 1 else "columns"
    found = f"{path} has no {kind} {', '.join(map(str, missing))}; its first line has {len(first)}: {shown}."
    if any(set("\r\n") & set(each) for each in first):
        ways = ["close or remove the quote that opens in the first line", account.way("set {}.quote: none")]
        return DataError(f"{found} Quotes join it with the lines below.", one_of(ways))
    with open_text(path, layout.encoding, None) as text:
        lines = [line.removesuffix("\n") for line in itertools.islice(text, LINES_LOOKED_AT)]
    at = next((at for at, line in enumerate(lines) if line.strip()), 0)
    if layout.header and len(missing) == len(wanted):
        below = [(number, _separator_of(line, missing)) for number, line in enumerate(lines[at + 1 :], at + 2)]
        header = next(((number, each) for number, each in below if each not in (None, " ")), None)
        if header:
            return DataError(f"{found} Line {header[0]} has them.", _without_lines(path, *header, layout, account))
    return DataError(found, one_of(_ways(first, missing, lines[at] if lines else "", layout, account)))


def _without_lines(path: Path, number: int, separator: str | None, layout: Layout, account: Account) -> str:
    """Return the remedy for a file whose header is the line of a number."""
    name = path.name.removesuffix(".gz")
    usual = layout.separator or ("\t" if name.endswith(".tsv") else ",")
    new = shlex.quote(str(path.with_name(f"clean-{name}")))
    with open_text(path, layout.encoding, None) as text:
        encoding = str(getattr(text, "encoding", "")).lower()
    # `tail` knows line ends of one byte.
    recoded = f" | iconv -f {encoding} -t utf-8" if encoding.startswith(("utf-16", "utf-32")) else ""
    ways = [_setting(separator, layout)] if separator != usual else []
    ways += ["set {}.encoding: utf-8"] if recoded and layout.encoding != "utf-8" else []
    told = "".join(f" Then {account.way(way)}." for way in ways)
    read = f"{'gunzip <' if is_packed(path) else 'cat'} {shlex.quote(str(path))}{recoded}"
    command = f"{read} | tail -n +{number} > {new}"
    return f"Remove the lines before the header, and name the new file: {command}.{told}"


def _ways(first: list[str], missing: list[Any], line: str, layout: Layout, account: Account) -> list[str]:
    """Return remedies for a first line that lacks columns; `line` is it as it stands."""
    head = "".join(first)
    separator = _separator_of(line, missing)
    if separator is None or len(line.split(separator)) == len(first):
        separator = next((each for each in ";\t|," if len(first) == 1 and each in head), None)
    ways = [account.way(_setting(separator, layout))] if separator else []
    if NUL in head:
        ways.append(account.way(f"set {{}}.encoding: utf-16-{'be' if head[0] == NUL else 'le'}"))
    if any("\ud800" <= each <= "\udfff" for each in head):
        ways.append(account.way("set {}.encoding to that of the file, such as cp1252"))
    names = account.way("name in {}.columns columns that it has")
    ways.append(f"{names}{guess_of(first, missing)}, or positions from 1 to {len(first)}")
    if layout.header:
        ways.append(account.way("if that line is a row, set {0}.header: false and give positions in {0}.columns"))
    return ways


def guess_of(first: Sequence[str], missing: Sequence[Any]) -> str:
    """Return the column that is most like a missing one, as a part of a sentence; nothing where none is."""
    forms = {each.strip().casefold(): each for each in first}
    for name in map(str, missing):
        close = difflib.get_close_matches(name.casefold(), forms, n=1, cutoff=0.6 if len(name) > 2 else 1)
        if close:
            return f", perhaps {forms[close[0]]!r} for {name!r}"
    return ""


def _separator_of(line: str, columns: Sequence[Any]) -> str | None:
    """Return the separator by which a line has columns, which are names or positions; None if there is none."""
    for each in SEPARATORS:
        parts = [part.strip().strip('"') for part in line.split(each)]
        if all(name <= len(parts) if isinstance(name, int) else name in parts for name in columns):
            return each
    return None


def _setting(separator: str | None, layout: Layout) -> str:
    """Return the settings by which a separator is read, as a remedy for `Account.way`."""
    plainly = " and quote: none" if separator and len(separator) > 1 and layout.given_quote else ""
    return f"set {{}}.separator: {json.dumps(separator)}{plainly}"
