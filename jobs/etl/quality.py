"""Figures of `quality.json`: distributions of the rows kept, and the drift of the last day from the days before."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from statistics import median
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from crane_core.config import Etl
from crane_core.config import Window as RunWindow
from crane_core.errors import DataError
from crane_core.numerics.stability import population_stability_index
from crane_core.raw.checks import Footer
from crane_core.schema import EVENT_TIME, WEIGHT
from jobs.etl.events import EVENT_CODE, ITEM_KEY, USER_KEY

logger = logging.getLogger(__name__)

FIRST_DAY = "1990-01-01"
"""Events before this day are taken for wrong, and counted."""
ITEM_GROUPS = 16
COMPLETENESS_DAYS = 56
RECENT_DAYS = 28
MIN_WEEKDAYS = 3
NUM_PARTITIONS = 60
"""Daily partitions whose rows the manifest keeps."""
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def distributions(rows: DataFrame, columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each int column: the number of its values, and mean and quantiles of the rows per value; one query."""
    pairs = ", ".join(f"'{column}', {column}" for column in columns)
    values = rows.select(F.expr(f"stack({len(columns)}, {pairs}) as (name, value)"))
    count = F.col("count")
    found = (
        values.groupBy("name", "value")
        .count()
        .groupBy("name")
        .agg(F.count(count).alias("ids"), F.avg(count).alias("mean"), F.percentile(count, list(QUANTILES)).alias("at"))
        .collect()
    )
    result: dict[str, dict[str, float]] = {}
    for row in found:
        quantiles = {f"p{round(100 * share)}": value for share, value in zip(QUANTILES, row["at"], strict=True)}
        result[row["name"]] = {"count": row["ids"], "mean": row["mean"], **quantiles}
    return result


def count_early(days: Mapping[str, int]) -> int:
    """Return the number of events before `FIRST_DAY`, and warn of them: a time of 0 is in 1970.

    Args:
        days: ISO date to its events.
    """
    early = {day: count for day, count in days.items() if day < FIRST_DAY}
    if early:
        logger.warning("times before=%s rows=%d first=%s", FIRST_DAY, sum(early.values()), min(early))
    return sum(early.values())


def measure_drift(events: DataFrame, window: RunWindow, etl: Etl) -> dict[str, Any]:
    """Compare the last day before `window.end` with the `etl.drift_days` before it.

    Compared are the hour, the event type and the weight (in steps of a factor of about 1.4) of the events, how many
    events their users have on that day, in octaves, and how they spread over a fixed random grouping of the items.

    Args:
        events: usable events, repeats included.
        window: its end is the end of the day.
        etl: thresholds.

    Returns:
        Rows on both sides, rows of the day over those of a day of the reference, the index of each figure, and
        `status`: `ok`, `warn`, `stop`, or `unknown` with too few rows.
    """
    cut = window.end - timedelta(days=1)
    recent = events.where(F.col(EVENT_TIME) >= F.lit(cut - timedelta(days=etl.drift_days)))
    local = F.from_utc_timestamp(EVENT_TIME, etl.time_zone)
    sided = recent.select(
        (F.col(EVENT_TIME) >= F.lit(cut)).alias("is_day"),
        F.floor((F.unix_micros(EVENT_TIME) - F.unix_micros(F.lit(cut))) / 86_400_000_000).alias("day"),
        F.hour(local).alias("hour"),
        F.floor(2 * F.log2(1 + F.col(WEIGHT))).alias("weight"),
        EVENT_CODE,
        F.pmod(ITEM_KEY, F.lit(ITEM_GROUPS)).alias("items"),
        USER_KEY,
    )
    figures: dict[str, tuple[Counter[str], Counter[str]]] = {}

    def add(name: str, is_day: bool, value: Any, count: int) -> None:
        figures.setdefault(name, (Counter(), Counter()))[is_day][str(value)] += count

    rows = F.count(F.lit(1)).alias("rows")
    days = 1
    cells = sided.groupBy("is_day", "hour", "weight", EVENT_CODE, "items").agg(rows, F.min("day").alias("first"))
    for row in cells.collect():
        days = max(days, -row["first"])
        for name in ("hour", "weight", EVENT_CODE, "items"):
            add(name.removesuffix("_code"), row["is_day"], row[name], row["rows"])
    daily = sided.groupBy("is_day", "day", USER_KEY).count()
    octaves = daily.groupBy("is_day", F.floor(F.log2("count")).alias("value")).agg(F.sum("count").alias("rows"))
    for row in octaves.collect():
        add("user_activity", row["is_day"], row["value"], row["rows"])
    reference, found = (sum(counts.values()) for counts in figures.get("hour", (Counter(), Counter())))
    result: dict[str, Any] = {"rows": found, "reference_rows": reference, "reference_days": days}
    if min(reference, found) < etl.drift_min_rows:
        return {**result, "status": "unknown"}
    indices = {name: round(population_stability_index(*counts), 4) for name, counts in sorted(figures.items())}
    worst = max(indices.values())
    status = "ok" if worst <= etl.drift_warn else "warn"
    status = "stop" if etl.drift_stop is not None and worst > etl.drift_stop else status
    return {**result, "volume": round(found * days / reference, 4), "index": indices, "status": status}


def compare_last_day(events: DataFrame, window: RunWindow, etl: Etl) -> dict[str, Any]:
    """Return `drift` and `completeness` of the last day before `window.end`."""
    return {
        "drift": measure_drift(events, window, etl),
        "completeness": measure_completeness(events, window, etl),
    }


def stop_on_last_day(compared: dict[str, Any], etl: Etl) -> None:
    """Warn of a last day that is unlike those before, or stop.

    Raises:
        DataError: it has too few events, or they have drifted.
    """
    stop_on_missing(compared["completeness"], etl)
    stop_on_drift(compared["drift"], etl)


def rows_per_partition(log: Sequence[Footer]) -> dict[str, int]:
    """Return the rows of the newest daily partitions, by arrival day: what a later run finds beyond them came late."""
    rows: Counter[str] = Counter()
    for footer in log:
        rows[str(footer.file.day)] += footer.num_rows
    return dict(sorted(rows.items())[-NUM_PARTITIONS:])


def measure_completeness(events: DataFrame, window: RunWindow, etl: Etl) -> dict[str, Any]:
    """Compare the number of events of the last day before `window.end` with that of a day of its kind.

    A day is 24 hours that end at the hour of `window.end`.

    Args:
        events: usable events, repeats included.
        window: its end is the end of the day.
        etl: thresholds.

    Returns:
        `rows` of the day; `weekday_median` over the same weekdays of the eight weeks before, and `days_median` over the
        days of four weeks, each null where there is none; `share`, of the first of these that rests on enough days; and
        `status`: `ok`, `warn`, `stop`, or `unknown` where it has too few events.
    """
    begin = window.end - timedelta(days=COMPLETENESS_DAYS + 1)
    place = F.floor((F.unix_micros(F.lit(window.end)) - 1 - F.unix_micros(EVENT_TIME)) / 86_400_000_000)
    counted = events.where(F.col(EVENT_TIME) >= F.lit(begin)).groupBy(place.alias("place")).count().collect()
    counts = {row["place"]: row["count"] for row in counted}
    # Days before the first event are no days without traffic.
    oldest = max(counts, default=0)
    days = [counts.get(day, 0) for day in range(1, min(oldest, RECENT_DAYS) + 1)]
    weekdays = [counts.get(day, 0) for day in range(7, oldest + 1, 7)]
    weekday_median, days_median = (median(found) if found else None for found in (weekdays, days))
    expected = weekday_median if len(weekdays) >= MIN_WEEKDAYS else days_median
    result = {"rows": counts.get(0, 0), "weekday_median": weekday_median, "days_median": days_median}
    if expected is None or expected < etl.completeness_min_rows:
        return {**result, "share": None, "status": "unknown"}
    share = round(result["rows"] / expected, 4)
    status = "ok" if share >= etl.completeness_warn else "warn"
    status = "stop" if etl.completeness_stop is not None and share < etl.completeness_stop else status
    return {**result, "share": share, "status": status}


def stop_on_missing(completeness: dict[str, Any], etl: Etl) -> None:
    """Warn of a last day with fewer events than a day of its kind has, or stop.

    Raises:
        DataError: the share is below `etl.completeness_stop`.
    """
    told = (
        f"{completeness['rows']} events, {completeness['share']} of what such a day has (median of the same weekdays "
        f"{completeness['weekday_median']}, of the days before {completeness['days_median']})"
    )
    if completeness["status"] == "stop":
        raise DataError(
            f"The last day has {told}; etl.completeness_stop is {etl.completeness_stop}.",
            "Deliver the rest of the day and clear the task; if the day is right, lower etl.completeness_stop or set it"
            " to null.",
        )
    if completeness["status"] == "warn":
        logger.warning("incomplete status=warn threshold=%s: the last day has %s", etl.completeness_warn, told)


def stop_on_drift(drift: dict[str, Any], etl: Etl) -> None:
    """Warn of a last day that differs from those before, or stop.

    Raises:
        DataError: an index is above `etl.drift_stop`.
    """
    indices = drift.get("index", {})
    told = ", ".join(f"{name} {value}" for name, value in indices.items())
    if drift["status"] == "stop":
        raise DataError(
            f"The last day ({drift['rows']} events) has drifted from the {drift['reference_days']} days before it "
            f"({drift['reference_rows']} events): population stability index {told}; etl.drift_stop is "
            f"{etl.drift_stop}.",
            "If the files of that day are right, raise etl.drift_stop or set it to null; if not, deliver them again.",
        )
    if drift["status"] == "warn":
        logger.warning("drift status=warn threshold=%s index=%s", etl.drift_warn, told)
