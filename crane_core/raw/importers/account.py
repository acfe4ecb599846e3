"""The account of an import: what the files held, what was written, and what was set aside, by reason."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crane_core.errors import DataError

NOTHING_THERE = frozenset({"no_vector", "no_category", "no_id", "repeated_id", "joined_id"})
"""Reasons of rows that are sound and have nothing to write."""
FEATURES = "features."
"""Beginning of the names of the sections of modalities."""
SECTIONS = {"reviews": "interactions", "log": "interactions", "metadata": "items", "catalog": "items"}
"""Tables of other formats to the sections of a mapping that would read them."""
MOST_EXAMPLES = 3
MEANINGS = {
    "repeated_id": ", the first row of an item counts",
    "joined_id": ", the words of all rows of an item count",
}
"""Reason to what becomes of rows whose item an earlier row has."""
MOST_CHARACTERS = 60
OTHERS = "take it out of {}.files if there are others"
_FIELD = "a field within an object is named with a dot, as in user.id"
_ID = f"name in {{0}}.columns a column of text or of exact whole numbers; {_FIELD}; a list needs a row for each member"
_NUMBER = (
    "name a word that stands for no value in {0}.missing, or set {0}.decimal: ',' for numbers such as 1,5, or "
    "{0}.thousands to what separates thousands, as in 1,500.0 or 1.500,0"
)
_FIELDS = (
    "set {0}.separator, or {0}.quote to the quote of the file or to none, or name in the first line a column for each "
    "value"
)
_COMMON = {"bad_user_id": _ID, "bad_item_id": _ID, "wrong_fields": _FIELDS}
LOG_HINTS = {
    **_COMMON,
    "bad_weight": _NUMBER,
    "bad_event_time": "name in {0}.columns the column of the times, and in {0}.time how they are written, all of them "
    "alike: iso, s, ms, us, ns or a format such as '%d.%m.%Y %H:%M'; or name a word that stands for no time in "
    "{0}.missing",
    "bad_label": "say in {0}.labels what each word means, for example {{learn: 0, check: 1, judge: 2}}",
    "bad_event_type": "name in {0}.columns a column of words or of whole numbers, or take event_type out of it; "
    + _FIELD,
}
FEATURE_HINTS = {
    **_COMMON,
    "bad_vector": "name in {0}.columns a column of lists of finite numbers, as Parquet and JSON have them, or, with "
    "{0}.kind: numbers, a column for each number",
    "bad_number_": _NUMBER,
    "bad_category_": f"name in {{0}}.columns a column of words, or of lists of words; {_FIELD}",
}
ITEM_HINTS = {
    **_COMMON,
    "bad_title": f"name in {{0}}.columns a column of text, or of lists of text; {_FIELD}",
    "bad_": f"say in {{0}}.types what the column holds, text, number, time or flag, and in {{0}}.time how times are "
    f"written; or {_NUMBER}; or take the column out of {{0}}.columns; {_FIELD}",
}
"""Remedies by reason; one that ends in `_` is for the reasons that begin so and have none of their own."""
_GO_ON, _LIKE_ROWS = "lines within quotes", "lines within quotes that look like rows"
_UNREADABLE = "\\udc"
"""A byte that is none of the encoding, as `repr` shows it."""


@dataclass
class Account:
    """Counts of one section of an import, for example of the interactions.

    Attributes:
        name: of the section, as the mapping has it.
        max_set_aside: share of the rows that may be set aside.
        settings: whether the section has settings that a remedy can name.
        lines: lines of text files.
        headers, blank, continued: lines that are a header, that are empty, and that go on with a quoted value.
        like_rows: those of the lines that go on which look like rows of the file.
        is_swallowed: whether a stray quote has surely made lines of them.
        rows: rows, records or objects that the files hold.
        text_rows: those of them that text files hold, each of at least one line.
        written: rows that were written.
        set_aside: reason to the number of rows that were not written.
        noticed: what is odd about rows that were written, with their number.
        examples: reason to the places of its first rows.
        fitting_times: columns of numbers whose times were right in the declared unit.
    """

    name: str
    max_set_aside: float = 0.0
    settings: bool = True
    lines: int = 0
    headers: int = 0
    blank: int = 0
    continued: int = 0
    like_rows: int = 0
    is_swallowed: bool = False
    rows: int = 0
    text_rows: int = 0
    written: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    fitting_times: set[str | int] = field(default_factory=set)

    def drop(self, reason: str, place: str, count: int = 1) -> None:
        """Count rows that are not written."""
        self._count(self.set_aside, reason, place, count)

    def notice(self, what: str, place: str, count: int = 1) -> None:
        """Count rows that are written although something about them is odd."""
        self._count(self.noticed, what, place, count)

    def deliver_again(self, what: str) -> str:
        """Return the remedy for an empty file, which should hold `what`."""
        return one_of([f"deliver the file again with {what}", *([self.way(OTHERS)] if self.settings else [])])

    def go_on(self, place: str, lines: int, alike: int, is_sure: bool) -> None:
        """Count further lines of a quoted value.

        Args:
            place: file and lines of the record.
            lines: its lines without the first.
            alike: those of them that look like rows of the file; where they are most, all count.
            is_sure: whether they cannot be text.
        """
        is_like_rows = 2 * alike > lines
        self.continued += lines
        self.like_rows += lines if is_like_rows else 0
        self.is_swallowed |= is_sure
        self._show(_LIKE_ROWS if is_like_rows else _GO_ON, place)

    def way(self, text: str) -> str:
        """Return a remedy that changes the section in the mapping; where the format has none, by way of a mapping.

        Args:
            text: with `{}` for the section, as in `set {}.time: ms`; without it, what to do with the files.
        """
        told = text.format(self.name if self.settings else SECTIONS.get(self.name, self.name))
        if self.settings or told == text:
            return told
        return f"import it with crane import mapped, and {told} in its mapping"

    def _count(self, counter: Counter[str], what: str, place: str, count: int) -> None:
        counter[what] += count
        self._show(what, place)

    def _show(self, what: str, place: str) -> None:
        places = self.examples.setdefault(what, [])
        if len(places) < MOST_EXAMPLES:
            places.append(place)

    def settle(self) -> None:
        """Check that everything read is accounted for, and that not too much is set aside.

        Raises:
            DataError: the counts do not add up, or more than `max_set_aside` of the rows do not fit.
        """
        accounted = self.written + self.set_aside.total()
        held = self.headers + self.blank + self.continued + self.text_rows
        if self.rows != accounted or self.lines != held:
            raise DataError(
                f"{self.name}: {self.rows} rows read, {self.written} written and {self.set_aside.total()} set aside; "
                f"{self.lines} lines read, {held} accounted for. The import would lose rows, so it has stopped.",
                "This is a defect of the importer: report it with these numbers. Nothing was written.",
            )
        self.check_share()

    def check_share(self) -> None:
        """Check that there are rows, that no quote has swallowed rows, and that not too much is set aside.

        Raises:
            DataError: there is no row, lines within quotes look like rows, or more than `max_set_aside` of the
                rows do not fit.
        """
        if not self.rows:
            is_optional = self.settings and (self.name == "items" or self.name.startswith(FEATURES))
            left_out = f", or leave {self.name} out of the mapping" if is_optional else ""
            raise DataError(f"{self.name}: the files hold 0 rows.", f"Deliver them again with rows{left_out}.")
        if self.is_swallowed or 2 * self.like_rows > self.continued:
            raise DataError(
                f"{self.name}: {self.like_rows} of {self.continued} lines within quotes look like rows of the file, "
                f"beside {self.rows} rows: a stray quote has swallowed them ({', '.join(self.examples[_LIKE_ROWS])}).",
                one_of(
                    [
                        "close, double or remove the quote in the first of these lines",
                        self.way("set {}.quote: none if quotes are ordinary characters"),
                        self.way("set {}.multiline: true if these lines are text of one value"),
                    ]
                ),
            )
        aside = sum(count for reason, count in self.set_aside.items() if reason not in NOTHING_THERE)
        if aside > self.max_set_aside * self.rows:
            raise DataError(f"{self.name}: {aside} of {self.rows} rows do not fit: {self.told()}.", self._remedy(aside))

    def told(self) -> str:
        """Return each reason with its count and its first places."""
        return "; ".join(f"{reason} {count}{self._where(reason)}" for reason, count in self.set_aside.items())

    def _where(self, what: str) -> str:
        """Return the first places of a reason in brackets, nothing where none is known."""
        found = [each for each in self.examples[what] if each]
        more = [] if (self.set_aside + self.noticed)[what] <= len(found) else ["..."]
        return f" ({', '.join([*found, *more])})" if found else ""

    def way_out(self) -> str:
        """Return the remedy for rows that do not fit."""
        return one_of(self._ways())

    def _ways(self) -> list[str]:
        hints = [hint for reason in self.set_aside if self.settings for hint in self._hints(reason)]
        return ["correct these rows", *hints]

    def _remedy(self, aside: int) -> str:
        ways = self._ways()
        share = math.ceil(10_000 * aside / self.rows) / 10_000
        if aside < self.rows:
            ways.append(self.way(f"set {{}}.max_set_aside: {share:g} to leave them out and count them"))
        return one_of(ways)

    def _hints(self, reason: str) -> list[str]:
        if any(_UNREADABLE in each for each in self.examples[reason]):
            return [self.way("set {0}.encoding to that of the file, such as cp1252")]
        hints = ITEM_HINTS if self.name == "items" else FEATURE_HINTS if self.name.startswith(FEATURES) else LOG_HINTS
        found = [key for key in hints if reason == key or (key.endswith("_") and reason.startswith(key))]
        return [self.way(hints[max(found, key=len)])] if found else []

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        counts: dict[str, Any] = {"rows": self.rows, "written": self.written, "set_aside": dict(self.set_aside)}
        if self.lines:
            counts = {"lines": self.lines, **counts}
            parts = {"headers": self.headers, "blank": self.blank, "continued": self.continued}
            parts |= {"like_rows": self.like_rows}
            counts |= {name: count for name, count in parts.items() if count}
        return counts

    def notes(self) -> list[str]:
        """Return what is odd, and what was set aside, as sentences."""
        odd = [f"{self.name}: {count} rows {what}{self._where(what)}" for what, count in self.noticed.items()]
        left = [
            f"{self.name}: {n} rows set aside, {why}{MEANINGS.get(why, '')}{self._where(why)}"
            for why, n in self.set_aside.items()
        ]
        if self.continued:
            shown = [*self.examples.get(_LIKE_ROWS, []), *self.examples.get(_GO_ON, [])][:MOST_EXAMPLES]
            alike = f", {self.like_rows} of which look like rows of the file" if self.like_rows else ""
            more = f"quoted values go on over {self.continued} further lines{alike}"
            odd.append(f"{self.name}: {more} ({', '.join(shown)})")
        return odd + left


def place(path: Path, line: int, column: str, value: Any, unit: str = "line") -> str:
    """Return where a value is, and the value."""
    text = repr(str(value)) if not isinstance(value, str) else repr(value)
    shown = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."
    return f"{path} {unit} {line}" + (f", column {column!r}: {shown}" if column else f": {shown}")


def one_of(ways: Sequence[str]) -> str:
    """Return a remedy that offers several ways, as a sentence."""
    text = "; or ".join(ways)
    return f"{text[0].upper()}{text[1:]}."
