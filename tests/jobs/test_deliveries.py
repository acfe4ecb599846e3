"""Looking for the partitions of a window: what is complete, what lacks, and the deadline."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from crane_core.config_file import load_config
from jobs import deliveries
from tests.worlds.jobs import last_line

MIDNIGHT = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
YESTERDAY, BEFORE = ((MIDNIGHT - timedelta(days=days)).date() for days in (1, 2))
QUIET = "runtime.delivery_quiet_minutes=5"


class Delivery:
    """Raw data in the making, and the job that looks at them."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self._capsys = capsys

    def put(self, name: str, minutes_ago: float = 60, day: object = YESTERDAY) -> None:
        """Write a file into the partition of a day."""
        path = self.root / "raw" / "interactions" / f"dt={day}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"rows")
        changed = time.time() - 60 * minutes_ago
        os.utime(path, (changed, changed))

    def look(self, *settings: str, days: int = 1, deadline: float = 1000, code: int = 0) -> dict:
        """Run the job for a window of some days that ends at midnight."""
        window = (f"window.start={MIDNIGHT - timedelta(days=days)}", f"window.end={MIDNIGHT}")
        given = (f"runtime.raw={self.root / 'raw'}", f"runtime.delivery_deadline_hours={deadline}", *window, *settings)
        argv = ["--store", str(self.root / "store"), "--run", f"r{days}", *(w for s in given for w in ("--set", s))]
        self._capsys.readouterr()
        assert deliveries.main(argv) == code
        return last_line(self._capsys)


@pytest.fixture
def delivery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Delivery:
    return Delivery(tmp_path, capsys)


def test_a_partition_is_complete_when_its_files_have_stopped_changing(delivery: Delivery) -> None:
    found = delivery.look(QUIET)
    assert (found["complete"], found["lacking"]) == (False, f"dt={YESTERDAY} (no file)")
    delivery.put("part-0.parquet")
    delivery.put("part-1.parquet", minutes_ago=1)
    found = delivery.look(QUIET)
    assert not found["complete"] and "changed at" in found["lacking"]
    delivery.put("part-1.parquet", minutes_ago=6)
    assert delivery.look(QUIET)["complete"]


def test_a_marker_may_say_so_at_once(delivery: Delivery) -> None:
    marker = "runtime.delivery=marker"
    delivery.put("part-0.parquet", minutes_ago=0)
    found = delivery.look(marker)
    assert not found["complete"] and "no _SUCCESS, 1 files" in found["lacking"]
    delivery.put("_SUCCESS", minutes_ago=0)
    assert delivery.look(marker)["complete"]
    assert not delivery.look(marker, "runtime.delivery_marker=done.txt")["complete"]
    # A marker beside nothing promises nothing.
    delivery.put("_SUCCESS", day=BEFORE)
    assert f"dt={BEFORE} (no file)" in delivery.look(marker, days=2)["lacking"]


def test_every_day_of_the_window_is_wanted(delivery: Delivery) -> None:
    delivery.put("part-0.parquet")
    assert delivery.look(QUIET, days=2)["lacking"] == f"dt={BEFORE} (no file)"
    delivery.put("part-0.parquet", day=BEFORE)
    found = delivery.look(QUIET, days=2)
    assert found["complete"] and found["num_partitions"] == 2


def test_after_the_deadline_what_is_missing_is_an_error(delivery: Delivery) -> None:
    (delivery.root / "raw").mkdir()
    error = delivery.look(QUIET, deadline=0, code=3)
    assert error["error"] == "DataError" and f"dt={YESTERDAY} (no file)" in error["found"]
    assert "runtime.delivery=none" in error["remedy"]
    assert delivery.look(QUIET, "runtime.delivery=none", deadline=0)["complete"]
    # What still grows is on its way.
    delivery.put("part-0.parquet", minutes_ago=1)
    assert delivery.look(QUIET, deadline=0)["complete"] is False


@pytest.mark.parametrize(
    ("zone", "start", "end", "days"),
    [
        ("UTC", "2026-03-01", "2026-03-03", ["2026-03-01", "2026-03-02"]),
        # Of the day that begins at 15:00 UTC only a part lies in the window: it cannot be complete yet.
        ("Asia/Tokyo", "2026-03-01", "2026-03-02", ["2026-03-01"]),
        ("America/New_York", "2026-03-01", "2026-03-02", ["2026-02-28"]),
        ("America/New_York", "2026-03-08T05:00", "2026-03-09T04:00", ["2026-03-08"]),
        ("UTC", "2026-03-01T10:00", "2026-03-01T11:00", []),
    ],
)
def test_the_days_that_end_within_the_window(zone: str, start: str, end: str, days: list[str]) -> None:
    config = load_config(None, [f"window.start={start}", f"window.end={end}", f"etl.time_zone={zone}"])
    assert [str(day) for day in deliveries.window_days(config)] == days
