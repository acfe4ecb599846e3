"""Read the rows of the interaction log, mark those that cannot be used, and split the others by time.

Rows that are sound by themselves are carried on as numbers: users and items become 64-bit keys, event types become
codes. So the one shuffle of the whole log moves rows of fixed width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import reduce

import pyarrow as pa
import pyarrow.types as pt
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from crane_core.config import Etl, RunConfig
from crane_core.config import Window as RunWindow
from crane_core.raw.checks import Footer
from crane_core.raw.files import RawFile
from crane_core.schema import (
    EVENT_TIME,
    EVENT_TYPE,
    ITEM_ID,
    LABEL,
    REASON,
    SPLIT,
    TEST,
    TRAIN,
    USER_ID,
    VALIDATION,
    WEIGHT,
)
from jobs.etl.reading import read_files
from jobs.etl.tables import lookup

logger = logging.getLogger(__name__)

DAY = "dt"
USER_KEY = "user_key"
ITEM_KEY = "item_key"
EVENT_CODE = "event_code"
MERGED_WEIGHT = "merged_weight"
LARGEST_WEIGHT = 3.4028234663852886e38
"""The largest float32, as a double."""
RAW_COLUMNS = (USER_ID, ITEM_ID, EVENT_TIME, WEIGHT, LABEL, EVENT_TYPE, DAY)
CODED_COLUMNS = (USER_KEY, ITEM_KEY, EVENT_TIME, WEIGHT, LABEL, EVENT_CODE, DAY)
MALFORMED = (
    "null_id",
    "empty_id",
    "invalid_utf8",
    "null_event_time",
    "non_finite_weight",
    "negative_weight",
    "unknown_event_type",
    "bad_label",
    "after_arrival",
    "too_late",
)
"""Reasons that mean broken data. They count towards `etl.max_quarantine_share`."""


def read_interactions(spark: SparkSession, footers: Sequence[Footer]) -> DataFrame:
    """The raw rows of the files, in common types: weight float (null kept), label bigint, dt date.

    Files are grouped by the physical types of their footers, each group is read as it is stored and then cast.
    """
    groups: dict[tuple[str, str, str, str], list[RawFile]] = {}
    for footer in footers:
        event_time, weight, label = (stored_type(footer.types.get(name)) for name in (EVENT_TIME, WEIGHT, LABEL))
        event_type = "string" if EVENT_TYPE in footer.types else ""
        groups.setdefault((event_time, weight, label, event_type), []).append(footer.file)
    tables = []
    for (event_time, weight, label, event_type), files in sorted(groups.items()):
        optional = {WEIGHT: (weight, "float"), LABEL: (label, "bigint"), EVENT_TYPE: (event_type, "string")}
        schema = f"{USER_ID} string, {ITEM_ID} string, {EVENT_TIME} {event_time}"
        schema += "".join(f", {name} {stored}" for name, (stored, _) in optional.items() if stored)
        rows = read_files(spark, files, schema, DAY)
        if event_time == "bigint":
            rows = rows.withColumn(EVENT_TIME, F.timestamp_micros(F.floor(F.col(EVENT_TIME) / 1000)))
        cast = [
            (F.col(name) if stored else F.lit(None)).cast(wanted).alias(name)
            for name, (stored, wanted) in optional.items()
        ]
        tables.append(rows.select(USER_ID, ITEM_ID, EVENT_TIME, *cast, DAY))
    return reduce(DataFrame.unionByName, tables)


def mark_bad(rows: DataFrame, window: RunWindow, etl: Etl) -> DataFrame:
    """Add `reason`: why a row cannot be used, judged alone; null when it can. The first reason that applies counts."""
    weight = F.col(WEIGHT)
    next_day = F.to_utc_timestamp(F.date_add(DAY, 1).cast("timestamp"), etl.time_zone)
    oldest = F.to_utc_timestamp(F.date_sub(DAY, etl.lookback_days).cast("timestamp"), etl.time_zone)
    checks = [
        ("null_id", F.col(USER_ID).isNull() | F.col(ITEM_ID).isNull()),
        ("empty_id", (F.trim(USER_ID) == "") | (F.trim(ITEM_ID) == "")),
        ("invalid_utf8", ~(F.is_valid_utf8(USER_ID) & F.is_valid_utf8(ITEM_ID))),
        ("null_event_time", F.col(EVENT_TIME).isNull()),
        ("non_finite_weight", F.isnan(weight) | (F.abs(weight) == float("inf"))),
        ("negative_weight", weight < 0),
        ("non_finite_weight", F.abs(counted_weight(etl)) == float("inf")),
        ("after_cutoff", F.col(EVENT_TIME) >= F.lit(window.end)),
        ("after_arrival", F.col(EVENT_TIME) >= next_day),
        ("too_late", F.col(EVENT_TIME) < oldest),
        ("below_min_weight", counted_weight(etl) < etl.min_weight),
        ("zero_weight", counted_weight(etl) == 0),
    ]
    if etl.split == "label":
        known = F.coalesce(F.col(LABEL).isin(TRAIN, VALIDATION, TEST), F.lit(False))
        checks.insert(6, ("bad_label", ~known))
    if etl.event_weights:
        known = F.col(EVENT_TYPE).isNull() | F.col(EVENT_TYPE).isin(*etl.event_weights)
        checks.insert(6, ("unknown_event_type", ~known))
    first = etl.first_instant(window)
    if first is not None:
        checks.append(("before_history", F.col(EVENT_TIME) < F.lit(first)))
    reason = F.lit(None).cast("string")
    for name, applies in reversed(checks):
        reason = F.when(applies, name).otherwise(reason)
    return rows.withColumn(REASON, reason)


def readable_text(rows: DataFrame) -> DataFrame:
    """Rows whose text every reader can decode: invalid bytes become the replacement character."""
    return rows.withColumns({name: F.make_valid_utf8(name) for name in (USER_ID, ITEM_ID, EVENT_TYPE)})


def counted_weight(etl: Etl) -> Column:
    """The weight of a row, 1 where there is none, times that of its event type."""
    weight = F.coalesce(F.col(WEIGHT), F.lit(1.0).cast("float"))
    if not etl.event_weights:
        return weight
    factor = F.lit(1.0)
    for name, value in sorted(etl.event_weights.items()):
        factor = F.when(F.col(EVENT_TYPE) == name, float(value)).otherwise(factor)
    return (weight * factor).cast("float")


def with_codes(rows: DataFrame, etl: Etl, user_seed: int = 0, item_seed: int = 0) -> DataFrame:
    """Usable rows as numbers: the columns of `CODED_COLUMNS`, `weight` the one that counts.

    Args:
        rows: columns of `RAW_COLUMNS`.
        etl: the event types and their weights.
        user_seed, item_seed: of the keys, from `first_seen`.
    """
    code = F.lit(None).cast("tinyint")
    for index, name in enumerate(sorted(etl.event_weights)):
        code = F.when(F.col(EVENT_TYPE) == name, F.lit(index).cast("tinyint")).otherwise(code)
    return rows.select(
        key_of(USER_ID, user_seed).alias(USER_KEY),
        key_of(ITEM_ID, item_seed).alias(ITEM_KEY),
        EVENT_TIME,
        counted_weight(etl).alias(WEIGHT),
        F.col(LABEL).cast("tinyint").alias(LABEL),
        code.alias(EVENT_CODE),
        DAY,
    )


def key_of(column: str, seed: int) -> Column:
    """64-bit key of an id. Of everything written, only the drift of item groups depends on the keys."""
    return F.xxhash64(F.lit(seed), F.col(column))


def mark_excess(rows: DataFrame, etl: Etl) -> DataFrame:
    """Add `reason`: `over_daily_cap` for the events of a user and day beyond `etl.max_events_per_day`.

    The first events of a day are kept, so that no later row decides about an earlier one.
    """
    if etl.max_events_per_day is None:
        return rows.withColumn(REASON, F.lit(None).cast("string"))
    day = F.from_utc_timestamp(EVENT_TIME, etl.time_zone).cast("date")
    order = (EVENT_TIME, ITEM_KEY, F.desc(WEIGHT), LABEL, EVENT_CODE)
    place = F.row_number().over(Window.partitionBy(USER_KEY, day).orderBy(*order))
    return rows.withColumn(REASON, F.when(place > etl.max_events_per_day, "over_daily_cap"))


def mark_repeats(rows: DataFrame, config: RunConfig) -> DataFrame:
    """Keep the first event of every user and item; `reason` becomes `duplicate` or `repeat` for the others.

    A duplicate has the time of the event before it; of such events the one with the largest weight is kept, then the
    one with the smallest label. With `etl.repeats` `sum` or `max`, `merged_weight` is the sum or the maximum of the
    weights of a pair within one split period, at most the largest float32. Events of a later period do not enter.
    `weight` stays that of the event.
    """
    etl = config.etl
    pair = Window.partitionBy(USER_KEY, ITEM_KEY).orderBy(EVENT_TIME, F.desc(WEIGHT), LABEL, EVENT_CODE)
    same = F.col(EVENT_TIME) == F.lag(EVENT_TIME).over(pair)
    reason = F.when(F.row_number().over(pair) > 1, F.when(same, "duplicate").otherwise("repeat"))
    marked = rows.withColumn(REASON, reason.cast("string"))
    if etl.repeats == "first":
        return marked
    period = {"temporal": temporal_split(config), "label": F.col(LABEL)}.get(etl.split, F.lit(TRAIN))
    counted = F.when(F.coalesce(F.col(REASON), F.lit("")) != "duplicate", F.col(WEIGHT).cast("double"))
    own = Window.partitionBy(USER_KEY, ITEM_KEY, period).orderBy(EVENT_TIME, F.desc(WEIGHT), LABEL, EVENT_CODE)
    # In the order of the events, so that the sum is the same to the last bit.
    whole = own.rowsBetween(Window.unboundedPreceding, Window.unboundedFollowing)
    total = {"sum": F.sum, "max": F.max}[etl.repeats](counted).over(whole)
    return marked.withColumn(MERGED_WEIGHT, F.least(total, F.lit(LARGEST_WEIGHT)).cast("float"))


def kept_events(events: DataFrame) -> DataFrame:
    """The events that `mark_repeats` keeps, with the merged weight where there is one."""
    kept = events.where(F.col(REASON).isNull()).drop(REASON)
    return kept.withColumn(WEIGHT, F.col(MERGED_WEIGHT)).drop(MERGED_WEIGHT) if MERGED_WEIGHT in kept.columns else kept


def assign_split(rows: DataFrame, config: RunConfig) -> DataFrame:
    """Add `split` (tinyint) to rows with one event per user and item; `leave_last` needs their `item_id`."""
    if config.etl.split == "label":
        split = F.col(LABEL)
    elif config.etl.split == "temporal":
        split = temporal_split(config)
    elif config.etl.split == "none":
        split = F.lit(TRAIN)
    else:
        backwards = Window.partitionBy(USER_KEY).orderBy(F.desc(EVENT_TIME), F.desc(ITEM_ID))
        place = F.row_number().over(backwards)
        enough = F.count(F.lit(1)).over(Window.partitionBy(USER_KEY)) >= 3
        split = F.when(enough & (place == 1), TEST).when(enough & (place == 2), VALIDATION).otherwise(TRAIN)
    return rows.withColumn(SPLIT, split.cast("tinyint"))


def temporal_split(config: RunConfig) -> Column:
    """Period of an event under a temporal split."""
    validation, test = config.etl.cutoffs(config.window)
    time = F.col(EVENT_TIME)
    return F.when(time < F.lit(validation), TRAIN).when(time < F.lit(test), VALIDATION).otherwise(TEST)


def find_bots(train: DataFrame, most: int | None) -> DataFrame:
    """Users with more training rows than `most`: one column, `user_key`."""
    counts = train.groupBy(USER_KEY).count()
    return counts.where(F.lit(False) if most is None else F.col("count") > most).select(USER_KEY)


def find_core(train: DataFrame, k: int) -> DataFrame:
    """The training rows whose user and item both keep at least k rows: the largest such set.

    Args:
        train: one row per user and item.
        k: 1 keeps all.
    """
    if k == 1:
        return train
    core, count = train.select(USER_KEY, ITEM_KEY).localCheckpoint(eager=True), -1
    while count != (count := core.count()):
        for column in (USER_KEY, ITEM_KEY):
            strong = core.groupBy(column).count().where(F.col("count") >= k).select(column)
            core = core.join(lookup(strong, count), column, "left_semi")
        core = core.select(USER_KEY, ITEM_KEY).localCheckpoint(eager=True)
        logger.info("core k=%d rows=%d", k, count)
    return lookup(core, count)


def stored_type(kind: pa.DataType | None) -> str:
    """Spark type that reads a column as it is stored; "" when it is absent."""
    if kind is None:
        return ""
    if pt.is_boolean(kind):
        return "boolean"
    if pt.is_timestamp(kind):
        return "bigint" if kind.unit == "ns" else "timestamp"
    return _SPARK_TYPES.get(str(kind), "string")


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
