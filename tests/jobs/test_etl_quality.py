"""Whether the last day has as many events as a day of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import pytest
from pyspark.sql import SparkSession

from crane_core.config import Etl, Window
from crane_core.errors import DataError
from jobs.etl.quality import measure_completeness, stop_on_missing

pytestmark = pytest.mark.spark

END = datetime(2026, 3, 2, tzinfo=UTC)
WINDOW = Window(start=END - timedelta(days=1), end=END)
ETL = Etl(completeness_min_rows=5)


def measured(spark: SparkSession, counts: Mapping[int, int], etl: Etl = ETL) -> dict:
    """Measure a log with so many events on each day, counted back from the last one, which is 0."""
    rows = [
        (END - timedelta(days=day) - timedelta(seconds=1 + 86_000 * place / max(1, count)),)
        for day, count in counts.items()
        for place in range(count)
    ]
    return measure_completeness(spark.createDataFrame(rows, "event_time timestamp"), WINDOW, etl)


def test_the_same_weekdays_count_where_there_are_enough(spark: SparkSession) -> None:
    # Quiet Sundays: the days before alone would call this one incomplete.
    counts = {day: 10 if day % 7 == 0 else 100 for day in range(30)}
    found = measured(spark, counts)
    assert found == {"rows": 10, "weekday_median": 10, "days_median": 100, "share": 1.0, "status": "ok"}
    few = measured(spark, {day: count for day, count in counts.items() if day < 20})
    assert (few["weekday_median"], few["share"], few["status"]) == (10, 0.1, "stop")


@pytest.mark.parametrize(
    ("rows", "status"), [(100, "ok"), (50, "ok"), (49, "warn"), (20, "warn"), (19, "stop"), (0, "stop")]
)
def test_bounds(spark: SparkSession, rows: int, status: str) -> None:
    found = measured(spark, {0: rows, **dict.fromkeys(range(1, 40), 100)})
    assert (found["rows"], found["share"], found["status"]) == (rows, rows / 100, status)


def test_days_without_events_count_but_not_those_before_the_first(spark: SparkSession) -> None:
    counts = dict.fromkeys(range(1, 11), 100)
    counts |= {3: 0, 4: 0, 5: 0, 6: 0, 8: 0, 9: 0}
    assert measured(spark, {0: 100, **counts})["days_median"] == 0
    assert measured(spark, {0: 100, 1: 100, 2: 100})["days_median"] == 100


def test_without_enough_events_nothing_is_judged(spark: SparkSession) -> None:
    assert measured(spark, {0: 1, **dict.fromkeys(range(1, 40), 4)})["status"] == "unknown"
    assert measured(spark, {0: 10})["status"] == "unknown"
    assert measured(spark, {})["rows"] == 0


def test_the_error_has_the_numbers(caplog: pytest.LogCaptureFixture) -> None:
    found = {"rows": 10, "weekday_median": 100, "days_median": 90, "share": 0.1, "status": "stop"}
    with pytest.raises(DataError, match=r"10 events, 0\.1 of .* 100, of the days before 90.*completeness_stop is 0\.2"):
        stop_on_missing(found, ETL)
    stop_on_missing(found | {"status": "warn"}, ETL)
    assert "incomplete status=warn" in caplog.text
    caplog.clear()
    stop_on_missing(found | {"status": "ok"}, ETL)
    assert caplog.text == ""
