"""Row numbers for users and items, stable from day to day: new ids are appended, and every id has a state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from crane_core.config import RunConfig
from crane_core.schema import (
    COLD,
    EVENT_TIME,
    ITEM_ID,
    ITEM_IDX,
    STATE,
    TITLE,
    TOMBSTONE,
    TRAIN,
    TRAINED,
    USER_ID,
    USER_IDX,
)
from jobs.etl.catalog import Catalog
from jobs.etl.events import DAY, ITEM_KEY, USER_KEY, key_of, temporal_split
from jobs.etl.tables import lookup, number_rows

WHOLE_NUMBER = "^(0|[1-9][0-9]{0,17})$"
NUM_SEEDS = 8
IDS_PER_RANGE = 100_000
"""Ids that one task sorts in less time than it takes to divide them into ranges."""


@dataclass(frozen=True)
class Kind:
    """The columns of one kind of ids.

    Attributes:
        column: the id.
        key: its 64-bit key.
        number: its row number.
    """

    column: str
    key: str
    number: str


USERS = Kind(USER_ID, USER_KEY, USER_IDX)
ITEMS = Kind(ITEM_ID, ITEM_KEY, ITEM_IDX)


@dataclass(frozen=True)
class Seen:
    """The ids of one kind in the log.

    Attributes:
        ids: the id, its key, and `entered`, the day it entered training.
        seed: of the keys, under which no two of these ids share one.
        num_ids: number of ids.
    """

    ids: DataFrame
    seed: int
    num_ids: int


def first_seen(valid: DataFrame, config: RunConfig) -> tuple[Seen, Seen]:
    """Every user and every item of the usable rows, once, with the day it entered training: one pass over the log.

    That day is the first on which a daily run of this configuration would have had the id in training; null when no
    event of the id lies in the training period of a temporal split.

    Args:
        valid: usable rows, `RAW_COLUMNS`.
        config: the run.
    """
    etl = config.etl
    held_out = etl.validation_days + etl.test_days if etl.split == "temporal" else 0
    event_day = F.from_utc_timestamp(EVENT_TIME, etl.time_zone).cast("date")
    entered: Column = F.greatest(DAY, F.date_add(event_day, held_out))
    if etl.split == "temporal":
        entered = F.when(temporal_split(config) == TRAIN, entered)
    both = valid.select(
        entered.alias("entered"), F.expr(f"stack(2, true, {USER_ID}, false, {ITEM_ID}) as (is_user, id)")
    )
    both = both.groupBy("is_user", "id").agg(F.min("entered").alias("entered")).localCheckpoint(eager=True)
    seeds = _find_seeds(both)

    def keyed(kind: Kind, is_user: bool) -> Seen:
        seed, num_ids = seeds.get(is_user, (0, 0))
        ids = both.where(F.col("is_user") == is_user).select(F.col("id").alias(kind.column), "entered")
        return Seen(ids.withColumn(kind.key, key_of(kind.column, seed)), seed, num_ids)

    return keyed(USERS, True), keyed(ITEMS, False)


def _find_seeds(both: DataFrame) -> dict[bool, tuple[int, int]]:
    """For users (true) and items (false): the first seed whose keys tell the ids apart, and the number of ids."""
    found: dict[bool, tuple[int, int]] = {}
    for seed in range(NUM_SEEDS):
        keys = both.groupBy("is_user", key_of("id", seed).alias("key")).agg(F.count(F.lit(1)).alias("ids"))
        counts = keys.groupBy("is_user").agg(F.sum("ids").alias("ids"), F.count("key").alias("keys")).collect()
        for row in counts:
            if row["ids"] == row["keys"]:
                found.setdefault(row["is_user"], (seed, row["ids"]))
        if len(found) == len(counts):
            return found
    raise AssertionError(f"no seed of {NUM_SEEDS} tells the ids apart")


def trained_keys(train: DataFrame) -> tuple[DataFrame, DataFrame]:
    """The keys of the users and of the items that have training rows, in one pass over the rows.

    Args:
        train: the training rows, `CODED_COLUMNS`.

    Returns:
        `user_key` and `item_key`, each once.
    """
    both = train.select(F.expr(f"stack(2, true, {USER_KEY}, false, {ITEM_KEY}) as (is_user, key)"))
    both = both.distinct().localCheckpoint(eager=True)
    users, items = both.where("is_user"), both.where("not is_user")
    return users.select(F.col("key").alias(USER_KEY)), items.select(F.col("key").alias(ITEM_KEY))


def number_ids(
    seen: Seen,
    trained: DataFrame,
    kind: Kind,
    config: RunConfig,
    catalog: Catalog | None = None,
    base: DataFrame | None = None,
) -> DataFrame:
    """Number the ids of one kind: those with training rows first, by the day they entered training, then by id.

    With a temporal split, `k_core=1`, whole days and no cap, the numbers of the trained ids are those of every later
    run, new ids are appended. Ids without training rows follow, by id. With `etl.split=label` the order is by id
    alone, as numbers if all are. Ids of `base` keep its numbers whatever they do today, and all others are appended
    to them in this order.

    Args:
        seen: the ids from `first_seen`.
        trained: the keys that have training rows.
        kind: the columns of the ids.
        config: the run.
        catalog: the items that belong whether seen or not.
        base: id, number and, for items, title of the run to go on from.

    Returns:
        The id, its key (null when it is not in `seen`), the number (int), `state` and, for items, `title`.
    """
    column = kind.column
    ids = seen.ids.join(lookup(trained.withColumn("trained", F.lit(True)), seen.num_ids), kind.key, "left")
    belongs = F.lit(True) if config.etl.split == "label" else F.col("trained").isNotNull()
    num_ids = seen.num_ids
    if catalog is not None:
        ids = ids.join(catalog.items.withColumn("listed", F.lit(True)), column, "full")
        belongs |= F.col("listed").isNotNull()
        num_ids += catalog.num_read
    ids = ids.withColumn(STATE, F.when(F.col("trained"), TRAINED).otherwise(COLD)).drop("trained")
    new = ids.where(belongs)
    if base is not None:
        new = new.join(base.select(column), column, "left_anti")
    numbered = number_rows(new, _order(new, column, config), kind.number, 1 if num_ids <= IDS_PER_RANGE else 4)
    if base is not None:
        number = F.col(kind.number)
        numbered = numbered.withColumn(kind.number, (number + F.lit(base.count())).cast("int"))
        kept = base.withColumnRenamed(TITLE, "old_title").join(ids, column, "left")
        kept = kept.withColumn(STATE, F.coalesce(STATE, F.lit(TOMBSTONE)))
        if catalog is not None:
            kept = kept.withColumn(TITLE, F.when(F.col("listed"), F.col(TITLE)).otherwise(F.col("old_title")))
        numbered = numbered.unionByName(kept.select(numbered.columns))
    return numbered.drop("entered", "listed").localCheckpoint(eager=True)


def _order(ids: DataFrame, column: str, config: RunConfig) -> Sequence[Column]:
    cold = F.col(STATE) == COLD
    if config.etl.split == "label":
        numeric = ids.where(~F.col(column).rlike(WHOLE_NUMBER)).isEmpty()
        return [cold, F.col(column).cast("bigint") if numeric else F.col(column), F.col(column)]
    return [cold, F.when(~cold, F.col("entered")), F.col(column)]
