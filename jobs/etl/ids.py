"""Row numbers for users and items: stable over days, append-only, and told apart by what became of the id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from crane_core.config import RunConfig
from crane_core.errors import ConfigError
from crane_core.schema import COLD, EVENT_TIME, GONE, ITEM_ID, STATE, TITLE, TRAIN, TRAINED, USER_ID
from crane_core.storage.artifacts import Artifact, ArtifactStore
from jobs.etl.events import DAY, ITEM_KEY, USER_KEY, key_of, temporal_split
from jobs.etl.tables import number_rows

WHOLE_NUMBER = "^(0|[1-9][0-9]{0,17})$"
NUM_SEEDS = 8


@dataclass(frozen=True)
class Seen:
    """The ids of one kind in the log.

    Attributes:
        ids: the id, its key, and `entered`, the day it entered training.
        seed: of the keys, under which no two of these ids share one.
    """

    ids: DataFrame
    seed: int


def base_artifact(config: RunConfig, store: ArtifactStore) -> Artifact | None:
    """The interactions of the run whose ids are kept; None when `etl.base_run` names none.

    Raises:
        ConfigError: that run's window does not end before this one's: its ids would come from the future.
        ArtifactError: that run has no interactions.
    """
    run = config.etl.base_run
    if run is None:
        return None
    base = store.artifact(run, "etl.interactions")
    end = datetime.fromisoformat(base.facts["cutoffs"]["end"])
    if end >= config.window.end:
        raise ConfigError(
            f"etl.base_run={run} ends at {end:%Y-%m-%d %H:%M} UTC, this run at {config.window.end:%Y-%m-%d %H:%M}: "
            "ids can only be taken from an earlier window.",
            "Set etl.base_run to a run whose window ends before this one's, or to null.",
        )
    return base


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
    users, items = both.where("is_user"), both.where("not is_user")
    return _keyed(users, USER_ID, USER_KEY), _keyed(items, ITEM_ID, ITEM_KEY)


def _keyed(seen: DataFrame, column: str, key: str) -> Seen:
    seen = seen.select(F.col("id").alias(column), "entered")
    for seed in range(NUM_SEEDS):
        keyed = seen.withColumn(key, key_of(column, seed))
        if keyed.groupBy(key).count().where("count > 1").isEmpty():
            return Seen(keyed, seed)
    raise AssertionError(f"{column}: no seed of {NUM_SEEDS} tells the ids apart")


def number_ids(
    seen: DataFrame,
    trained: DataFrame,
    column: str,
    key: str,
    name: str,
    config: RunConfig,
    catalog: DataFrame | None = None,
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
        column: `user_id` or `item_id`.
        key: name of the key.
        name: of the number.
        config: the run.
        catalog: item_id and title of the items that belong whether seen or not, one row per item.
        base: id, number and, for items, title of the run to go on from.

    Returns:
        The id, its key (null when it is not in `seen`), the number (int), `state` and, for items, `title`.
    """
    ids = seen.join(trained.withColumn("trained", F.lit(True)), key, "left")
    belongs = F.lit(True) if config.etl.split == "label" else F.col("trained").isNotNull()
    if catalog is not None:
        ids = ids.join(catalog.withColumn("listed", F.lit(True)), column, "full")
        belongs |= F.col("listed").isNotNull()
    ids = ids.withColumn(STATE, F.when(F.col("trained"), TRAINED).otherwise(COLD)).drop("trained")
    new = ids.where(belongs)
    if base is not None:
        new = new.join(base.select(column), column, "left_anti")
    numbered = number_rows(new, _order(new, column, config), name, partitions=4)
    if base is not None:
        start = base.count()
        numbered = numbered.withColumn(name, (F.col(name) + F.lit(start)).cast("int"))
        kept = base.withColumnRenamed(TITLE, "old_title").join(ids, column, "left")
        kept = kept.withColumn(STATE, F.coalesce(STATE, F.lit(GONE)))
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
