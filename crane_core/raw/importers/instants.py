"""Turn the times of a column into instants, whatever they are written as, and tell numbers of another unit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from numpy.typing import NDArray

from crane_core.raw.importers.cells import MISSING, Cells, Values, ids, numbers, plain_decimals, texts

INSTANT = pa.timestamp("us", "UTC")
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
ISO = "iso"
_EPOCH = datetime(1970, 1, 1)
_MICROSECOND = timedelta(microseconds=1)
FIRST, LAST = ((each - _EPOCH) // _MICROSECOND for each in (datetime(1, 1, 2), datetime(9999, 12, 30)))
"""Instants that have a date in every time zone, microseconds since 1970."""
_LOOSE = re.compile(
    r"(\d{4})[-/.](\d\d?)[-/.](\d\d?)(?:[T ]+(\d\d?:\d\d(?::\d\d)?)(?:[.,](\d+))?)?\s*(Z|UTC|GMT|[+-]\d\d(?::?\d\d)?)?",
    re.IGNORECASE,
)
_POINT_ZERO = re.compile(r"^(\d+)\.0+$")
_NUMBER = r"^\s*[+-]?\d+(\.\d*)?([eE][+-]?\d+)?\s*$"


@dataclass(frozen=True)
class Clock:
    """How the times of a section are to be read.

    Attributes:
        time: `iso`, a unit of `PER_SECOND`, or a format of `datetime.strptime`.
        zone: of times without one.
        first_year: first year that is taken for right.
        now: instants a day and more after it are taken for wrong.
        decimal, thousands: separators of times that are numbers.
    """

    time: str = ISO
    zone: str = "UTC"
    first_year: int = 1990
    now: datetime = datetime.max
    decimal: str = "."
    thousands: str | None = None

    @property
    def first(self) -> int:
        """First instant that is taken for right, microseconds since 1970."""
        return (datetime(self.first_year, 1, 1) - _EPOCH) // _MICROSECOND

    @property
    def last(self) -> int:
        """Last instant that is taken for right, microseconds since 1970."""
        return (self.now.replace(tzinfo=None) - _EPOCH) // _MICROSECOND + 86_400_000_000

    def unit_that_fits(self, values: NDArray[np.float64]) -> str | None:
        """Return the unit in which most numbers lie in years that are taken for right; None if there is none."""
        shares = {unit: self._share(values * (1e6 / rate)) for unit, rate in PER_SECOND.items()}
        best = max(shares, key=lambda unit: shares[unit])
        return best if shares[best] > 0.5 else None

    def fits(self, values: NDArray[np.float64]) -> bool:
        """Return whether at least half of the numbers lie in such years in the unit that is declared."""
        return self.time in PER_SECOND and self._share(values * (1e6 / PER_SECOND[self.time])) >= 0.5

    def of_another_unit(self, micros: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which numbers, as instants of the declared unit, are wrong and would be right in another one."""
        fits = np.zeros(len(micros), bool)
        odd = (micros < self.first) | (micros > self.last)
        for rate in PER_SECOND.values() if odd.any() else ():
            other = micros * (PER_SECOND[self.time] / rate)
            fits |= (other >= self.first) & (other <= self.last)
        return odd & fits

    def _share(self, micros: NDArray[np.float64]) -> float:
        return float(np.mean((micros >= self.first) & (micros <= self.last)))


def plain_numbers(values: Values, clock: Clock) -> NDArray[np.float64]:
    """Return the values of a column that are numbers and no times by their type."""
    if isinstance(values, pa.Array) and (pt.is_temporal(values.type) or pt.is_duration(values.type)):
        return np.empty(0)
    text = isinstance(values, list) or pt.is_string(values.type) or pt.is_binary(values.type)
    if text:
        found, _ = plain_decimals(texts(values, clock.decimal).values, clock.decimal, clock.thousands)
        values = pc.if_else(pc.match_substring_regex(found, _NUMBER), found, pa.scalar(None, pa.string()))
    return numbers(values).values.drop_null().to_numpy()


def instants(values: Values, clock: Clock, missing: Sequence[str] = MISSING) -> Cells:
    """Return the times of a column as instants in UTC, microseconds. Bad is what is none, or not within FIRST to LAST.

    A column of timestamps or dates is taken for what it is, whatever `clock.time` says.
    """
    if isinstance(values, pa.Array) and pt.is_timestamp(values.type):
        return _stamps(values, clock.zone)
    if isinstance(values, pa.Array) and pt.is_date(values.type):
        return _stamps(values.cast(pa.timestamp("s")), clock.zone)
    is_format = "%" in clock.time
    if isinstance(values, pa.Array) and not (is_format or pt.is_string(values.type) or pt.is_binary(values.type)):
        return _numeric(values, clock)
    # Whole numbers such as 20230101 become text for a format.
    read = ids(values) if is_format else texts(values, clock.decimal)
    text = read.values
    gone = pc.is_in(pc.utf8_trim_whitespace(text), pa.array(sorted({"", *missing}), pa.string()))
    text = pc.if_else(gone, pa.scalar(None, pa.string()), text)
    if clock.time not in PER_SECOND:
        found = _written(text, clock)
        return Cells(found.values, found.bad | read.bad)
    # Counts such as 1433221332.0 may have a point beside decimal commas: their years tell whether they are right.
    text, _ = plain_decimals(text, clock.decimal, clock.thousands)
    found = _counted(text, clock)
    return Cells(found.values, found.bad | read.bad)


def _stamps(values: pa.Array, zone: str) -> Cells:
    """Return timestamps of any unit, with a zone or without, as instants."""
    unit, aware = values.type.unit, values.type.tz is not None
    rate = PER_SECOND[unit]
    counts = values.cast(pa.timestamp(unit, "UTC") if aware else pa.timestamp(unit)).cast(pa.int64())
    number = pc.fill_null(counts, 0).to_numpy()
    low, high = (bound * rate // 10**6 if rate < 10**9 else None for bound in (FIRST, LAST))
    inside = np.ones(len(number), bool) if low is None or high is None else (number > low) & (number < high)
    micros = np.where(inside, number, 0)
    micros = micros * (10**6 // rate) if rate <= 10**6 else micros // 1000
    return _placed(micros, ~inside, values.is_valid(), None if aware else zone)


def _numeric(values: pa.Array, clock: Clock) -> Cells:
    """Return a column of numbers as instants, counted in the unit of the clock."""
    if clock.time not in PER_SECOND or not (
        pt.is_integer(values.type)
        or pt.is_floating(values.type)
        or pt.is_decimal(values.type)
        or pt.is_null(values.type)
    ):
        return Cells(pa.nulls(len(values), INSTANT), _valid(values))
    if pt.is_integer(values.type):
        return _counted(ids(values).values, clock)
    found = numbers(values)
    valid = found.values.is_valid()
    exact = pc.fill_null(found.values, 0.0).to_numpy(zero_copy_only=False) * (1e6 / PER_SECOND[clock.time])
    inside = (exact >= FIRST) & (exact <= LAST)
    micros = np.rint(np.where(inside, exact, 0)).astype(np.int64)
    placed = _placed(micros, ~inside | clock.of_another_unit(micros), valid, None)
    return Cells(placed.values, placed.bad | found.bad)


def _counted(text: pa.Array, clock: Clock) -> Cells:
    """Return numbers in decimal text, counted since 1970 in the unit of the clock, as instants."""
    rate = PER_SECOND[clock.time]
    micros, outside = np.zeros(len(text), np.int64), np.zeros(len(text), bool)
    matched = pc.fill_null(pc.match_substring_regex(text, _NUMBER), False).to_pylist()
    for row, (value, fits) in enumerate(zip(text.to_pylist(), matched, strict=True)):
        if value is None:
            continue
        number: int | None = None
        if fits and len(value) < 40:
            number = _micros(value, rate)
        if number is not None and FIRST <= number <= LAST:
            micros[row] = number
        else:
            outside[row] = True
    return _placed(micros, outside | clock.of_another_unit(micros), text.is_valid(), None)


def _micros(value: str, rate: int) -> int | None:
    """Return a number in decimal text as microseconds; None where it is larger than any instant."""
    try:
        return int(value) * 10**6 // rate
    except ValueError:
        pass
    try:
        exact = Decimal(value)
        return round(exact * 10**6 / rate) if abs(exact.adjusted()) < 20 else None
    except ArithmeticError:
        return None


def _written(text: pa.Array, clock: Clock) -> Cells:
    """Return times in ISO 8601, or in the format of the clock, as instants."""
    size = len(text)
    micros, bad, local = np.zeros(size, np.int64), np.zeros(size, bool), np.zeros(size, bool)
    for row, value in enumerate(text.to_pylist()):
        if value is None:
            continue
        try:
            time = _iso(value.strip()) if clock.time == ISO else _formatted(value.strip(), clock.time)
            local[row] = time.tzinfo is None
            if not local[row]:
                time = time.astimezone(UTC).replace(tzinfo=None)
            micros[row] = (time - _EPOCH) // _MICROSECOND
            bad[row] = not FIRST <= micros[row] <= LAST
        except (ValueError, OverflowError):
            bad[row] = True
    exact = _placed(micros, bad | local, text.is_valid(), None)
    zoned = _placed(micros, bad | ~local, text.is_valid(), clock.zone)
    return Cells(pc.coalesce(exact.values, zoned.values), bad)


def _formatted(value: str, form: str) -> datetime:
    """Return a time of a format; a whole number such as `20230101.0` is read without its end.

    Raises:
        ValueError: it is none.
    """
    return datetime.strptime(_POINT_ZERO.sub(r"\1", value), form)


def _iso(value: str) -> datetime:
    """Return a time in ISO 8601, or near it: slashes, ` UTC`, hours of an offset alone.

    Raises:
        ValueError: it is none. A bare number is none either: `20190101` may be a date or a count of seconds.
    """
    if value.isdigit():
        raise ValueError(value)
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        found = _LOOSE.fullmatch(value)
        if not found:
            raise
    year, month, day, clock, fraction, zone = found.groups()
    clock = clock or "00:00"
    clock = clock if clock.index(":") == 2 else f"0{clock}"
    clock = f"{clock}:00" if len(clock) == 5 else clock
    zone = "" if zone is None else "+00:00" if zone[0] not in "+-" else zone
    zone = f"{zone}:00" if len(zone) == 3 else zone
    return datetime.fromisoformat(f"{year}-{int(month):02}-{int(day):02}T{clock}.{(fraction or '0')[:6]:0<6}{zone}")


def _placed(micros: NDArray[np.int64], bad: NDArray[np.bool_], valid: pa.Array, zone: str | None) -> Cells:
    """Return counts of microseconds as instants; as times of a zone's clocks where a zone is given."""
    bad = bad & valid.to_numpy(zero_copy_only=False)
    there = pc.and_(valid, pa.array(~bad))
    stamps = pc.if_else(there, pa.array(micros), pa.scalar(None, pa.int64()))
    if zone is None:
        return Cells(stamps.cast(INSTANT), bad)
    # A time that the clocks leave out becomes the first one after it: a date without a midnight stays on its day.
    local = pc.assume_timezone(stamps.cast(pa.timestamp("us")), zone, ambiguous="earliest", nonexistent="latest")
    return Cells(local.cast(INSTANT), bad)


def _valid(values: pa.Array) -> NDArray[np.bool_]:
    found: Any = values.is_valid().to_numpy(zero_copy_only=False)
    return found.astype(bool)
