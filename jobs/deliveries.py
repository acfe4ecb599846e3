"""Look whether the data of a run's window are delivered: `python -m jobs.deliveries --store URI --run RUN_ID`.

Every day that ends within the window needs its partition `interactions/dt=YYYY-MM-DD`, with at least one file. The
partition is complete, by `runtime.delivery`,

- `quiet`: when no file of it has changed for `runtime.delivery_quiet_minutes`;
- `marker`: when it holds the file `runtime.delivery_marker`;
- `none`: always, even where it is missing.

The job only looks and returns `complete`; a scheduler starts it again until then. `runtime.delivery_deadline_hours`
after the window's end it fails with what is missing. A partition that is there and still grows has a day more.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

from crane_core.config import RunConfig, Runtime
from crane_core.errors import DataError
from crane_core.raw.files import DAY_PREFIX, INTERACTIONS_FOLDER, day_bounds
from crane_core.raw.location import Location
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import run_job

logger = logging.getLogger(__name__)

GROWTH = timedelta(days=1)
"""Time past the deadline in which a partition may still grow."""


def deliveries(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Return whether the window's partitions are complete, and what they lack.

    Raises:
        DataError: the deadline has passed.
    """
    runtime, now = config.runtime, datetime.now(UTC)
    folder = Location.at(runtime.raw or f"{store.storage.uri}/raw") / INTERACTIONS_FOLDER
    wanted = [] if runtime.delivery == "none" else window_days(config)
    missing: list[str] = []
    growing: list[str] = []
    for day in wanted:
        absent, lacks = _lacking(folder / f"{DAY_PREFIX}{day}", runtime, now)
        if lacks:
            (missing if absent else growing).append(f"{DAY_PREFIX}{day} ({lacks})")
    deadline = config.window.end + timedelta(hours=runtime.delivery_deadline_hours)
    told = ", ".join([*missing, *growing])
    if (missing and now > deadline) or (growing and now > deadline + GROWTH):
        raise DataError(
            f"{folder} is not complete at the deadline {deadline:%Y-%m-%d %H:%M} UTC: {told}.",
            "Deliver what is missing and clear the task deliveries; or raise runtime.delivery_deadline_hours; or go on "
            "without it, by --set runtime.delivery=none.",
        )
    logger.info("%s partitions=%d lacking=%s", "waiting" if told else "complete", len(wanted), told or "nothing")
    return {"complete": not told, "lacking": told, "deadline": deadline.isoformat(), "num_partitions": len(wanted)}


def window_days(config: RunConfig) -> list[date]:
    """Return the days, in `etl.time_zone`, that end within the window: those whose partitions can be complete."""
    window, zone = config.window, config.etl.time_zone
    first = (window.start - timedelta(days=1)).date()
    candidates = [first + timedelta(days=place) for place in range((window.end - window.start).days + 4)]
    return [day for day in candidates if window.start < day_bounds(day, zone)[1] <= window.end]


def _lacking(partition: Location, runtime: Runtime, now: datetime) -> tuple[bool, str]:
    """Return whether something of a partition is absent, and what it lacks; "" where it is complete."""
    files = partition.files()
    if runtime.delivery == "marker":
        marker = partition / runtime.delivery_marker
        if not marker.exists():
            return True, f"no {runtime.delivery_marker}, {len(files)} files"
        return not files, "" if files else "no file"
    if not files:
        return True, "no file"
    changed = datetime.fromtimestamp(max(file.info.mtime_ns or 0 for file in files) / 1e9, UTC)
    if now - changed < timedelta(minutes=runtime.delivery_quiet_minutes):
        return False, f"changed at {changed:%H:%M:%S} UTC"
    return False, ""


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("deliveries", deliveries, argv)


if __name__ == "__main__":
    raise SystemExit(main())
