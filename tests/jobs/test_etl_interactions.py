"""The transforms of the interaction job: literal rows in, exact rows out."""

from __future__ import annotations

import math
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from crane_core.config import RunConfig
from crane_core.raw.checks import check_interactions
from crane_core.raw.files import list_interactions
from jobs.etl.catalog import Catalog, clean_catalog
from jobs.etl.events import (
    assign_split,
    find_bots,
    find_core,
    kept_events,
    key_of,
    mark_bad,
    mark_excess,
    mark_repeats,
    read_interactions,
    with_codes,
)
from jobs.etl.ids import Kind, first_seen, number_ids, trained_keys
from jobs.etl.tables import number_rows, tally, write_table
from tests.worlds.raw_data import at, write_day

pytestmark = pytest.mark.spark

EVENTS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("event_time", pa.timestamp("us", "UTC")),
        ("weight", pa.float32()),
        ("label", pa.int64()),
        ("event_type", pa.string()),
        ("dt", pa.date32()),
    ]
)


def configure(start: str = "2026-01-20", end: str = "2026-01-21", **etl: Any) -> RunConfig:
    return RunConfig.model_validate({"window": {"start": start, "end": end}, "etl": etl})


def events(spark: SparkSession, rows: list[tuple[Any, ...]]) -> DataFrame:
    """Rows of (user, item, time[, weight[, label[, dt[, type]]]]); `dt` is the day of the event unless given."""
    full = []
    for user, item, time, *rest in rows:
        weight, label, day, kind = (*rest, *(None,) * (4 - len(rest)))
        instant = at(time) if time else None
        full.append((user, item, instant, weight, label, kind, date.fromisoformat(day or time[:10])))
    # As an Arrow table: a list of rows would go through a Python worker each time the frame is evaluated.
    columns = [pa.array(column, field.type) for column, field in zip(zip(*full, strict=True), EVENTS, strict=True)]
    return spark.createDataFrame(pa.Table.from_arrays(columns, schema=EVENTS))


def coded(spark: SparkSession, rows: list[tuple[Any, ...]], config: RunConfig) -> DataFrame:
    """The same rows as the log is carried, with the ids beside the keys."""
    found = events(spark, rows)
    carried = with_codes(found, config.etl)
    for column, key in (("user_id", "user_key"), ("item_id", "item_key")):
        carried = carried.join(found.select(column, key_of(column, 0).alias(key)).distinct(), key)
    return carried


def test_bad_rows_are_marked_with_the_first_reason_that_applies(spark: SparkSession) -> None:
    rows = [
        ("a", "good", "2026-01-10 12:00", 1.0, 0),
        (None, "null user", "2026-01-10", 1.0, 0),
        ("a", None, "2026-01-10", 1.0, 0),
        (" ", "blank user", "2026-01-10", 1.0, 0),
        ("a", "no time", None, 1.0, 0, "2026-01-10"),
        ("a", "nan", "2026-01-10", math.nan, 0),
        ("a", "inf", "2026-01-10", math.inf, 0),
        ("a", "negative", "2026-01-10", -1.0, 0),
        ("a", "label 3", "2026-01-10", 1.0, 3),
        ("a", "label null", "2026-01-10", 1.0, None),
        ("a", "at the end", "2026-01-21 00:00", 1.0, 0, "2026-01-20"),
        ("a", "just before", "2026-01-20 23:59", 1.0, 0, "2026-01-20"),
        ("a", "after arrival", "2026-01-11 00:00", 1.0, 0, "2026-01-10"),
        ("a", "three days late", "2026-01-07 00:00", 1.0, 0, "2026-01-10"),
        ("a", "later still", "2026-01-06 23:59", 1.0, 0, "2026-01-10"),
        ("a", "light", "2026-01-10", 0.4, 0),
        ("a", "no weight", "2026-01-10", None, 0),
        (None, "first reason", None, math.nan, 9, "2026-01-10"),
    ]
    config = configure(split="label", min_weight=0.5, lookback_days=3)
    marked = mark_bad(events(spark, rows), config.window, config.etl).collect()
    assert [row["reason"] for row in marked] == [
        None,
        "null_id",
        "null_id",
        "empty_id",
        "null_event_time",
        "non_finite_weight",
        "non_finite_weight",
        "negative_weight",
        "bad_label",
        "bad_label",
        "after_cutoff",
        None,
        "after_arrival",
        None,
        "too_late",
        "below_min_weight",
        None,
        "null_id",
    ]


def test_labels_are_only_checked_when_the_split_uses_them(spark: SparkSession) -> None:
    config = configure()
    rows = events(spark, [("a", "x", "2026-01-10", 1.0, 9)])
    assert mark_bad(rows, config.window, config.etl).first()["reason"] is None


def test_the_first_event_of_a_pair_is_kept(spark: SparkSession) -> None:
    config = configure()
    rows = coded(
        spark,
        [
            ("a", "x", "2026-01-10 12:00", 2.0, 0, "2026-01-12"),
            ("a", "x", "2026-01-10 12:00", 9.0, 0, "2026-01-11"),
            ("a", "x", "2026-01-10 12:00", 3.0, 0, "2026-01-11"),
            ("a", "x", "2026-01-11 12:00", 5.0, 0, "2026-01-11"),
            ("a", "y", "2026-01-10 12:00", 1.0, 0, "2026-01-11"),
            ("b", "x", "2026-01-12 12:00", 1.0, 0, "2026-01-12"),
        ],
        config,
    )
    marked = mark_repeats(rows, config).collect()
    found = {(row["user_id"], row["item_id"], row["weight"]): row["reason"] for row in marked}
    assert found == {
        ("a", "x", 9.0): None,
        ("a", "x", 3.0): "duplicate",
        ("a", "x", 2.0): "duplicate",
        ("a", "x", 5.0): "repeat",
        ("a", "y", 1.0): None,
        ("b", "x", 1.0): None,
    }


def test_types_weigh_what_the_configuration_says(spark: SparkSession) -> None:
    config = configure(event_weights={"view": 1, "buy": 4, "look": 0}, min_weight=0.5)
    day = "2026-01-10"
    rows = [
        ("a", "1", day, None, 0, day, "view"),
        ("a", "2", day, 2.5, 0, day, "buy"),
        ("a", "3", day, 3.0, 0, day, None),
        ("a", "4", day, 1.0, 0, day, "look"),
        ("a", "5", day, 1.0, 0, day, "BUY"),
    ]
    marked = mark_bad(events(spark, rows), config.window, config.etl).collect()
    assert [row["reason"] for row in marked] == [None, None, None, "below_min_weight", "unknown_event_type"]
    weighed = {row["item_id"]: (row["weight"], row["event_code"]) for row in coded(spark, rows[:3], config).collect()}
    assert weighed == {"1": (1.0, 2), "2": (10.0, 0), "3": (3.0, None)}


@pytest.mark.parametrize(
    ("repeats", "expected"),
    [("first", {"x": 1.0, "y": 5.0}), ("sum", {"x": 6.0, "y": 5.0}), ("max", {"x": 3.0, "y": 5.0})],
)
def test_repeats_weigh_into_the_first_of_their_period(
    spark: SparkSession, repeats: str, expected: dict[str, float]
) -> None:
    """A duplicate counts once; what happens after the cutoff of training says nothing about a training row."""
    config = configure(repeats=repeats, validation_days=2, test_days=2)
    rows = coded(
        spark,
        [
            ("a", "x", "2026-01-10", 1.0),
            ("a", "x", "2026-01-11", 2.0),
            ("a", "x", "2026-01-12", 3.0),
            ("a", "x", "2026-01-12", 0.5),
            ("a", "x", "2026-01-18", 50.0),
            ("a", "y", "2026-01-18", 5.0),
            ("a", "y", "2026-01-20", 70.0),
        ],
        config,
    )
    marked = mark_repeats(rows, config)
    assert {row["item_id"]: row["weight"] for row in kept_events(marked).collect()} == expected
    found = marked.collect()
    assert sorted(row["reason"] for row in found if row["reason"]) == ["duplicate", *["repeat"] * 4]
    assert sorted(row["weight"] for row in found) == [0.5, 1.0, 2.0, 3.0, 5.0, 50.0, 70.0]


def test_a_user_has_so_many_events_a_day(spark: SparkSession) -> None:
    """The first of the day are kept, in the zone of the days; another user has a cap of its own."""
    config = configure(max_events_per_day=2, time_zone="Europe/Berlin")
    rows = coded(
        spark,
        [
            ("a", "1", "2026-01-10 22:59"),
            ("a", "2", "2026-01-10 10:00"),
            ("a", "3", "2026-01-09 23:00"),
            ("a", "4", "2026-01-10 23:00"),
            ("b", "1", "2026-01-10 22:59"),
        ],
        config,
    )
    over = [row["item_id"] for row in mark_excess(rows, config.etl).collect() if row["reason"] == "over_daily_cap"]
    assert over == ["1"]
    assert mark_excess(rows, configure().etl).where("reason is not null").isEmpty()


def test_bots_are_users_with_more_training_rows_than_the_most(spark: SparkSession) -> None:
    rows = coded(
        spark, [(user, str(item), "2026-01-10") for user, n in (("a", 3), ("b", 4)) for item in range(n)], configure()
    )
    bots = rows.join(find_bots(rows, 3), "user_key", "left_semi")
    assert {row["user_id"] for row in bots.collect()} == {"b"}
    assert find_bots(rows, None).isEmpty()


def splits(rows: DataFrame, config: RunConfig) -> dict[tuple[str, str], int]:
    return {(row["user_id"], row["item_id"]): row["split"] for row in assign_split(rows, config).collect()}


def test_temporal_split_cuts_at_two_instants_for_everybody(spark: SparkSession) -> None:
    config = configure(validation_days=5, test_days=2)
    rows = coded(
        spark,
        [
            ("a", "train", "2026-01-13 23:59"),
            ("a", "validation", "2026-01-14 00:00"),
            ("a", "still validation", "2026-01-18 23:59"),
            ("b", "test", "2026-01-19 00:00"),
        ],
        config,
    )
    assert splits(rows, config) == {
        ("a", "train"): 0,
        ("a", "validation"): 1,
        ("a", "still validation"): 1,
        ("b", "test"): 2,
    }


def test_leave_last_tests_on_the_last_item_and_breaks_ties_by_item(spark: SparkSession) -> None:
    config = configure(split="leave_last")
    rows = coded(
        spark,
        [
            ("a", "1", "2026-01-10"),
            ("a", "3", "2026-01-11"),
            ("a", "2", "2026-01-11"),
            ("b", "1", "2026-01-10"),
            ("b", "2", "2026-01-11"),
        ],
        config,
    )
    assert splits(rows, config) == {
        ("a", "1"): 0,
        ("a", "2"): 1,
        ("a", "3"): 2,
        ("b", "1"): 0,
        ("b", "2"): 0,
    }


@pytest.mark.parametrize("repeats", ["first", "sum"])
def test_no_split_is_all_training(spark: SparkSession, repeats: str) -> None:
    """Up to the last second before the window's end; the weights of a pair add up over all of it."""
    config = configure(split="none", repeats=repeats)
    rows = coded(spark, [("a", "1", "2026-01-01", 2.0), ("a", "1", "2026-01-11 23:59:59", 3.0)], config)
    (row,) = assign_split(kept_events(mark_repeats(rows, config)), config).collect()
    assert (row["split"], row["weight"]) == (0, 5.0 if repeats == "sum" else 2.0)


def test_label_split_is_the_label(spark: SparkSession) -> None:
    config = configure(split="label")
    rows = coded(spark, [("a", str(label), "2026-01-10", 1.0, label) for label in (0, 1, 2)], config)
    assert splits(rows, config) == {("a", "0"): 0, ("a", "1"): 1, ("a", "2"): 2}


def test_core_is_the_largest_set_in_which_everybody_has_k_rows(spark: SparkSession) -> None:
    """c falls first, which pulls z below 2, which pulls d: three rounds."""
    square = [(user, item, "2026-01-10") for user in "ab" for item in "xy"]
    chain = [("c", "z", "2026-01-10"), ("d", "z", "2026-01-10"), ("d", "x", "2026-01-10")]
    rows = coded(spark, square + chain, configure())
    core = rows.join(find_core(rows, 2), ["user_key", "item_key"], "left_semi").collect()
    assert {(row["user_id"], row["item_id"]) for row in core} == {(user, item) for user in "ab" for item in "xy"}
    assert find_core(coded(spark, chain, configure()), 3).isEmpty()


def numbered(
    spark: SparkSession,
    rows: list[tuple[Any, ...]],
    column: str,
    config: RunConfig,
    catalog: Any = None,
    base: DataFrame | None = None,
) -> DataFrame:
    valid = mark_bad(events(spark, rows), config.window, config.etl).where("reason is null").drop("reason")
    kept = mark_repeats(with_codes(valid, config.etl), config).where("reason is null").drop("reason")
    kind = Kind(column, column.replace("_id", "_key"), "idx")
    which = 0 if column == "user_id" else 1
    trained = trained_keys(assign_split(kept, config).where("split = 0"))[which]
    listed = None
    if catalog:
        good, bad = clean_catalog(spark.createDataFrame(catalog, "item_id string, title string"))
        listed = Catalog(good, None, bad, len(catalog))
    return number_ids(first_seen(valid, config)[which], trained, kind, config, listed, base)


def numbers(*arguments: Any) -> list[str]:
    found = numbered(*arguments).orderBy("idx").collect()
    assert [row["idx"] for row in found] == list(range(len(found)))
    return [row[arguments[2]] for row in found]


def test_numbers_are_appended_as_days_move_on(spark: SparkSession) -> None:
    """Late arrivals, repeats and equal days included: what a run numbers, every later run numbers the same."""
    log = [
        ("zoe", "x", "2026-01-10 08:00", 1.0, None, "2026-01-12"),
        ("bob", "x", "2026-01-11 09:00", 1.0, None, "2026-01-11"),
        ("ann", "y", "2026-01-11 10:00", 1.0, None, "2026-01-13"),
        ("bob", "x", "2026-01-10 09:00", 1.0, None, "2026-01-13"),
        ("abe", "x", "2026-01-12 10:00", 1.0, None, "2026-01-12"),
        ("aaa", "w", "2026-01-13 10:00", 1.0, None, "2026-01-16"),
        ("aab", "w", "2026-01-14 10:00", 1.0, None, "2026-01-14"),
        ("now", "q", "2026-01-15 10:00", 1.0, None, "2026-01-15"),
    ]
    expected = {
        12: ["zoe"],
        13: ["zoe", "ann", "bob"],
        14: ["zoe", "ann", "bob", "abe"],
        16: ["zoe", "ann", "bob", "abe", "aaa", "aab"],
        17: ["zoe", "ann", "bob", "abe", "aaa", "aab", "now"],
    }
    for day, names in expected.items():
        config = configure(f"2026-01-{day}", f"2026-01-{day + 1}", validation_days=1, test_days=1)
        arrived = [row for row in log if row[5] <= f"2026-01-{day}"]
        assert numbers(spark, arrived, "user_id", config) == names


def test_cold_catalog_items_come_last_by_id(spark: SparkSession) -> None:
    rows = [("a", "9", "2026-01-02"), ("a", "8", "2026-01-01"), ("a", "5", "2026-01-20")]
    catalog = [("9", "nine"), ("7", "seven"), ("10", None), ("5", "five")]
    config = configure(validation_days=3, test_days=3)
    assert numbers(spark, rows, "item_id", config, catalog) == ["8", "9", "10", "5", "7"]


@pytest.mark.parametrize(
    ("ids", "expected"), [(["10", "9", "2"], ["2", "9", "10"]), (["10", "9", "x"], ["10", "9", "x"])]
)
def test_label_split_numbers_whole_number_ids_by_value(
    spark: SparkSession, ids: list[str], expected: list[str]
) -> None:
    rows = [(name, "i", "2026-01-10", 1.0, 0) for name in ids] + [("1", "i", "2026-01-10", 1.0, 2)]
    assert numbers(spark, rows, "user_id", configure(split="label")) == [*expected, "1"]


def test_catalog_keeps_one_row_per_item(spark: SparkSession) -> None:
    rows = [("a", "B"), ("a", "A"), ("a", None), (None, "x"), ("", "y"), ("b", None)]
    good, bad = clean_catalog(spark.createDataFrame(rows, "item_id string, title string"))
    assert sorted((row["item_id"], row["title"]) for row in good.collect()) == [("a", "A"), ("b", None)]
    assert sorted(row["reason"] for row in bad.collect()) == ["duplicate_item", "duplicate_item", "empty_id", "null_id"]


def test_files_of_different_types_are_read_into_one_table(spark: SparkSession, tmp_path: Path) -> None:
    raw = tmp_path / "raw {a,b} [1]"
    instant = at("2026-01-20 10:00")

    def schema(unit: str, weight: pa.DataType | None, label: pa.DataType | None) -> pa.Schema:
        fields = [("user_id", pa.string()), ("item_id", pa.large_string()), ("event_time", pa.timestamp(unit, "UTC"))]
        fields += [("weight", weight)] if weight else []
        return pa.schema(fields + ([("label", label)] if label else []))

    write_day(raw, "2026-01-20", [("a", "1", instant, 2.0, 1)], schema("us", pa.float32(), pa.int8()), "a.parquet")
    write_day(raw, "2026-01-20", [("a", "2", instant, 2.5, 2)], schema("ms", pa.float64(), pa.int64()), "b.parquet")
    write_day(raw, "2026-01-20", [("a", "3", instant, 3, 0)], schema("ns", pa.int32(), pa.uint8()), "c.parquet")
    write_day(raw, "2026-01-20", [("a", "4", instant)], schema("ns", None, None), "d.parquet")
    write_day(raw, "2026-01-20", [("a", "5", instant, None)], schema("us", pa.null(), None), "e.parquet")
    config = configure()
    footers = check_interactions(list_interactions(raw, config.window, config.etl), config.window, config.etl)
    rows = read_interactions(spark, footers).orderBy("item_id").collect()
    assert [(row["item_id"], row["weight"], row["label"]) for row in rows] == [
        ("1", 2.0, 1),
        ("2", 2.5, 2),
        ("3", 3.0, 0),
        ("4", None, None),
        ("5", None, None),
    ]
    assert {row["event_time"].timestamp() for row in rows} == {instant.timestamp()}
    assert {row["dt"] for row in rows} == {date(2026, 1, 20)}


def test_row_numbers_follow_the_order_over_partitions(spark: SparkSession) -> None:
    rows = spark.range(1000).select((F.col("id") * 7919 % 1000).alias("key")).repartition(5)
    numbered = number_rows(rows, ["key"], "idx", partitions=4)
    assert numbered.rdd.getNumPartitions() == 4
    assert numbered.where("idx != key").isEmpty()
    assert numbered.schema["idx"].dataType.simpleString() == "int"


def test_tally_ignores_order_and_sees_every_change(spark: SparkSession) -> None:
    schema = "a string, b string"
    rows = [("x", None), ("x", "y"), (None, "x")]

    def checksum(rows: list[tuple[Any, Any]]) -> str:
        return tally(spark.createDataFrame(rows, schema)).checksum

    reference = checksum(rows)
    assert checksum(rows[::-1]) == reference
    changed = [
        [*rows, rows[0]],
        rows[:2],
        [("x", None), ("x", "y"), ("x", None)],
        [(None, "x"), ("x", "y"), (None, "x")],
    ]
    assert len({reference, *map(checksum, changed)}) == 5
    groups = tally(spark.createDataFrame(rows, schema), a=F.col("a"))
    assert (groups.total, groups.checksum) == (3, reference)
    assert groups.groups == {("x",): 2, (None,): 1}


def test_tables_are_sorted_across_files(spark: SparkSession, tmp_path: Path) -> None:
    rows = spark.range(1000).select((F.col("id") * 7919 % 1000).cast("int").alias("key"))
    write_table(rows, tmp_path / "table", num_rows=1000, order=("key",), row_bytes=400_000)
    files = sorted(path.name for path in (tmp_path / "table").iterdir())
    assert files == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    read = [value for name in files for value in pa.parquet.read_table(tmp_path / "table" / name)["key"].to_pylist()]
    assert read == list(range(1000))


def test_weights_stay_finite(spark: SparkSession) -> None:
    """A product beyond float32 is set aside; a sum stops at the largest float32."""
    config = configure(repeats="sum", event_weights={"buy": 10, "view": 1})
    rows = [
        ("a", "x", "2026-01-10", 3e38, 0, "2026-01-10", "buy"),
        ("a", "x", "2026-01-10 11:00", 3e38, 0, "2026-01-10", "view"),
        ("a", "x", "2026-01-10 12:00", 3e38, 0, "2026-01-10", "view"),
    ]
    marked = mark_bad(events(spark, rows), config.window, config.etl)
    assert [row["reason"] for row in marked.collect()] == ["non_finite_weight", None, None]
    merged = kept_events(mark_repeats(coded(spark, rows[1:], config), config)).collect()
    assert [row["weight"] for row in merged] == [pytest.approx(3.4028234663852886e38)]


def test_old_timestamps_of_spark_are_read_as_the_instants_they_are(spark: SparkSession, tmp_path: Path) -> None:
    path = write_day(tmp_path, "2026-01-10", [("a", "x", at("2026-01-10 12:00"), 1.0, 0)])
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table, path, use_deprecated_int96_timestamps=True, store_schema=False)
    config = configure()
    files = list_interactions(tmp_path, config.window, config.etl)
    rows = read_interactions(spark, check_interactions(files, configure("2026-01-10").window, config.etl)).collect()
    assert [row["event_time"].timestamp() for row in rows] == [at("2026-01-10 12:00").timestamp()]
