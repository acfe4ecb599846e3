"""The window that a DAG run covers, and the flags of its jobs. This module imports no Airflow and does no I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

BACKFILL = "backfill"
DAY = timedelta(days=1)
# In Python `$` also matches before a final line feed; the lookahead refuses that.
RUN_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$(?!\n)"
OVERRIDE_PATTERN = r"^[a-z_]+\.[a-z_]+=[^\x00-\x1f]*$(?!\n)"
DAY_PATTERN = r"^\d{4}-\d\d-\d\d$(?!\n)"
VERSION_PATTERN = r"^(previous|[1-9]\d{0,8})$(?!\n)"
MAX_WINDOWS = 100
INSTANT_PATTERN = r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d:?\d\d)?)?$(?!\n)"


@dataclass(frozen=True)
class Backfill:
    """The days to rebuild, and what to make of them.

    Attributes:
        windows: the days, each `[start, end)`, oldest first.
        stages: stages to rebuild; what they read is rebuilt too.
        train: train, evaluate and register the last day.
        dry_run: only log the plan.
    """

    windows: Sequence[tuple[datetime, datetime]]
    stages: Sequence[str]
    train: bool
    dry_run: bool


def resolve_window(
    run_type: str,
    run_after: datetime,
    data_interval: tuple[datetime, datetime] | None = None,
    start: str | None = None,
    end: str | None = None,
    partition_key: str | None = None,
) -> tuple[datetime, datetime]:
    """Return the window `[start, end)` of a run, UTC.

    A scheduled or backfill run covers its data interval. A manual or asset-triggered run covers the given bounds;
    without bounds, its data interval; without either, the last whole day before `run_after`. A missing start is one day
    before the end. A run with a partition key covers the day that the key names.

    Args:
        run_type: Airflow's run type: `scheduled`, `backfill`, `manual`, `asset_triggered`, ...
        run_after: time from which Airflow may start the run, with a time zone.
        data_interval: the run's interval. Asset-triggered runs, and manual runs without a logical date, have none.
        start: ISO 8601 bound given by a person; UTC unless it names a zone.
        end: ISO 8601 bound given by a person.
        partition_key: `YYYY-MM-DD`, of a run that a delivery has started.

    Raises:
        ValueError: the bounds do not fit the run type, the start has no end, the window is empty, or a scheduled or
            backfill run has no interval.
    """
    if partition_key is not None:
        if start or end:
            raise ValueError(
                f"A run with the partition key {partition_key!r} covers that day: leave both bounds empty."
            )
        first = datetime.combine(date.fromisoformat(partition_key), time(), UTC)
        return first, first + DAY
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
    """Make a run id a file name: `scheduled__2026-01-02T00:00:00+00:00` -> `scheduled__2026-01-02T00-00-00-00-00`.

    It leaves room for the end of the id of a refit run.
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", airflow_run_id).strip("-.")[:122]


def retrain_flags(
    *,
    store: str,
    run: str,
    window: tuple[datetime, datetime],
    config: str | None,
    overrides: Sequence[str],
    run_type: str,
) -> list[str]:
    """Return the flags of a retraining. All its jobs get the same flags.

    Args:
        store: URI of the artifact store.
        run: crane's run id.
        window: `[start, end)`.
        config: preset or YAML file.
        overrides: `section.field=value`.
        run_type: Airflow's run type; the jobs of a backfill move no alias.
    """
    first, last = window
    # What a person starts works with what there is.
    settings = ["runtime.delivery=none"] if run_type == "manual" else []
    settings += [*overrides, f"window.start={first.isoformat()}", f"window.end={last.isoformat()}"]
    if run_type == BACKFILL:
        settings.append("runtime.backfill=true")
    return [*_identity(store, run), *(["--config", config] if config else []), *_settings(settings)]


def backfill_windows(first: str, last: str) -> list[tuple[datetime, datetime]]:
    """Return the days from `first` to `last`, both included, as windows `[start, end)` in UTC, oldest first.

    Raises:
        ValueError: a date does not exist, the first day lies after the last, or there are more than `MAX_WINDOWS` days.
    """
    start, end = (datetime.combine(date.fromisoformat(day), time(), UTC) for day in (first, last))
    if start > end:
        raise ValueError(f"The first day {first} lies after the last day {last}.")
    num_days = (end - start) // DAY + 1
    if num_days > MAX_WINDOWS:
        raise ValueError(f"{first} to {last} are {num_days} days, at most {MAX_WINDOWS} are rebuilt at once.")
    return [(start + day * DAY, start + (day + 1) * DAY) for day in range(num_days)]


def backfill_flags(backfill: Backfill, *, store: str, config: str | None, overrides: Sequence[str]) -> list[str]:
    """Return the flags of a backfill. All its jobs get the same flags; none of them moves an alias."""
    given = [f"{first.isoformat()}/{last.isoformat()}" for first, last in backfill.windows]
    return [
        *("--store", store),
        *(["--config", config] if config else []),
        *_settings([*overrides, "runtime.backfill=true"]),
        *("--windows", *given),
        *("--stages", *backfill.stages),
        *(["--train"] if backfill.train else []),
        *(["--dry-run"] if backfill.dry_run else []),
    ]


def rollback_flags(*, store: str, to: str, request: str, overrides: Sequence[str]) -> list[str]:
    """Return the flags of a rollback. A retry has the same `request`, so it does not go back a second time."""
    return ["--store", store, *_settings(runtime_only(overrides)), "--to", to, "--request", request]


def missed_interval(previous_end: datetime | None, start: datetime) -> str:
    """Return the time between the end of the last interval and the start of this one in words, "" where there is none.

    Args:
        previous_end: end of the interval of the run before, None where there was none.
        start: start of this run's interval.
    """
    if previous_end is None or previous_end >= start:
        return ""
    first, last = (bound.astimezone(UTC) for bound in (previous_end, start))
    return f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC"


def promote_flags(*, store: str, run: str, overrides: Sequence[str]) -> list[str]:
    """Return the flags of the jobs that judge and serve a run. They read its configuration from the store."""
    return [*_identity(store, run), *_settings(runtime_only(overrides))]


def runtime_only(overrides: Iterable[str]) -> list[str]:
    """Return the overrides of the section `runtime`: where to work, not what to compute."""
    return [override for override in overrides if override.startswith("runtime.")]


def newest_candidate(events: Iterable[Any], store: str | None = None) -> Mapping[str, Any] | None:
    """Return `extra` of the newest asset event that announces a candidate, None if only backfills sent events.

    Args:
        events: Airflow asset events with `timestamp`, `source_run_id` and `extra`, in any order.
        store: only candidates of this store count; those of every store when None.
    """
    announced = [
        event
        for event in events
        if event.extra.get("run")
        and store in (None, event.extra.get("store"))
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
