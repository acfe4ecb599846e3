"""Read the interaction log: quarantine bad rows, split by time, number users and items, count everything.

The fingerprint covers the files read; nothing that arrived or happened at or after `window.end` is used, and ids
come from training rows, so what lies behind the cutoff cannot move a row number. The log is shuffled once, by user;
what is carried over it is keys, and the ids come back with the row numbers.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from typing import Any

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.storagelevel import StorageLevel

from crane_core.config import RunConfig
from crane_core.errors import DataError
from crane_core.raw.checks import Footer, check_interactions, check_items, ignored_columns
from crane_core.raw.files import INTERACTIONS_FOLDER, arrives_within, list_interactions, list_items, raw_root
from crane_core.raw.location import Location
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
    TRAINED,
    USER_ID,
    USER_IDX,
    VALIDATION,
    WEIGHT,
)
from crane_core.stages import base_interactions
from crane_core.storage.artifacts import Artifact
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
from jobs.etl.ids import first_seen, number_ids
from jobs.etl.quality import distribution, heed_drift, measure_drift
from jobs.etl.reading import read_files
from jobs.etl.session import open_session, readable
from jobs.etl.tables import lookup, tally, write_balanced, write_parts, write_table
from jobs.runner import Job, Result, run_stage
from jobs.stores import scratch

logger = logging.getLogger(__name__)

ROWS_PER_PARTITION = 300_000
"""Rows sorted at a time, few enough to stay near the processor's caches."""
ROWS_PER_FILE = 4_000_000


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
    config, etl = job.config, job.config.etl
    root = raw_root(config, job.store.storage.uri)
    base = base_interactions(config, job.store)
    if base is not None:
        base.verify()
    footers = check_interactions(list_interactions(root, config.window, etl), config.window, etl)
    catalog_footers = check_items(list_items(root))
    num_read = sum(footer.num_rows for footer in footers)
    ignored = ignored_columns([*footers, *catalog_footers])
    for name, found in ignored.items():
        logger.warning("ignored column=%s files=%d first=%s", name, len(found), found[0])
    logger.info("read files=%d rows=%d catalog_files=%d", len(footers), num_read, len(catalog_footers))
    spark = open_session(config.runtime, scratch(job.store.storage.uri), num_read)

    with readable():
        marked = mark_bad(read_interactions(spark, footers), config.window, etl)
        valid = marked.where(F.col(REASON).isNull())
        write_parts(readable_text(marked.where(F.col(REASON).isNotNull())), job.work / "bad")
        bad = spark.read.parquet(str(job.work / "bad"))
        _stop_if_malformed(bad, footers, config, root)
        seen_users, seen_items = first_seen(valid, config)
        coded = with_codes(valid, etl, seen_users.seed, seen_items.seed).repartition(
            max(2, -(-num_read // ROWS_PER_PARTITION)), USER_KEY
        )
        capped = mark_excess(coded, etl)
        usable = mark_repeats(capped.where(F.col(REASON).isNull()).drop(REASON), config)
        events = usable.persist(StorageLevel.MEMORY_AND_DISK)
        drift = measure_drift(events, config.window, etl)
    heed_drift(drift, etl)
    kept = kept_events(events)
    if etl.split == "leave_last":
        kept = kept.join(lookup(seen_items.ids.select(ITEM_KEY, ITEM_ID)), ITEM_KEY)
    kept = assign_split(kept, config).drop(ITEM_ID)
    set_aside = [events.where(F.col(REASON).isNotNull())]
    if etl.max_events_per_day is not None:
        set_aside.append(capped.where(F.col(REASON).isNotNull()))
    if etl.max_interactions is not None:
        bots = find_bots(kept.where(F.col(SPLIT) == TRAIN), etl.max_interactions).localCheckpoint(eager=True)
        bots = lookup(bots)
        set_aside.append(kept.join(bots, USER_KEY, "left_semi").withColumn(REASON, F.lit("bot")))
        kept = kept.join(bots, USER_KEY, "left_anti")
    if etl.k_core > 1:
        pair = [USER_KEY, ITEM_KEY]
        train = kept.where(F.col(SPLIT) == TRAIN)
        core = find_core(train, etl.k_core)
        set_aside.append(train.join(core, pair, "left_anti").withColumn(REASON, F.lit("k_core")))
        held_out = kept.where(F.col(SPLIT) != TRAIN)
        kept = train.join(core, pair, "left_semi").unionByName(held_out)
    train = kept.where(F.col(SPLIT) == TRAIN)
    trained_users, trained_items = (train.select(key).distinct() for key in (USER_KEY, ITEM_KEY))

    catalog, catalog_bad = _read_catalog(spark, catalog_footers)
    users = number_ids(
        seen_users.ids, trained_users, USER_ID, USER_KEY, USER_IDX, config, base=_base_ids(spark, base, "users")
    )
    items = number_ids(
        seen_items.ids, trained_items, ITEM_ID, ITEM_KEY, ITEM_IDX, config, catalog, _base_ids(spark, base, "items")
    )
    if users.where(F.col(STATE) == TRAINED).isEmpty():
        raise _no_training_rows(num_read, config, root)
    user_numbers = lookup(users.where(F.col(USER_KEY).isNotNull()).select(USER_KEY, USER_IDX))
    item_numbers = lookup(items.where(F.col(ITEM_KEY).isNotNull()).select(ITEM_KEY, ITEM_IDX))
    placed = kept.join(user_numbers, USER_KEY, "left").join(item_numbers, ITEM_KEY, "left")
    known = F.col(USER_IDX).isNotNull() & F.col(ITEM_IDX).isNotNull()
    unknown = F.when(F.col(USER_IDX).isNull(), "unknown_user").otherwise("unknown_item")

    user_ids = lookup(seen_users.ids.select(USER_KEY, USER_ID))
    item_ids = lookup(seen_items.ids.select(ITEM_KEY, ITEM_ID))

    def with_ids(rows: DataFrame) -> DataFrame:
        return rows.join(user_ids, USER_KEY).join(item_ids, ITEM_KEY)

    out = job.out
    interactions = placed.where(known).select(USER_IDX, ITEM_IDX, EVENT_TIME, WEIGHT, SPLIT)
    write_parts(interactions.coalesce(-(-num_read // ROWS_PER_FILE)), out / "interactions")
    write_table(users.select(USER_IDX, USER_ID, STATE), out / "users", num_read, (USER_IDX,))
    write_table(items.select(ITEM_IDX, ITEM_ID, TITLE, STATE), out / "items", num_read, (ITEM_IDX,))
    held = (USER_ID, ITEM_ID, EVENT_TIME, WEIGHT, SPLIT, USER_IDX, ITEM_IDX)
    cold = with_ids(placed.where(~known))
    write_balanced(cold.select(*held, unknown.alias(REASON)), out / "cold")
    event_type = F.element_at(F.array(*map(F.lit, sorted(etl.event_weights) or [""])), F.col(EVENT_CODE) + 1)
    later = reduce(DataFrame.unionByName, [part.select(*CODED_COLUMNS, REASON) for part in set_aside])
    later = with_ids(later).withColumn(EVENT_TYPE, event_type)
    write_balanced(bad.unionByName(later.select(bad.columns)), out / "quarantine")
    write_table(catalog_bad, out / "quarantine_items", num_read)
    result = _report(job, spark, num_read, sum(footer.num_rows for footer in catalog_footers), drift)
    result.facts |= {"base": base and base.fingerprint, "ignored_columns": ignored}
    events.unpersist()
    return result


def _base_ids(spark: SparkSession, base: Artifact | None, table: str) -> DataFrame | None:
    return None if base is None else spark.read.parquet(str(base.file(table))).drop(STATE)


def _report(job: Job, spark: SparkSession, num_read: int, num_catalog: int, drift: dict[str, Any]) -> Result:
    """Read back what was written, check that every row read is somewhere, and describe it in `quality.json`."""
    tables = {path.name: spark.read.parquet(str(path)) for path in sorted(job.out.iterdir())}
    # The day a row arrived on is no part of the content: late and punctual deliveries agree.
    tables["quarantine"] = tables["quarantine"].drop(DAY)
    zone = job.config.etl.time_zone
    split, day, reason = F.col(SPLIT), F.to_date(F.from_utc_timestamp(EVENT_TIME, zone)), F.col(REASON)
    groups = {
        "interactions": {"split": split, "day": day},
        "cold": {"split": split, "day": day, "reason": reason},
        "quarantine": {"reason": reason},
        "quarantine_items": {"reason": reason},
        "users": {"state": F.col(STATE)},
        "items": {"state": F.col(STATE)},
    }
    found = {name: tally(table, **groups.get(name, {})) for name, table in tables.items()}
    splits, quarantine = found["interactions"].by(0), found["quarantine"].by(0)
    cold_splits, cold = found["cold"].by(0), found["cold"].by(2)
    accounted = sum(found[name].total for name in ("interactions", "cold", "quarantine"))
    assert accounted == num_read, f"{num_read} rows read, {accounted} accounted for"
    assert str(TRAIN) not in cold_splits, f"training rows without an index: {cold_splits}"

    train = tables["interactions"].where(split == TRAIN)
    per_user, per_item = (distribution(train, column) for column in (USER_IDX, ITEM_IDX))
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
        "drift": drift,
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


def _read_catalog(spark: SparkSession, footers: Sequence[Footer]) -> tuple[DataFrame, DataFrame]:
    schema = f"{ITEM_ID} string, {TITLE} string"
    if not footers:
        return clean_catalog(spark.createDataFrame([], schema))
    with readable():
        rows = read_files(spark, [footer.file for footer in footers], schema)
        return clean_catalog(rows.localCheckpoint(eager=True))


def _cutoffs(config: RunConfig) -> dict[str, str | None]:
    first: tuple[Any, Any] = (None, None)
    if config.etl.split == "temporal":
        first = config.etl.cutoffs(config.window)
    names = ("validation", "test", "end")
    return {
        name: instant.isoformat() if instant else None
        for name, instant in zip(names, (*first, config.window.end), strict=True)
    }


def _stop_if_malformed(bad: DataFrame, footers: Sequence[Footer], config: RunConfig, root: Location) -> None:
    """Judge all rows read, and apart from them those that arrived in the window: years of good rows hide a bad day."""
    by_day = bad.where(F.col(REASON).isin(*MALFORMED)).groupBy(DAY, REASON).count().collect()
    new = [footer for footer in footers if arrives_within(footer.file, config.window, config.etl.time_zone)]
    for what, judged in (("rows", list(footers)), ("rows that arrived in the window", new)):
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
            f"{root / INTERACTIONS_FOLDER}: {malformed} of {num_read} {what} are malformed ({reasons}), most of them "
            f"in {worst}; etl.max_quarantine_share is {config.etl.max_quarantine_share}.",
            "Correct the deliveries; after_arrival and too_late mean that dt is not the day of arrival, or that "
            "etl.lookback_days is too short. Or raise etl.max_quarantine_share.",
        )


def _no_training_rows(num_read: int, config: RunConfig, root: Location) -> DataError:
    validation = _cutoffs(config)["validation"]
    before = f" before the validation period starts at {validation}" if validation else ""
    return DataError(
        f"{root / INTERACTIONS_FOLDER}: {num_read} rows read, 0 usable training rows{before} "
        f"(etl.k_core={config.etl.k_core}, etl.min_weight={config.etl.min_weight}).",
        "Read more history, shorten etl.validation_days and etl.test_days, or lower etl.k_core and etl.min_weight.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("etl.interactions", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
