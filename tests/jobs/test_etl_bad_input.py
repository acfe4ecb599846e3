"""Two hundred generated bad inputs: each ends in a typed error or is counted in quarantine, to the row.

A plain reference in Python tells the expected reason of each row. Files that the checks let through are read by one run
of the job together, so that Spark starts its work once and not two hundred times.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from crane_core.config import Etl, RunConfig
from crane_core.config_file import load_config
from crane_core.errors import EXIT_DATA, EXIT_OK, DataError
from crane_core.raw.checks import check_interactions
from crane_core.raw.files import list_interactions
from jobs.etl import interactions
from jobs.stores import open_store
from tests.worlds.raw_data import write_items

FIRST, LAST, END = date(2026, 1, 5), date(2026, 1, 18), date(2026, 1, 19)
SETTINGS = {
    "window.start": "2026-01-18",
    "window.end": "2026-01-19",
    "etl.validation_days": "2",
    "etl.test_days": "2",
    "etl.lookback_days": "3",
    "etl.max_quarantine_share": "1",
    "etl.min_weight": "0.01",
    "etl.event_weights": "{view: 1, buy: 4, look: 0.5}",
}
IDS = st.one_of(
    st.sampled_from(["a", "b", "c", "d", "", " ", "\t", "\x00", "\u00a0", "ä", "x" * 300, "null", "NaN", "-1", None]),
    st.sampled_from(["a", "b", "c"]),
    st.text(max_size=4),
)
MIDNIGHT = datetime(2026, 1, 18, tzinfo=UTC)
TIMES = st.one_of(
    st.none(),
    st.integers(-20 * 86_400, 3 * 86_400).map(lambda second: MIDNIGHT + timedelta(seconds=second)),
    st.sampled_from([MIDNIGHT + timedelta(days=n, microseconds=m) for n in (-3, -2, 0, 1) for m in (-1, 0, 1)]),
    st.sampled_from(
        [datetime(1, 1, 2, tzinfo=UTC), datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)]
    ),
)
WEIGHTS = st.one_of(
    st.none(), st.sampled_from([0.0, -0.0, 1.0, 2.5, 0.001, -1.0, math.nan, math.inf, -math.inf, 3e38, 1e-40])
)
LABELS = st.one_of(st.none(), st.integers(-3, 120))
TYPES = st.sampled_from([None, "view", "buy", "look", "VIEW", "hack", ""])
ROWS = st.lists(st.tuples(IDS, IDS, TIMES, WEIGHTS, LABELS, TYPES), min_size=0, max_size=8)
COLUMNS = ("user_id", "item_id", "event_time", "weight", "label", "event_type")
KINDS: dict[str, list[pa.DataType]] = {
    "user_id": [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary(), pa.int64()],
    "item_id": [pa.string(), pa.string(), pa.large_string(), pa.float64()],
    "event_time": [
        *(pa.timestamp(unit, zone) for unit in ("us", "ms", "s", "ns") for zone in ("UTC", "Asia/Tokyo")),
        pa.timestamp("us"),
        pa.string(),
        pa.date32(),
    ],
    "weight": [pa.float32(), pa.float32(), pa.float64(), pa.int16(), pa.string(), pa.float16()],
    "label": [pa.int8(), pa.int64(), pa.uint8(), pa.float32(), pa.bool_()],
    "event_type": [pa.string(), pa.string(), pa.large_string(), pa.int32()],
}
SOUND = {name: kinds[0] for name, kinds in KINDS.items()}


DAMAGE = st.tuples(st.floats(0, 1), st.integers(0, 255))
"""Which byte of the file, and its new value."""


@st.composite
def bad_files(draw: st.DrawFn) -> dict[str, Any]:
    """A file: its rows, the day it arrives on, the types it is written with, and what happens to its bytes."""
    kinds = dict(SOUND)
    # Few odd types, or nothing but wrong types would be looked at.
    for name in draw(st.sampled_from([(), (), *((name,) for name in COLUMNS)])):
        kinds[name] = draw(st.sampled_from(KINDS[name]))
    return {
        "rows": draw(ROWS),
        "day": FIRST + timedelta(days=draw(st.integers(0, (LAST - FIRST).days))),
        "kinds": kinds,
        "drop": draw(st.sampled_from([*[()] * 8, *((name,) for name in COLUMNS)])),
        "extra": draw(st.sampled_from([(), (), ("price",), ("dt",), ("USER_ID",), ("reason", "user_key")])),
        "damage": draw(st.sampled_from([False, False, False, False, True])) and draw(DAMAGE),
        "cut": draw(st.sampled_from([*[None] * 17, 0.0, 0.3, 0.99])),
    }


def write(case: dict[str, Any], path: Path) -> None:
    columns: dict[str, pa.Array] = {}
    for index, name in enumerate(COLUMNS):
        if name not in case["drop"]:
            columns[name] = _column([row[index] for row in case["rows"]], case["kinds"][name])
    for name in case["extra"]:
        columns.setdefault(name, pa.array(["?"] * len(case["rows"]), pa.string()))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=3)
    data = bytearray(path.read_bytes())
    if case["damage"]:
        where, value = case["damage"]
        data[int(where * (len(data) - 1))] = value
    if case["cut"] is not None:
        data = data[: int(case["cut"] * len(data))]
    path.write_bytes(data)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, pa.from_numpy_dtype("float32") if kind == pa.float16() else kind).cast(kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        # What does not fit the type is null; a column that does not fit at all becomes that type's nulls.
        return pa.array([_fitting(value, kind) for value in values], kind)


def _fitting(value: Any, kind: pa.DataType) -> Any:
    try:
        pa.array([value], kind)
        return value
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None


def expected_reason(row: dict[str, Any], day: date, etl: Etl, end: datetime) -> str | None:
    """What must become of a row, read once more from the description of the raw data."""
    users = (row["user_id"], row["item_id"])
    weight, micros = row["weight"], row["event_time"]
    arrival = _micros(datetime(day.year, day.month, day.day, tzinfo=UTC))
    if None in users:
        return "null_id"
    if any(not name.strip(" ") for name in users):
        return "empty_id"
    if micros is None:
        return "null_event_time"
    if weight is not None and not math.isfinite(weight):
        return "non_finite_weight"
    if weight is not None and weight < 0:
        return "negative_weight"
    if row["event_type"] is not None and row["event_type"] not in etl.event_weights:
        return "unknown_event_type"
    if micros >= _micros(end):
        return "after_cutoff"
    if micros >= arrival + 86_400_000_000:
        return "after_arrival"
    if micros < arrival - etl.lookback_days * 86_400_000_000:
        return "too_late"
    if counted(row, etl) < etl.min_weight:
        return "below_min_weight"
    return None


def counted(row: dict[str, Any], etl: Etl) -> float:
    return (1.0 if row["weight"] is None else row["weight"]) * etl.event_weights.get(row["event_type"], 1.0)


def _micros(instant: datetime) -> int:
    return round((instant - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1))


def plain_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file as Python values; times as microseconds, absent columns as None."""
    table = pq.read_table(path, partitioning=None)
    columns: dict[str, list[Any]] = {}
    for name in COLUMNS:
        if name not in table.column_names:
            columns[name] = [None] * table.num_rows
        elif name == "event_time":
            unit = table[name].type.unit
            factor = {"s": 1_000_000, "ms": 1000, "us": 1, "ns": 1}[unit]
            values = table[name].cast(pa.int64()).to_pylist()
            columns[name] = [
                None if value is None else value // 1000 if unit == "ns" else value * factor for value in values
            ]
        elif name == "weight":
            columns[name] = table[name].cast(pa.float32()).to_pylist()
        else:
            columns[name] = table[name].to_pylist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def expected_counts(files: list[Path], config: RunConfig) -> Counter[str]:
    """Rows by reason, kept rows under `kept`."""
    counts: Counter[str] = Counter()
    pairs: dict[tuple[str, str], list[int]] = {}
    for path in files:
        day = date.fromisoformat(path.parent.name.removeprefix("dt="))
        for row in plain_rows(path):
            reason = expected_reason(row, day, config.etl, config.window.end)
            if reason is None:
                pairs.setdefault((row["user_id"], row["item_id"]), []).append(row["event_time"])
            else:
                counts[reason] += 1
    for times in pairs.values():
        times.sort()
        counts["kept"] += 1
        for before, after in itertools.pairwise(times):
            counts["duplicate" if before == after else "repeat"] += 1
    return counts


def run(raw: Path, store: Path, *more: str) -> int:
    flags = [flag for key, value in SETTINGS.items() for flag in ("--set", f"{key}={value}")]
    flags += ["--set", f"runtime.raw={raw}", *more]
    return interactions.main(["--store", str(store), "--run", "r", *flags])


@pytest.mark.spark
def test_every_bad_input_is_an_error_or_counted(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, aside = tmp_path / "raw", tmp_path / "aside"
    config = load_config(None, [f"{key}={value}" for key, value in SETTINGS.items()])
    good = {
        "rows": [(user, item, MIDNIGHT - timedelta(days=9), 1.0, 0, "view") for user in "abcd" for item in "abcd"],
        "day": date(2026, 1, 9),
        "kinds": SOUND,
        "drop": (),
        "extra": (),
        "damage": None,
        "cut": None,
    }
    write(good, raw / "interactions" / "dt=2026-01-09" / "good.parquet")
    write({**good, "rows": [("a", "b", MIDNIGHT, 1.0, 0, "view")]}, raw / "interactions/dt=2026-01-18/good.parquet")
    write_items(raw, [("a", "A")])
    outcome: Counter[str] = Counter()

    @settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(bad_files())
    def examine(case: dict[str, Any]) -> None:
        outcome["files"] += 1
        path = aside / "interactions" / f"dt={case['day']}" / f"{outcome['files']}.parquet"
        write(case, path)
        size, name = path.stat().st_size, path.relative_to(aside)
        try:
            # The window is not empty: what is wrong must be wrong with the file.
            files = list_interactions(aside, config.window.model_copy(update={"start": FIRST_INSTANT}), config.etl)
            footers = check_interactions(files, config.window.model_copy(update={"start": FIRST_INSTANT}), config.etl)
        except DataError as error:
            assert error.remedy and (str(path) in error.found or "window" in error.found), error
            outcome["refused"] += 1
            path.unlink()
            return
        assert footers[0].file.size == size
        try:
            plain_rows(path)
        except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError, AttributeError):
            outcome["damaged"] += 1
            (tmp_path / "damaged" / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(tmp_path / "damaged" / name)
            return
        outcome["accepted"] += 1
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        path.rename(raw / name)

    examine()
    assert outcome["files"] >= 200 and min(outcome["refused"], outcome["accepted"]) > 50, outcome
    files = sorted(raw.glob("interactions/*/*.parquet"))
    expected = expected_counts(files, config)
    assert len(expected) > 10, expected
    code = run(raw, tmp_path / "store")
    assert code == EXIT_OK, capsys.readouterr().err
    facts = open_store(str(tmp_path / "store")).artifact("r", "etl.interactions").facts
    kept = sum(facts[name] for name in ("num_train", "num_validation", "num_test", "num_cold_rows"))
    assert {**facts["quarantine"], "kept": kept} == dict(expected)
    assert facts["num_rows_read"] == sum(expected.values()) == kept + sum(facts["quarantine"].values())


FIRST_INSTANT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.spark
def test_bytes_that_are_no_text_are_set_aside(spark: SparkSession, tmp_path: Path) -> None:
    """And what is set aside can be read."""
    raw = tmp_path / "raw"
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\x02\0\0\0\x03\0\0\0"), pa.py_buffer(b"\xff\xfea"))
    times = pa.array([MIDNIGHT - timedelta(days=9)] * 2, pa.timestamp("us", "UTC"))
    folder = raw / "interactions" / "dt=2026-01-09"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"user_id": broken, "item_id": ["x", "y"], "event_time": times}), folder / "a.parquet")
    assert run(raw, tmp_path / "store", "--set", "window.start=2026-01-09") == EXIT_OK
    found = open_store(str(tmp_path / "store")).artifact("r", "etl.interactions")
    assert found.facts["quarantine"] == {"invalid_utf8": 1}
    assert pq.read_table(found.path / "quarantine")["user_id"].to_pylist() == ["\ufffd\ufffd"]


@pytest.mark.spark
def test_a_page_of_garbage_names_its_file(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    rows = [("a", f"i{n}", MIDNIGHT - timedelta(days=9), 1.0, 0, "view") for n in range(200)]
    case = {"rows": rows, "kinds": SOUND, "drop": (), "extra": (), "damage": None, "cut": None}
    path = raw / "interactions" / "dt=2026-01-18" / "a.parquet"
    write(case, path)
    data = bytearray(path.read_bytes())
    data[8:200] = bytes(192)
    path.write_bytes(data)
    assert run(raw, tmp_path / "store") == EXIT_DATA
    assert str(path) in capsys.readouterr().err
