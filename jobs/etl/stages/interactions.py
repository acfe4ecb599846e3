"""Read the interaction log: quarantine bad rows, split by time, number users and items, count everything.

The fingerprint covers the files read. Nothing that arrived or happened at or after `window.end` is used. Ids come from
training rows, so rows behind the cutoff cannot move a row number. The log is shuffled once, by user. It carries keys
instead of ids; row numbers and ids are joined to it at the end.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.storagelevel import StorageLevel

from crane_core.config import RunConfig
from crane_core.errors import DataError
from crane_core.evaluation.rules import check_columns
from crane_core.raw.checks import Footer, check_interactions, check_items, ignored_columns, item_columns
from crane_core.raw.files import (
    INTERACTIONS_FOLDER,
    arrives_within,
    check_zone,
    list_interactions,
    list_items,
    raw_root,
)
from crane_core.raw.location import Location
from crane_core.raw.overlap import check_delivered
from crane_core.schema import (
    EVENT_TIME,
    EVENT_TYPE,
    ITEM_ID,
    ITEM_IDX,
    REASON,
    SPLIT,
    STATE,
    TEST,
    TITLE,
    TOMBSTONE,
    TRAIN,
    USER_ID,
    USER_IDX,
    VALIDATION,
    WEIGHT,
)
from crane_core.stages import base_interactions
from crane_core.storage.artifacts import Artifact
from jobs.etl.catalog import read_catalog, with_columns
from jobs.etl.events import (
    CODED_COLUMNS,
    DAY,
    EVENT_CODE,
    ITEM_KEY,
    MALFORMED,
    USER_KEY,
    assign_split,
    find_bots,
    find_core,
    kept_events,
    mark_bad,
    mark_excess,
    mark_repeats,
    read_interactions,
    readable_text,
    with_codes,
)
from jobs.etl.ids import ITEMS, USERS, Seen, first_seen, number_ids, trained_keys
from jobs.etl.quality import (
    compare_last_day,
    count_early,
    distributions,
    rows_per_partition,
    stop_on_last_day,
)
from jobs.etl.session import open_session, readable
from jobs.etl.tables import Counted, Tally, lookup, tallies, write_balanced, write_parts, write_table
from jobs.runner import Job, Result
from jobs.stores import scratch

logger = logging.getLogger(__name__)

ROWS_PER_PARTITION = 300_000
"""Rows sorted at a time, few enough to stay near the processor's caches."""
ROWS_PER_FILE = 4_000_000


@dataclass(frozen=True)
class Delivered:
    """The raw files of a run, checked.

    Attributes:
        root: folder of the raw data.
        log: footers of the interaction files.
        catalog: footers of the catalog files.
        ignored: columns that are not used, with the files that have them.
    """

    root: Location
    log: list[Footer]
    catalog: list[Footer]
    ignored: dict[str, list[str]]

    @property
    def num_read(self) -> int:
        """Rows of the log."""
        return sum(footer.num_rows for footer in self.log)


@dataclass(frozen=True)
class Log:
    """The rows of the log that pass one by one, under keys.

    Attributes:
        users: ids of the users.
        items: ids of the items.
        events: the rows within the daily cap, persisted, with `reason` from `mark_repeats`.
        over_cap: the rows beyond the daily cap, None where there is no cap.
    """

    users: Seen
    items: Seen
    events: DataFrame
    over_cap: DataFrame | None

    def with_ids(self, rows: DataFrame) -> DataFrame:
        """Rows with `user_id` and `item_id` beside the keys."""
        users = lookup(self.users.ids.select(USER_KEY, USER_ID), self.users.num_ids)
        items = lookup(self.items.ids.select(ITEM_KEY, ITEM_ID), self.items.num_ids)
        return rows.join(users, USER_KEY).join(items, ITEM_KEY)


def run(job: Job) -> Result:
    """Run the stage; see the module docstring."""
    config, etl = job.config, job.config.etl
    base = base_interactions(config, job.store)
    if base is not None:
        base.verify()
    delivered = _check(job)
    spark = open_session(config.runtime, scratch(job.store.storage.uri), delivered.num_read)
    with readable():
        marked = mark_bad(read_interactions(spark, delivered.log), config.window, etl)
        bad = write_parts(readable_text(marked.where(F.col(REASON).isNotNull())), job.work / "bad")
        _stop_if_malformed(bad, delivered, config)
        log = _shuffle(marked.where(F.col(REASON).isNull()), config, delivered.num_read)
        last_day = compare_last_day(log.events, config.window, etl)
    stop_on_last_day(last_day, etl)
    kept, set_aside = _select(log, config)
    trained_users, trained_items = trained_keys(kept.where(F.col(SPLIT) == TRAIN))
    if trained_users.isEmpty():
        raise _no_training_rows(delivered, config)

    catalog = read_catalog(spark, delivered.catalog)
    users = number_ids(log.users, trained_users, USERS, config, base=_base_ids(spark, base, "users"))
    items = number_ids(log.items, trained_items, ITEMS, config, catalog, _base_ids(spark, base, "items"))
    described = with_columns(items.select(ITEM_IDX, ITEM_ID, TITLE, STATE), catalog)
    tables = {
        **_write_rows(job, log, kept, users, items, delivered.num_read),
        "users": write_table(
            users.select(USER_IDX, USER_ID, STATE), job.out / "users", delivered.num_read, (USER_IDX,)
        ),
        "items": write_table(described, job.out / "items", delivered.num_read, (ITEM_IDX,)),
        "quarantine": _write_quarantine(job, log, bad, set_aside),
        "quarantine_items": write_table(catalog.bad, job.out / "quarantine_items", delivered.num_read),
    }
    result = _report(job, tables, delivered.num_read, catalog.num_read, last_day)
    result.facts |= {"base": base and base.fingerprint, "ignored_columns": delivered.ignored}
    result.facts |= {"partitions": rows_per_partition(delivered.log)}
    log.events.unpersist()
    return result


def _check(job: Job) -> Delivered:
    config = job.config
    root = raw_root(config, job.store.storage.uri)
    check_zone(root, config.etl)
    log = check_interactions(list_interactions(root, config.window, config.etl), config.window, config.etl)
    catalog = check_items(list_items(root))
    check_delivered(root, log, catalog, config.features)
    check_columns(config.export.rules, item_columns(catalog))
    ignored = ignored_columns(log, catalog)
    for name, found in ignored.items():
        logger.warning("ignored column=%s files=%d first=%s", name, len(found), found[0])
    delivered = Delivered(root, log, catalog, ignored)
    logger.info("read files=%d rows=%d catalog_files=%d", len(log), delivered.num_read, len(catalog))
    return delivered


def _shuffle(valid: DataFrame, config: RunConfig, num_read: int) -> Log:
    """Shuffle the log by user and judge the rows of a user beside each other."""
    users, items = first_seen(valid, config)
    partitions = max(2, -(-num_read // ROWS_PER_PARTITION))
    coded = with_codes(valid, config.etl, users.seed, items.seed).repartition(partitions, USER_KEY)
    capped = mark_excess(coded, config.etl)
    usable = mark_repeats(capped.where(F.col(REASON).isNull()).drop(REASON), config)
    over_cap = None if config.etl.max_events_per_day is None else capped.where(F.col(REASON).isNotNull())
    return Log(users, items, usable.persist(StorageLevel.MEMORY_AND_DISK), over_cap)


def _select(log: Log, config: RunConfig) -> tuple[DataFrame, list[DataFrame]]:
    """Keep one event per pair, without bots and outside the k-core: the events kept, and those set aside."""
    etl = config.etl
    kept = kept_events(log.events)
    if etl.split == "leave_last":
        kept = kept.join(lookup(log.items.ids.select(ITEM_KEY, ITEM_ID), log.items.num_ids), ITEM_KEY)
    kept = assign_split(kept, config).drop(ITEM_ID)
    set_aside = [log.events.where(F.col(REASON).isNotNull())]
    if log.over_cap is not None:
        set_aside.append(log.over_cap)
    if etl.max_interactions is not None:
        bots = find_bots(kept.where(F.col(SPLIT) == TRAIN), etl.max_interactions).localCheckpoint(eager=True)
        bots = lookup(bots, log.users.num_ids)
        set_aside.append(kept.join(bots, USER_KEY, "left_semi").withColumn(REASON, F.lit("bot")))
        kept = kept.join(bots, USER_KEY, "left_anti")
    if etl.k_core > 1:
        pair = [USER_KEY, ITEM_KEY]
        train = kept.where(F.col(SPLIT) == TRAIN)
        core = find_core(train, etl.k_core)
        set_aside.append(train.join(core, pair, "left_anti").withColumn(REASON, F.lit("k_core")))
        held_out = kept.where(F.col(SPLIT) != TRAIN)
        kept = train.join(core, pair, "left_semi").unionByName(held_out)
    return kept, [part.select(*CODED_COLUMNS, REASON) for part in set_aside]


def _write_rows(
    job: Job, log: Log, kept: DataFrame, users: DataFrame, items: DataFrame, num_read: int
) -> dict[str, DataFrame]:
    """Write the rows whose user and item have numbers, and apart from them the others."""
    user_numbers = users.where(F.col(USER_KEY).isNotNull()).select(USER_KEY, USER_IDX)
    item_numbers = items.where(F.col(ITEM_KEY).isNotNull()).select(ITEM_KEY, ITEM_IDX)
    placed = kept.join(lookup(user_numbers, log.users.num_ids), USER_KEY, "left")
    placed = placed.join(lookup(item_numbers, log.items.num_ids), ITEM_KEY, "left")
    known = F.col(USER_IDX).isNotNull() & F.col(ITEM_IDX).isNotNull()
    unknown = F.when(F.col(USER_IDX).isNull(), "unknown_user").otherwise("unknown_item")
    interactions = placed.where(known).select(USER_IDX, ITEM_IDX, EVENT_TIME, WEIGHT, SPLIT)
    held = (USER_ID, ITEM_ID, EVENT_TIME, WEIGHT, SPLIT, USER_IDX, ITEM_IDX)
    cold = log.with_ids(placed.where(~known)).select(*held, unknown.alias(REASON))
    return {
        "interactions": write_parts(interactions.coalesce(-(-num_read // ROWS_PER_FILE)), job.out / "interactions"),
        "cold": write_balanced(cold, job.out / "cold"),
    }


def _write_quarantine(job: Job, log: Log, bad: DataFrame, set_aside: Sequence[DataFrame]) -> DataFrame:
    names = sorted(job.config.etl.event_weights) or [""]
    event_type = F.element_at(F.array(*map(F.lit, names)), F.col(EVENT_CODE) + 1)
    later = log.with_ids(reduce(DataFrame.unionByName, set_aside)).withColumn(EVENT_TYPE, event_type)
    return write_balanced(bad.unionByName(later.select(bad.columns)), job.out / "quarantine")


def _base_ids(spark: SparkSession, base: Artifact | None, table: str) -> DataFrame | None:
    if base is None:
        return None
    columns = (USER_IDX, USER_ID) if table == "users" else (ITEM_IDX, ITEM_ID, TITLE)
    return spark.read.parquet(str(base.file(table))).select(*columns)


def _report(
    job: Job, tables: dict[str, DataFrame], num_read: int, num_catalog: int, last_day: dict[str, Any]
) -> Result:
    """Read back what was written, check that every row read is somewhere, and describe it in `quality.json`."""
    found = _tally(tables, job.config.etl.time_zone)
    splits, quarantine = found["interactions"].by(0), found["quarantine"].by(0)
    cold_splits, cold = found["cold"].by(0), found["cold"].by(2)
    accounted = sum(found[name].total for name in ("interactions", "cold", "quarantine"))
    assert accounted == num_read, f"{num_read} rows read, {accounted} accounted for"
    assert str(TRAIN) not in cold_splits, f"training rows without an index: {cold_splits}"

    train = distributions(tables["interactions"].where(F.col(SPLIT) == TRAIN), (USER_IDX, ITEM_IDX))
    per_user, per_item = train[USER_IDX], train[ITEM_IDX]
    num_train = splits.get(str(TRAIN), 0)
    days = Counter(found["interactions"].by(1))
    days.update(found["cold"].by(1))
    facts: dict[str, Any] = {
        "num_users": found["users"].total,
        "num_items": found["items"].total,
        "num_train_users": per_user["count"],
        "num_train_items": per_item["count"],
        "num_tombstones": {name: found[name].by(0).get(TOMBSTONE, 0) for name in ("users", "items")},
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
        "before_1990": count_early(days),
        **last_day,
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


def _tally(tables: dict[str, DataFrame], zone: str) -> dict[str, Tally]:
    split, day, reason = F.col(SPLIT), F.to_date(F.from_utc_timestamp(EVENT_TIME, zone)), F.col(REASON)
    groups = {
        "interactions": {"split": split, "day": day},
        "cold": {"split": split, "day": day, "reason": reason},
        "quarantine": {"reason": reason},
        "quarantine_items": {"reason": reason},
        "users": {"state": F.col(STATE)},
        "items": {"state": F.col(STATE)},
    }
    # The day a row arrived on is no part of the content: late and punctual deliveries agree.
    contents = {name: table.drop(DAY) for name, table in tables.items()}
    return tallies({name: Counted(contents[name], groups[name]) for name in sorted(contents)})


def _cutoffs(config: RunConfig) -> dict[str, str | None]:
    first: tuple[Any, Any] = (None, None)
    if config.etl.split == "temporal":
        first = config.etl.cutoffs(config.window)
    elif config.etl.split == "none":
        first = (config.window.end, config.window.end)
    names = ("validation", "test", "end")
    return {
        name: instant.isoformat() if instant else None
        for name, instant in zip(names, (*first, config.window.end), strict=True)
    }


def _stop_if_malformed(bad: DataFrame, delivered: Delivered, config: RunConfig) -> None:
    """Stop if too many rows are malformed, among all or among those that arrived in the window.

    Years of good rows would hide a bad day.
    """
    by_day = bad.where(F.col(REASON).isin(*MALFORMED)).groupBy(DAY, REASON).count().collect()
    new = [footer for footer in delivered.log if arrives_within(footer.file, config.window, config.etl.time_zone)]
    for what, judged in (("rows", delivered.log), ("rows that arrived in the window", new)):
        days = {footer.file.day for footer in judged}
        counts: dict[str, Counter[Any]] = {DAY: Counter(), REASON: Counter()}
        for row in by_day:
            if row[DAY] in days:
                counts[DAY][row[DAY]] += row["count"]
                counts[REASON][row[REASON]] += row["count"]
        malformed, num_read = counts[REASON].total(), sum(footer.num_rows for footer in judged)
        if malformed <= config.etl.max_quarantine_share * num_read:
            continue
        worst = ", ".join(f"{DAY}={day} ({count} rows)" for day, count in counts[DAY].most_common(3))
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts[REASON].items()))
        raise DataError(
            f"{delivered.root / INTERACTIONS_FOLDER}: {malformed} of {num_read} {what} are malformed ({reasons}), most "
            f"of them in {worst}; etl.max_quarantine_share is {config.etl.max_quarantine_share}.",
            "Correct the deliveries; after_arrival and too_late mean that dt is not the day of arrival, or that "
            "etl.lookback_days is too short. Or raise etl.max_quarantine_share.",
        )


def _no_training_rows(delivered: Delivered, config: RunConfig) -> DataError:
    validation = _cutoffs(config)["validation"]
    before = f" before the validation period starts at {validation}" if validation else ""
    return DataError(
        f"{delivered.root / INTERACTIONS_FOLDER}: {delivered.num_read} rows read, 0 usable training rows{before} "
        f"(etl.k_core={config.etl.k_core}, etl.min_weight={config.etl.min_weight}).",
        "Read more history, shorten etl.validation_days and etl.test_days, or lower etl.k_core and etl.min_weight.",
    )
