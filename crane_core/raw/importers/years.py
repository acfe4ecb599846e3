"""Tell times by the years they give: numbers in another unit stop the import, times that no shop has are named."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from crane_core.errors import DataError
from crane_core.raw.importers.account import Account, one_of
from crane_core.raw.importers.instants import INSTANT, ISO, LAST, PER_SECOND, Clock, plain_numbers
from crane_core.raw.importers.layout import Chunk

FORMATS = {"%Y%m%d": 8, "%Y%m%d%H%M": 12, "%Y%m%d%H%M%S": 14}
"""Formats of times that look like numbers, and their digits."""
EXCEL_DAYS = (20_000, 80_000)
"""Days since 1899-12-30, as spreadsheets count them: the years 1954 to 2119."""


def check_clock(chunk: Chunk, column: str | int, clock: Clock, account: Account) -> None:
    """Stop where the numbers of a column are times in another unit than the clock has.

    Raises:
        DataError: most of them lie before `first_year` or in the future.
    """
    found = plain_numbers(chunk.columns[column], clock)
    if 2 * len(found) <= len(chunk) or "%" in clock.time:
        return
    if clock.fits(found):
        account.fitting_times.add(column)
        return
    unit = clock.unit_that_fits(found)
    fits = f"as {unit} they are times of {clock.first_year} to today" if unit else "no unit fits"
    raise DataError(
        f"{chunk.path}: the {len(found)} numbers of {chunk.unit}s {chunk.lines[0]} to {chunk.lines[-1]} are no times "
        f"of the format {clock.time}; {fits} ({chunk.place(0, column)}).",
        one_of([account.way(way) for way in _ways(found, unit, clock, column in account.fitting_times)]),
    )


def _ways(found: NDArray[np.float64], unit: str | None, clock: Clock, others_fit: bool) -> Iterator[str]:
    """Yield remedies for numbers that do not fit; `others_fit` tells whether earlier ones of the column did."""
    if unit and others_fit:
        yield f"write the times of all files of {{}} in one unit: those before are {clock.time}, these {unit}"
        return
    if unit:
        yield f"set {{}}.time: {unit}"
        return
    formats = [form for form in FORMATS if _share_of_dates(found, form, clock) > 0.5]
    if formats:
        yield f"set {{}}.time: '{formats[0]}'"
        return
    if np.mean((found >= EXCEL_DAYS[0]) & (found <= EXCEL_DAYS[1])) > 0.5:
        yield "if they are days as a spreadsheet counts them, form the column as dates there and save it again"
    yield "name in {}.columns the column of the times"
    if clock.time == ISO:
        yield "correct them, and set {}.time to s, ms, us or ns if they count those since 1970"
        return
    micros = found * (1e6 / PER_SECOND[clock.time])
    if np.mean(micros > clock.last) >= 0.5:
        yield "correct these times, which lie in the future"
        return
    early = max(1, datetime.fromtimestamp(max(float(micros.min()) / 1e6, -6.2e10)).year - 1)
    yield f"set {{}}.first_year: {min(early, clock.first_year)} if the data are as old as that"


def _share_of_dates(found: NDArray[np.float64], form: str, clock: Clock) -> float:
    """Return the share of numbers that are dates of a format within the years of the clock, of the first thousand."""
    dates = 0
    for number in found[:1000]:
        text = str(int(number)) if abs(number) < 1e15 else ""
        try:
            year = datetime.strptime(text, form).year if len(text) == FORMATS[form] else 0
        except ValueError:
            continue
        dates += clock.first_year <= year <= min(clock.now.year + 1, 9999)
    return dates / len(found[:1000])


def odd_years(values: pa.Array, clock: Clock) -> dict[str, pa.Array]:
    """Return which instants lie before `first_year` and which in the future, each under what it is."""
    micros = values.cast(INSTANT).cast(pa.int64())
    return {
        f"before {clock.first_year}": pc.less(micros, clock.first),
        "in the future": pc.greater(micros, min(clock.last, LAST)),
    }
