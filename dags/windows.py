"""Which window a DAG run covers, and the flags that tell every job of the run. No Airflow import, no I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

BACKFILL = "backfill"
DAY = timedelta(days=1)
# Python's `$` also matches before a last line feed, which the lookahead refuses.
RUN_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$(?!\n)"
OVERRIDE_PATTERN = r"^[a-z_]+\.[a-z_]+=[^\x00-\x1f]*$(?!\n)"
DAY_PATTERN = r"^\d{4}-\d\d-\d\d$(?!\n)"
VERSION_PATTERN = r"^(previous|[1-9]\d{0,8})$(?!\n)"
MAX_WINDOWS = 100
INSTANT_PATTERN = r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d:?\d\d)?)?$(?!\n)"


def resolve_window(
    run_type: str,
    run_after: datetime,
    data_interval: tuple[datetime, datetime] | None = None,
    start: str | None = None,
    end: str | None = None,
) -> tuple[datetime, datetime]:
    """The window `[start, end)` of a run, UTC.

    Scheduled and backfill runs take their data interval. Manual and asset-triggered runs take the given bounds,
    else their data interval, else the last whole day before `run_after`; a missing start is one day before the end.

    Args:
        run_type: Airflow's run type: `scheduled`, `backfill`, `manual`, `asset_triggered`, ...
        run_after: when Airflow let the run start, with a time zone.
        data_interval: the run's interval; asset-triggered runs and manual runs without a logical date have none.
        start: ISO 8601 bound given by a person, UTC where it names no zone.
        end: ISO 8601 bound given by a person.

    Raises:
        ValueError: bounds given to a scheduled or backfill run, a start without an end, an empty window, or a
            scheduled run without an interval.
    """
    if run_type in ("scheduled", BACKFILL):
        if start or end:
            raise ValueError(f"A {run_type} run takes its window from its data interval: leave both bounds empty.")
        if data_interval is None:
            raise ValueError(f"A {run_type} run without a data interval has no window.")
    if start and not end:
        raise ValueError("A window start needs a window end.")
    if end:
        last = _utc(end)
        first = _utc(start) if start else last - DAY
    elif data_interval and data_interval[0] < data_interval[1]:
        first, last = (bound.astimezone(UTC) for bound in data_interval)
    else:
        last = run_after.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        first = last - DAY
    if first >= last:
        raise ValueError(f"The window start {first.isoformat()} does not lie before its end {last.isoformat()}.")
    return first, last


def crane_run_id(airflow_run_id: str) -> str:
    """A run id fit for file names: `scheduled__2026-01-02T00:00:00+00:00` -> `scheduled__2026-01-02T00-00-00-00-00`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", airflow_run_id).strip("-.")[:128]


def retrain_flags(
    *,
    store: str,
    run: str,
    window: tuple[datetime, datetime],
    config: str | None,
    overrides: Sequence[str],
    run_type: str,
) -> list[str]:
    """The flags every job of a retraining run gets, the very same for all.

    Args:
        store: URI of the artifact store.
        run: crane's run id.
        window: `[start, end)`.
        config: preset or file.
        overrides: `section.field=value`.
        run_type: Airflow's run type; a backfill moves no alias.
    """
    first, last = window
    settings = [*overrides, f"window.start={first.isoformat()}", f"window.end={last.isoformat()}"]
    if run_type == BACKFILL:
        settings.append("runtime.backfill=true")
    return [*_identity(store, run), *(["--config", config] if config else []), *_settings(settings)]


def backfill_windows(first: str, last: str) -> list[tuple[datetime, datetime]]:
    """The days from `first` to `last`, both included, each a window `[start, end)` in UTC, oldest first.

    Raises:
        ValueError: no such dates, the wrong order, or more than `MAX_WINDOWS` days.
    """
    start, end = (datetime.combine(date.fromisoformat(day), time(), UTC) for day in (first, last))
    if start > end:
        raise ValueError(f"The first day {first} lies after the last day {last}.")
    num_days = (end - start) // DAY + 1
    if num_days > MAX_WINDOWS:
        raise ValueError(f"{first} to {last} are {num_days} days, at most {MAX_WINDOWS} are rebuilt at once.")
    return [(start + day * DAY, start + (day + 1) * DAY) for day in range(num_days)]


def backfill_flags(
    *,
    store: str,
    windows: Sequence[tuple[datetime, datetime]],
    config: str | None,
    overrides: Sequence[str],
    stages: Sequence[str],
    train: bool,
    dry_run: bool,
) -> list[str]:
    """The flags of every job of a backfill, the very same for all; none of them moves an alias."""
    given = [f"{first.isoformat()}/{last.isoformat()}" for first, last in windows]
    return [
        *("--store", store),
        *(["--config", config] if config else []),
        *_settings([*overrides, "runtime.backfill=true"]),
        *("--windows", *given),
        *("--stages", *stages),
        *(["--train"] if train else []),
        *(["--dry-run"] if dry_run else []),
    ]


def rollback_flags(*, store: str, to: str, request: str, overrides: Sequence[str]) -> list[str]:
    """The flags of the job that goes back; a retry carries the same `request` and does not go back twice."""
    return ["--store", store, *_settings(runtime_only(overrides)), "--to", to, "--request", request]


def promote_flags(*, store: str, run: str, overrides: Sequence[str]) -> list[str]:
    """The flags of the jobs that judge and serve a run; its configuration is in the store, only `runtime` is given."""
    return [*_identity(store, run), *_settings(runtime_only(overrides))]


def runtime_only(overrides: Iterable[str]) -> list[str]:
    """The overrides that say where to work, not what to compute."""
    return [override for override in overrides if override.startswith("runtime.")]


def newest_candidate(events: Iterable[Any]) -> Mapping[str, Any] | None:
    """The extra of the newest asset event that announces a candidate, None when all came from backfills.

    Args:
        events: Airflow asset events with `timestamp`, `source_run_id` and `extra`.
    """
    announced = [
        event
        for event in events
        if event.extra.get("run")
        and event.extra.get("run_type") != BACKFILL
        and not (event.source_run_id or "").startswith(f"{BACKFILL}__")
    ]
    return max(announced, key=lambda event: event.timestamp).extra if announced else None


def _identity(store: str, run: str) -> list[str]:
    return ["--store", store, "--run", run]


def _settings(overrides: Iterable[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def _utc(text: str) -> datetime:
    value = datetime.fromisoformat(text)
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
