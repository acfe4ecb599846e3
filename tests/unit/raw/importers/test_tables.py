"""Chunks become batches of the raw layout, rows that do not fit are counted, and logs are written by day."""

from __future__ import annotations

import subprocess
import sys
from datetime import date, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from crane_core.raw.importers import cells
from crane_core.raw.importers.account import Account
from crane_core.raw.importers.instants import Clock
from crane_core.raw.importers.layout import Chunk
from crane_core.raw.importers.tables import LogCounts, Wanted, fitting, write_log
from tests.worlds.raw_data import at
from tests.worlds.sources import table

CLOCK = Clock(now=datetime(2026, 6, 1))


def batch(users: list[str | None], items: list[str | None], times: list[datetime | None]) -> pa.RecordBatch:
    return pa.record_batch(
        {
            "user_id": pa.array(users, pa.string()),
            "item_id": pa.array(items, pa.string()),
            "event_time": pa.array(times, pa.timestamp("us", "UTC")),
        }
    )


def test_a_log_is_counted_while_it_is_written(tmp_path: Path) -> None:
    counts = LogCounts(CLOCK, Account("interactions"))
    batches = [
        batch(["a", "", "b"], ["x", "y", "x"], [at("2026-01-06 23:59"), at("2026-01-05"), None]),
        batch(["a", None], ["z", ""], [at("2026-01-04"), at("2026-01-05")]),
    ]
    assert write_log(tmp_path, counts.counted(iter(batches))) == counts.num_rows == 5
    assert (counts.users, counts.items) == ({"a", "b"}, {"x", "y", "z"})
    assert counts.window() == (date(2026, 1, 6), date(2026, 1, 7))
    days = {path.name: table(tmp_path, f"interactions/{path.name}") for path in (tmp_path / "interactions").iterdir()}
    assert {name: rows.num_rows for name, rows in days.items()} == {
        "dt=1970-01-01": 1,
        "dt=2026-01-04": 1,
        "dt=2026-01-05": 2,
        "dt=2026-01-06": 1,
    }


@pytest.mark.parametrize(
    ("zone", "day"), [("UTC", "2026-01-05"), ("Asia/Tokyo", "2026-01-06"), ("America/New_York", "2026-01-05")]
)
def test_midnights_of_a_zone_cut_the_days(tmp_path: Path, zone: str, day: str) -> None:
    assert write_log(tmp_path, iter([batch(["a"], ["x"], [at("2026-01-05 22:00")])]), zone) == 1
    assert [path.name for path in (tmp_path / "interactions").iterdir()] == [f"dt={day}"]


FAILING = """
import pathlib, sys, tempfile
from crane_core.raw.importers.tables import write_log
def batches():
    raise ValueError("planted")
    yield
with tempfile.TemporaryDirectory() as folder:
    try:
        write_log(pathlib.Path(folder), batches())
    except ValueError:
        sys.exit(3)
"""


@pytest.mark.slow
def test_a_log_that_cannot_be_read_ends_the_process_with_its_own_exit_code() -> None:
    """An exception that passed through the writer of Arrow aborted about every fourth process at its exit."""
    codes = [subprocess.run([sys.executable, "-c", FAILING], stderr=subprocess.DEVNULL).returncode for _ in range(8)]
    assert codes == [3] * 8


def test_times_that_no_shop_has_do_not_move_the_window() -> None:
    counts = LogCounts(CLOCK, Account("interactions"))
    times = [at("0001-01-05"), at("1970-01-01"), at("2026-01-05"), at("2099-01-01")]
    list(counts.counted(iter([batch(["a"] * 4, ["x"] * 4, times)])))
    assert counts.window() == (date(2026, 1, 5), date(2026, 1, 6))


def test_rows_that_do_not_fit_are_set_aside_for_their_first_bad_value() -> None:
    account = Account("interactions")
    columns = {"w": ["1", "x", "2", "y"], "l": ["train", "?", "?", "test"]}
    wanted = {
        "weight": Wanted("w", cells.weights),
        "label": Wanted("l", lambda values: cells.words(values, cells.LABELS, pa.int8())),
    }
    found = fitting(Chunk(Path("ev.csv"), columns, [2, 3, 4, 5]), wanted, account)
    assert found.to_pylist() == [{"weight": 1.0, "label": 0}]
    assert account.set_aside == {"bad_weight": 2, "bad_label": 1}
    assert account.examples["bad_label"] == ["ev.csv line 4, column 'l': '?'"]


def test_negative_weights_are_named() -> None:
    account = Account("interactions")
    fitting(Chunk(Path("ev.csv"), {"w": ["1", "-1", "-0"]}, [2, 3, 4]), {"weight": Wanted("w", cells.weights)}, account)
    assert account.noticed == {"with a negative weight, which the ETL will set aside": 1}
