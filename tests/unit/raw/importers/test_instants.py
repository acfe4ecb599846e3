"""Times become instants, whatever they are written as."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from crane_core.raw.importers.instants import Clock, instants, plain_numbers
from crane_core.raw.importers.layout import JsonNumber

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def told(values: Any, time: str = "iso", zone: str = "UTC") -> list[Any]:
    """Each instant as text, and `...` for one that does not fit."""
    found = instants(values, Clock(time, zone, now=NOW))
    times = [None if each is None else f"{each:%Y-%m-%d %H:%M:%S.%f}" for each in found.values.to_pylist()]
    return [... if bad else each and each.removesuffix(".000000") for each, bad in zip(times, found.bad, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-05", "2026-01-05 00:00:00"),
        ("2026-01-05T23:30", "2026-01-05 23:30:00"),
        ("2026-01-05 23:30:00.123456789", "2026-01-05 23:30:00.123456"),
        ("2026-01-05 23:30:00,5", "2026-01-05 23:30:00.500000"),
        ("2026-01-05T23:30:00Z", "2026-01-05 23:30:00"),
        ("2026-01-05 23:30:00 UTC", "2026-01-05 23:30:00"),
        ("2026-01-05 23:30:00 gmt", "2026-01-05 23:30:00"),
        ("2026-01-05 23:30:00+0530", "2026-01-05 18:00:00"),
        ("2026-01-05 23:30:00 -08", "2026-01-06 07:30:00"),
        ("2026/1/5 9:30", "2026-01-05 09:30:00"),
        ("  2026-01-05  ", "2026-01-05 00:00:00"),
        ("", None),
        ("NA", None),
        ("2026-02-30", ...),
        ("2026-01-05 25:00", ...),
        ("20260105", ...),
        ("1433221332", ...),
        ("yesterday", ...),
        ("0001-01-01T00:00:00+14:00", ...),
        ("9999-12-31T23:59:59-12:00", ...),
    ],
)
def test_iso_times_and_what_is_near_them(text: str, expected: Any) -> None:
    assert told([text]) == told(pa.array([text])) == [expected]


def test_times_without_a_zone_are_those_of_the_clock() -> None:
    winter, summer, skipped, twice = "2026-01-05 12:00", "2026-07-05 12:00", "2026-03-29 02:30", "2026-10-25 02:30"
    assert told([winter, summer, f"{winter}Z"], zone="Europe/Berlin") == [
        "2026-01-05 11:00:00", "2026-07-05 10:00:00", "2026-01-05 12:00:00"
    ]  # fmt: skip
    assert told([skipped, twice], zone="Europe/Berlin") == ["2026-03-29 01:00:00", "2026-10-25 00:30:00"]
    # The clocks of Brazil left out midnight: the day begins at one.
    for values in (["2018-11-04"], pa.array([date(2018, 11, 4)])):
        assert told(values, zone="America/Sao_Paulo") == ["2018-11-04 03:00:00"]
    for values in (pa.array([date(2026, 1, 5)]), pa.array([datetime(2026, 1, 5)]), ["2026-01-05"]):
        assert told(values, zone="Asia/Tokyo") == ["2026-01-04 15:00:00"]


@pytest.mark.parametrize(
    ("values", "time", "expected"),
    [
        (["1433221332", "1433221332.0", "1433221332.25", "1.433221332e9"], "s", [0, 0, 0.25, 0]),
        (["1433221332117", "1433221332000.5"], "ms", [0.117, 0.0005]),
        (["1433221332000001"], "us", [1e-6]),
        (["1433221332000001999"], "ns", [1e-6]),
        (pa.array([1433221332.25, 1433221332.0]), "s", [0.25, 0]),
        (pa.array([1433221332, None]), "s", [0, None]),
        (["soon", "99999999999999999999", "1e99", "-1e99"], "s", [...] * 4),
        (pa.array([2**62, -(2**62)]), "s", [...] * 2),
        (pa.array([2**64 - 1], pa.uint64()), "ms", [...]),
        (pa.array([1e300, float("nan"), float("inf")]), "s", [..., None, ...]),
        (pa.array([True]), "s", [...]),
    ],
)
def test_numbers_are_counted_since_1970(values: Any, time: str, expected: list[Any]) -> None:
    second = "2015-06-02 05:02:12"
    shown = [f"{second}.{each * 1e6:06.0f}" if each and each is not ... else each for each in expected]
    assert told(values, time) == [second if each == 0 and each is not None else each for each in shown]


def test_a_format_is_read_as_strptime_reads_it() -> None:
    assert told(["05.01.2026 10:00", "5.1.26", "x"], "%d.%m.%Y %H:%M") == ["2026-01-05 10:00:00", ..., ...]
    assert told(["05.01.2026 10:00 +0100"], "%d.%m.%Y %H:%M %z") == ["2026-01-05 09:00:00"]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_of_any_unit_keep_their_instant_and_far_ones_do_not_fit(unit: str) -> None:
    rate = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    values = pa.array([1433221332 * rate, None], pa.int64()).cast(pa.timestamp(unit))
    assert told(values) == ["2015-06-02 05:02:12", None]
    if unit != "ns":
        far = pa.array([2**62, -(2**62)], pa.int64()).cast(pa.timestamp(unit, "UTC"))
        assert told(far) == [..., ...]


@pytest.mark.parametrize(
    ("number", "unit"), [(1.43e9, "s"), (1.43e12, "ms"), (1.43e15, "us"), (1.43e18, "ns"), (2.0e7, None)]
)
def test_the_unit_that_fits_is_told_by_the_years(number: float, unit: str | None) -> None:
    for time in ("s", "ms", "us", "ns"):
        clock = Clock(time, now=NOW)
        assert clock.unit_that_fits(np.array([number, number, 0])) == unit
        assert clock.fits(np.array([number, number, 0])) == (time == unit)


def test_only_numbers_count_as_numbers() -> None:
    clock = Clock("s", decimal=",", thousands=".")
    assert plain_numbers(["1", "2,0", "1.433.221.332,5", "2026-01-05", "x", None], clock).tolist() == [
        1,
        2,
        1433221332.5,
    ]
    assert plain_numbers(pa.array([1, None]), clock).tolist() == [1]
    assert plain_numbers(pa.array([1], pa.timestamp("s")), clock).tolist() == []


@pytest.mark.parametrize(
    "values",
    [
        pa.array([20230102]),
        pa.array([20230102.0]),
        pa.array(["20230102"]),
        [20230102],
        [JsonNumber("20230102.0")],
        ["20230102.0"],
    ],
)
def test_whole_numbers_are_dates_of_a_format(values: Any) -> None:
    found = instants(values, Clock("%Y%m%d"))
    assert not found.bad.any() and found.values[0].as_py() == datetime(2023, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize("kind", ["text", "int", "float"])
@pytest.mark.parametrize(
    ("time", "right", "wrong"), [("ms", 1577836800000, 1577836800), ("s", 1577836800, 1577836800000)]
)
def test_a_number_that_is_a_time_in_another_unit_does_not_fit(kind: str, time: str, right: int, wrong: int) -> None:
    numbers = [right, wrong, 0]
    values = {"text": list(map(str, numbers)), "int": pa.array(numbers), "float": pa.array(numbers, pa.float64())}[kind]
    assert instants(values, Clock(time, now=datetime(2026, 6, 1))).bad.tolist() == [False, True, False]
    if time == "ms":
        assert not instants(values, Clock(time, first_year=1970, now=datetime(2026, 6, 1))).bad.any()


@pytest.mark.parametrize("value", ["1e9999999999", "1e99999999999999999999", "9999999999999999999999", "1e25", "-1e25"])
@pytest.mark.parametrize("unit", ["s", "ns"])
def test_numbers_beyond_any_instant_do_not_fit(value: str, unit: str) -> None:
    found = instants(pa.array([value, "1672531200"]), Clock(unit, "UTC"))
    assert found.bad.tolist()[0] is True and found.values.to_pylist()[0] is None


def test_times_may_have_a_point_beside_decimal_commas() -> None:
    found = instants(["1433221332.0", "1433221332,0", "1.433,5"], Clock("s", decimal=","))
    assert found.bad.tolist() == [False, False, True]
    assert found.values[0] == found.values[1]
