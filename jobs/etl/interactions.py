"""Read the interaction log: quarantine bad rows, split by time, number users and items, count everything.

The fingerprint covers the files read; nothing that arrived or happened at or after `window.end` is used, and ids
come from training rows, so what lies behind the cutoff cannot move a row number.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.types as pt
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from crane_core.config import Etl, RunConfig
from crane_core.config import Window as RunWindow
from crane_core.errors import DataError
from crane_core.raw import (
    INTERACTIONS_FOLDER,
    Footer,
    check_interactions,
    check_items,
    list_interactions,
    list_items,
    raw_root,
)
from crane_core.schema import (
    EVENT_TIME,
    ITEM_ID,
    ITEM_IDX,
    LABEL,
    REASON,
    SPLIT,
    TEST,
    TITLE,
    TRAIN,
    USER_ID,
    USER_IDX,
    VALIDATION,
    WEIGHT,
)
from crane_core.store import ArtifactStore
from jobs.etl.session import glob_escaped, open_session, readable
from jobs.etl.tables import number_rows, tally, write_table
from jobs.runner import Job, Result, run_stage, scratch

logger = logging.getLogger(__name__)

DAY = "dt"
RAW_COLUMNS = (USER_ID, ITEM_ID, EVENT_TIME, WEIGHT, LABEL, DAY)
MALFORMED = (
    "null_id",
    "empty_id",
    "null_event_time",
    "non_finite_weight",
    "negative_weight",
    "bad_label",
    "after_arrival",
    "too_late",
)
"""Reasons that speak of broken data and count towards `etl.max_quarantine_share`."""
WHOLE_NUMBER = "^(0|[1-9][0-9]{0,17})$"
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def source(config: RunConfig, store: ArtifactStore) -> list[list[str | int]]:
    """Identity of the raw files the run reads."""
    root = raw_root(config, store.storage.uri)
    files = list_interactions(root, config.window, config.etl.history_days) + list_items(root)
    return [file.identity for file in files]


def read_interactions(spark: SparkSession, root: str, footers: Sequence[Footer]) -> DataFrame:
    """The raw rows of the files, in common types: weight float (null kept), label bigint, dt date.

    Files are grouped by the physical types of their footers, each group is read as it is stored and then cast.
    """
    groups: dict[tuple[str, str, str], list[str]] = {}
    for footer in footers:
        event_time, weight, label = (_stored(footer.types.get(name)) for name in (EVENT_TIME, WEIGHT, LABEL))
        groups.setdefault((event_time, weight, label), []).append(glob_escaped(footer.file.path))
    tables = []
    for (event_time, weight, label), paths in sorted(groups.items()):
        schema = f"{USER_ID} string, {ITEM_ID} string, {EVENT_TIME} {event_time}, {DAY} date"
        schema += f", {WEIGHT} {weight}" if weight else ""
        schema += f", {LABEL} {label}" if label else ""
        rows = spark.read.schema(schema).option("basePath", f"{root}/{INTERACTIONS_FOLDER}").parquet(*paths)
        if event_time == "bigint":
            rows = rows.withColumn(EVENT_TIME, F.timestamp_micros(F.floor(F.col(EVENT_TIME) / 1000)))
        tables.append(
            rows.select(
                USER_ID,
                ITEM_ID,
                EVENT_TIME,
                (F.col(WEIGHT) if weight else F.lit(None)).cast("float").alias(WEIGHT),
                (F.col(LABEL) if label else F.lit(None)).cast("bigint").alias(LABEL),
                DAY,
            )
        )
    return reduce(DataFrame.unionByName, tables)


def mark_bad(rows: DataFrame, window: RunWindow, etl: Etl) -> DataFrame:
    """Add `reason`: why a row by itself cannot be used, null when it can. The first that applies counts."""
    weight = F.col(WEIGHT)
    arrival = F.col(DAY).cast("timestamp")
    checks = [
        ("null_id", F.col(USER_ID).isNull() | F.col(ITEM_ID).isNull()),
        ("empty_id", (F.trim(USER_ID) == "") | (F.trim(ITEM_ID) == "")),
        ("null_event_time", F.col(EVENT_TIME).isNull()),
        ("non_finite_weight", F.isnan(weight) | (F.abs(weight) == float("inf"))),
        ("negative_weight", weight < 0),
        ("after_cutoff", F.col(EVENT_TIME) >= F.lit(window.end)),
        ("after_arrival", F.col(EVENT_TIME) >= arrival + F.expr("interval 1 day")),
        ("too_late", F.col(EVENT_TIME) < arrival - F.expr(f"interval {etl.lookback_days} day")),
        ("below_min_weight", F.coalesce(weight, F.lit(1.0)) < etl.min_weight),
    ]
    if etl.split == "label":
        known = F.coalesce(F.col(LABEL).isin(TRAIN, VALIDATION, TEST), F.lit(False))
        checks.insert(5, ("bad_label", ~known))
    reason = F.lit(None).cast("string")
    for name, applies in reversed(checks):
        reason = F.when(applies, name).otherwise(reason)
    return rows.withColumn(REASON, reason)


def mark_repeats(rows: DataFrame) -> DataFrame:
    """Keep the first event of every user and item; `reason` becomes `duplicate` or `repeat` for the others.

    A duplicate has the time of the event before it. Of equal events the one that arrived first is kept, then the
    one with the largest weight, then the smallest label.
    """
    pair = Window.partitionBy(USER_ID, ITEM_ID).orderBy(EVENT_TIME, DAY, F.desc(WEIGHT), LABEL)
    same = F.col(EVENT_TIME) == F.lag(EVENT_TIME).over(pair)
    reason = F.when(F.row_number().over(pair) > 1, F.when(same, "duplicate").otherwise("repeat"))
    return rows.withColumn(REASON, reason.cast("string"))


def assign_split(rows: DataFrame, config: RunConfig) -> DataFrame:
    """Add `split` (tinyint) to rows with one event per user and item."""
    if config.etl.split == "label":
        split = F.col(LABEL)
    elif config.etl.split == "temporal":
        split = _temporal(config)
    else:
        backwards = Window.partitionBy(USER_ID).orderBy(F.desc(EVENT_TIME), F.desc(ITEM_ID))
        place = F.row_number().over(backwards)
        enough = F.count(F.lit(1)).over(Window.partitionBy(USER_ID)) >= 3
        split = F.when(enough & (place == 1), TEST).when(enough & (place == 2), VALIDATION).otherwise(TRAIN)
    return rows.withColumn(SPLIT, split.cast("tinyint"))


def find_core(train: DataFrame, k: int) -> DataFrame:
    """The training rows whose user and item both keep at least k rows: the largest such set.

    Args:
        train: one row per user and item.
        k: 1 keeps all.
    """
    if k == 1:
        return train
    core, count = train.localCheckpoint(eager=True), -1
    while count != (count := core.count()):
        for column in (USER_ID, ITEM_ID):
            strong = core.groupBy(column).count().where(F.col("count") >= k).select(column)
            core = core.join(strong, column, "left_semi")
        core = core.select(train.columns).localCheckpoint(eager=True)
        logger.info("core k=%d rows=%d", k, count)
    return core


def number_ids(
    valid: DataFrame, core: DataFrame, column: str, name: str, config: RunConfig, catalog: DataFrame | None = None
) -> DataFrame:
    """Number the ids of one kind: those with training rows first, by the day they entered training, then by id.

    The day is the first on which a daily run of this configuration would have had the id in training. With a
    temporal split, `k_core=1` and whole days, the numbers of ids that a run has are therefore those of every later
    run; new ids are appended. Ids without training rows follow, by id. With `etl.split=label` the order is by id
    alone, as numbers if all are.

    Args:
        valid: usable rows before repeats are dropped.
        core: training rows.
        column: `user_id` or `item_id`.
        name: of the number.
        config: the run.
        catalog: ids that belong whether seen or not, one row per id, further columns are kept.

    Returns:
        The id, `name` (int), `is_cold` (no training row), and the further columns of the catalog.
    """
    etl = config.etl
    held_out = etl.validation_days + etl.test_days if etl.split == "temporal" else 0
    entered = F.greatest(DAY, F.date_add(F.col(EVENT_TIME).cast("date"), held_out))
    seen = valid.where(_temporal(config) == TRAIN) if etl.split == "temporal" else valid
    seen = seen.groupBy(column).agg(F.min(entered).alias("entered"))
    trained = core.select(column).distinct().withColumn("trained", F.lit(True))
    ids = seen.join(trained, column, "left")
    if etl.split != "label":
        ids = ids.where("trained")
    if catalog is not None:
        ids = ids.join(catalog, column, "full")
    cold = F.col("trained").isNull()
    ids = ids.withColumn("is_cold", cold).withColumn("entered", F.when(~cold, F.col("entered"))).drop("trained")
    order: list[Column] = [F.col("is_cold"), F.col("entered"), F.col(column)]
    if etl.split == "label":
        ids = ids.localCheckpoint(eager=True)
        numeric = ids.where(~F.col(column).rlike(WHOLE_NUMBER)).isEmpty()
        order = [order[0], F.col(column).cast("bigint") if numeric else F.col(column)]
    return number_rows(ids, order, name, partitions=4).drop("entered")


def clean_catalog(items: DataFrame) -> tuple[DataFrame, DataFrame]:
    """One row per item id, and the rows set aside: null_id, empty_id, duplicate_item (the least title is kept)."""
    place = F.row_number().over(Window.partitionBy(ITEM_ID).orderBy(F.col(TITLE).asc_nulls_last()))
    reason = (
        F.when(F.col(ITEM_ID).isNull(), "null_id")
        .when(F.trim(ITEM_ID) == "", "empty_id")
        .when(place > 1, "duplicate_item")
    )
    marked = items.withColumn(REASON, reason)
    return marked.where(F.col(REASON).isNull()).drop(REASON), marked.where(F.col(REASON).isNotNull())


def run(job: Job) -> Result:
    """Run the stage; see the module docstring."""
    config = job.config
    root = raw_root(config, job.store.storage.uri)
    files = list_interactions(root, config.window, config.etl.history_days)
    footers = check_interactions(files, config.window, needs_label=config.etl.split == "label")
    catalog_footers = check_items(list_items(root))
    num_read = sum(footer.num_rows for footer in footers)
    logger.info("read files=%d rows=%d catalog_files=%d", len(footers), num_read, len(catalog_footers))
    spark = open_session(config.runtime, scratch(job.store.storage.uri), num_read)

    with readable():
        rows = mark_bad(read_interactions(spark, str(root), footers), config.window, config.etl)
        rows = rows.localCheckpoint(eager=True)
    valid, bad = rows.where(F.col(REASON).isNull()), rows.where(F.col(REASON).isNotNull())
    _stop_if_malformed(bad, num_read, config, root)
    events = mark_repeats(valid).localCheckpoint(eager=True)
    kept = assign_split(events.where(F.col(REASON).isNull()), config).localCheckpoint(eager=True)
    train = kept.where(F.col(SPLIT) == TRAIN)
    core = find_core(train, config.etl.k_core)
    if core.isEmpty():
        raise _no_training_rows(num_read, config, root)

    catalog, catalog_bad = _read_catalog(spark, root, catalog_footers)
    users = number_ids(valid, core, USER_ID, USER_IDX, config)
    items = number_ids(valid, core, ITEM_ID, ITEM_IDX, config, catalog)
    placed = (
        kept.withColumn(WEIGHT, F.coalesce(WEIGHT, F.lit(1.0).cast("float")))
        .join(users.select(USER_ID, USER_IDX), USER_ID, "left")
        .join(items.select(ITEM_ID, ITEM_IDX), ITEM_ID, "left")
    )
    pair = [USER_ID, ITEM_ID]
    weak = train.join(core.select(pair), pair, "left_anti").withColumn(REASON, F.lit("k_core"))
    if config.etl.k_core > 1:
        placed = placed.join(weak.select(pair), pair, "left_anti")
    placed = placed.localCheckpoint(eager=True)
    known = F.col(USER_IDX).isNotNull() & F.col(ITEM_IDX).isNotNull()
    unknown = F.when(F.col(USER_IDX).isNull(), "unknown_user").otherwise("unknown_item")
    quarantine = [bad, events.where(F.col(REASON).isNotNull())]
    if config.etl.k_core > 1:
        quarantine.append(weak)

    out = job.out
    write_table(
        placed.where(known).select(USER_IDX, ITEM_IDX, EVENT_TIME, WEIGHT, SPLIT),
        out / "interactions",
        num_read,
        (USER_IDX, ITEM_IDX),
    )
    write_table(users.select(USER_IDX, USER_ID), out / "users", num_read, (USER_IDX,))
    write_table(items.select(ITEM_IDX, ITEM_ID, TITLE), out / "items", num_read, (ITEM_IDX,))
    held = (USER_ID, ITEM_ID, EVENT_TIME, WEIGHT, SPLIT, USER_IDX, ITEM_IDX)
    write_table(placed.where(~known).select(*held, unknown.alias(REASON)), out / "cold", num_read)
    write_table(
        reduce(DataFrame.unionByName, [part.select(*RAW_COLUMNS, REASON) for part in quarantine]),
        out / "quarantine",
        num_read,
    )
    write_table(catalog_bad, out / "quarantine_items", num_read)
    return _report(job, spark, num_read, sum(footer.num_rows for footer in catalog_footers))


def _report(job: Job, spark: SparkSession, num_read: int, num_catalog: int) -> Result:
    """Read back what was written, check that every row read is somewhere, and describe it in `quality.json`."""
    tables = {path.name: spark.read.parquet(str(path)) for path in sorted(job.out.iterdir())}
    split, day, reason = F.col(SPLIT), F.to_date(EVENT_TIME), F.col(REASON)
    groups = {
        "interactions": {"split": split, "day": day},
        "cold": {"split": split, "day": day, "reason": reason},
        "quarantine": {"reason": reason},
        "quarantine_items": {"reason": reason},
    }
    found = {name: tally(table, **groups.get(name, {})) for name, table in tables.items()}
    splits, quarantine = found["interactions"].by(0), found["quarantine"].by(0)
    cold_splits, cold = found["cold"].by(0), found["cold"].by(2)
    accounted = sum(found[name].total for name in ("interactions", "cold", "quarantine"))
    assert accounted == num_read, f"{num_read} rows read, {accounted} accounted for"
    assert str(TRAIN) not in cold_splits, f"training rows without an index: {cold_splits}"

    train = tables["interactions"].where(split == TRAIN)
    per_user, per_item = (_distribution(train, column) for column in (USER_IDX, ITEM_IDX))
    num_train = splits.get(str(TRAIN), 0)
    days = Counter(found["interactions"].by(1))
    days.update(found["cold"].by(1))
    facts: dict[str, Any] = {
        "num_users": found["users"].total,
        "num_items": found["items"].total,
        "num_train_users": per_user["count"],
        "num_train_items": per_item["count"],
        "num_rows_read": num_read,
        "num_train": num_train,
        "num_validation": splits.get(str(VALIDATION), 0),
        "num_test": splits.get(str(TEST), 0),
        "num_cold_rows": found["cold"].total,
        "cold": cold,
        "quarantine": quarantine,
        "catalog": {"num_rows_read": num_catalog, "quarantine": found["quarantine_items"].by(0)},
        "cutoffs": _cutoffs(job.config),
    }
    quality = {
        **facts,
        "events_per_day": dict(sorted(days.items())),
        "interactions_per_user": per_user,
        "interactions_per_item": per_item,
        "density": num_train / max(1, per_user["count"] * per_item["count"]),
        "cold_per_split": cold_splits,
    }
    (job.out / "quality.json").write_text(json.dumps(quality, indent=1))
    logger.info(
        "split train=%d validation=%d test=%d cold=%d quarantined=%d users=%d items=%d",
        *(facts[name] for name in ("num_train", "num_validation", "num_test", "num_cold_rows")),
        found["quarantine"].total,
        facts["num_users"],
        facts["num_items"],
    )
    return Result(facts, {name: entry.checksum for name, entry in found.items()})


def _read_catalog(spark: SparkSession, root: Path, footers: Sequence[Footer]) -> tuple[DataFrame, DataFrame]:
    schema = f"{ITEM_ID} string, {TITLE} string"
    if not footers:
        return clean_catalog(spark.createDataFrame([], schema))
    with readable():
        rows = spark.read.schema(schema).parquet(*(glob_escaped(footer.file.path) for footer in footers))
        return clean_catalog(rows.localCheckpoint(eager=True))


def _temporal(config: RunConfig) -> Column:
    validation, test = config.etl.cutoffs(config.window)
    time = F.col(EVENT_TIME)
    return F.when(time < F.lit(validation), TRAIN).when(time < F.lit(test), VALIDATION).otherwise(TEST)


def _cutoffs(config: RunConfig) -> dict[str, str | None]:
    first: tuple[Any, Any] = (None, None)
    if config.etl.split == "temporal":
        first = config.etl.cutoffs(config.window)
    names = ("validation", "test", "end")
    return {
        name: instant.isoformat() if instant else None
        for name, instant in zip(names, (*first, config.window.end), strict=True)
    }


def _counts(rows: DataFrame, column: str) -> dict[str, int]:
    return {str(row[column]): row["count"] for row in rows.groupBy(column).count().orderBy(column).collect()}


def _distribution(rows: DataFrame, column: str) -> dict[str, float]:
    count = F.col("count")
    row = (
        rows.groupBy(column)
        .count()
        .agg(F.count(count).alias("ids"), F.avg(count).alias("mean"), F.percentile(count, list(QUANTILES)).alias("at"))
        .first()
    )
    assert row is not None
    quantiles = {f"p{round(100 * share)}": value for share, value in zip(QUANTILES, row["at"] or (), strict=False)}
    return {"count": row["ids"], "mean": row["mean"], **quantiles}


def _stop_if_malformed(bad: DataFrame, num_read: int, config: RunConfig, root: Path) -> None:
    counts = {reason: count for reason, count in _counts(bad, REASON).items() if reason in MALFORMED}
    malformed = sum(counts.values())
    if malformed <= config.etl.max_quarantine_share * num_read:
        return
    days = bad.where(F.col(REASON).isin(list(counts))).groupBy(DAY).count().orderBy(F.desc("count"), DAY).limit(3)
    worst = ", ".join(f"{DAY}={row[DAY]} ({row['count']} rows)" for row in days.collect())
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    raise DataError(
        f"{root / INTERACTIONS_FOLDER}: {malformed} of {num_read} rows are malformed ({reasons}), most of them in "
        f"{worst}; etl.max_quarantine_share is {config.etl.max_quarantine_share}.",
        "Correct the deliveries; after_arrival and too_late mean that dt is not the day of arrival, or that "
        "etl.lookback_days is too short. Or raise etl.max_quarantine_share.",
    )


def _no_training_rows(num_read: int, config: RunConfig, root: Path) -> DataError:
    validation = _cutoffs(config)["validation"]
    before = f" before the validation period starts at {validation}" if validation else ""
    return DataError(
        f"{root / INTERACTIONS_FOLDER}: {num_read} rows read, 0 usable training rows{before} "
        f"(etl.k_core={config.etl.k_core}, etl.min_weight={config.etl.min_weight}).",
        "Read more history, shorten etl.validation_days and etl.test_days, or lower k_core and min_weight.",
    )


def _stored(kind: pa.DataType | None) -> str:
    """How Spark must read a column to get it as it is stored; "" when it is absent."""
    if kind is None:
        return ""
    if pt.is_timestamp(kind):
        return "bigint" if kind.unit == "ns" else "timestamp"
    return _SPARK_TYPES[str(kind)]


_SPARK_TYPES = {
    "float": "float",
    "double": "double",
    "int8": "tinyint",
    "int16": "smallint",
    "int32": "int",
    "int64": "bigint",
    "uint8": "smallint",
    "uint16": "int",
    "uint32": "bigint",
    "uint64": "decimal(20,0)",
}


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("etl.interactions", run, source, argv)


if __name__ == "__main__":
    raise SystemExit(main())
