"""Number the rows of Spark tables, write them as Parquet files of about 128 MiB, and checksum their rows."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F

logger = logging.getLogger(__name__)

FILE_BYTES = 128 * 1024 * 1024
BROADCAST_ROWS = 1_000_000
"""About 60 MB on the driver and on every worker."""
_ROW_BITS = 33
_SEEDS = ("first", "second")


def quoted(name: str) -> str:
    """The name of a column as Spark reads it, whatever characters it has."""
    return "`" + name.replace("`", "``") + "`"


def column_of(name: str) -> Column:
    """The column of that name, whatever characters it has."""
    return F.col(quoted(name))


def number_rows(rows: DataFrame, order: Sequence[Column | str], name: str, partitions: int) -> DataFrame:
    """Add a contiguous int column from 0 that follows a total order.

    Rows are range-partitioned and sorted. The number of a row is its place in its partition plus the sizes of the
    partitions before it. Only those sizes come to the driver.

    Args:
        rows: with a unique sort key.
        order: the sort key.
        name: of the new column.
        partitions: number of ranges. One range needs no sampling, no checkpoint and no sizes.
    """
    if partitions == 1:
        ordered = rows.coalesce(1).sortWithinPartitions(*order)
        return ordered.withColumn(name, F.monotonically_increasing_id().cast("int"))
    # The numbers of both passes must see the same ranges, which Spark draws by sampling: materialise them once.
    ranged = (
        rows.repartitionByRange(partitions, *order)
        .sortWithinPartitions(*order)
        .withColumn("_place", F.monotonically_increasing_id())
        .localCheckpoint(eager=True)
    )
    part = F.shiftright("_place", _ROW_BITS).cast("int")
    sizes = {row["part"]: row["count"] for row in ranged.groupBy(part.alias("part")).count().collect()}
    offsets, total = [], 0
    for index in range(max(sizes, default=-1) + 1):
        offsets.append(total)
        total += sizes.get(index, 0)
    if not offsets:
        return ranged.withColumn(name, F.lit(0)).drop("_place")
    place = F.col("_place").bitwiseAND(F.lit((1 << _ROW_BITS) - 1))
    offset = F.element_at(F.array(*map(F.lit, offsets)), part + 1)
    return ranged.withColumn(name, (place + offset).cast("int")).drop("_place")


def lookup(rows: DataFrame, most: int | None = None) -> DataFrame:
    """A table to join a log with. A small one is broadcast, so that the log is not shuffled.

    Adaptive execution would find out too, but only once it has shuffled the log.

    Args:
        rows: cheap to evaluate twice.
        most: an upper bound of the rows, if known. When it is small, the rows need not be counted.
    """
    small = (most is not None and most <= BROADCAST_ROWS) or rows.count() <= BROADCAST_ROWS
    return F.broadcast(rows) if small else rows


def write_table(
    rows: DataFrame, folder: Path, num_rows: int, order: Sequence[str] = (), row_bytes: int = 32
) -> DataFrame:
    """Write Parquet files of about 128 MiB and return the table read back.

    Args:
        rows: the table, cheap to evaluate twice.
        folder: where to.
        num_rows: an upper bound of the rows.
        order: sort key within and across files; free when empty.
        row_bytes: about the size of a row; with `num_rows` it decides the number of files.
    """
    files = max(1, -(-num_rows * row_bytes // FILE_BYTES))
    if files == 1:
        rows = rows.coalesce(1)
    else:
        rows = rows.repartitionByRange(files, *order) if order else rows.repartition(files)
    return write_parts(rows.sortWithinPartitions(*order) if order else rows, folder)


def write_balanced(rows: DataFrame, folder: Path) -> DataFrame:
    """Write Parquet files of sane size in no order, and return the table read back.

    Adaptive execution joins small partitions and splits large ones.
    """
    return write_parts(rows.hint("rebalance"), folder)


def write_parts(rows: DataFrame, folder: Path) -> DataFrame:
    """Write one Parquet file per partition, in the order of the partitions, and return the table read back.

    The files are `part-00000.parquet` and so on. The table that is returned has the schema of `rows`, so that no
    Spark job has to infer it from the files.
    """
    started = time.monotonic()
    rows.write.mode("overwrite").parquet(str(folder))
    written = sorted(folder.glob("part-*.parquet"))
    for index, path in enumerate(written):
        path.rename(folder / f"part-{index:05d}.parquet")
    for path in [*folder.glob("_*"), *folder.glob(".*")]:
        path.unlink()
    logger.info("write table=%s files=%d seconds=%.1f", folder.name, len(written), time.monotonic() - started)
    return rows.sparkSession.read.schema(rows.schema).parquet(str(folder))


@dataclass(frozen=True)
class Tally:
    """Counts and checksum of a table.

    Attributes:
        groups: rows per group, keyed by the values grouped by, as text.
        checksum: of all rows, independent of their order and of the files they lie in.
    """

    groups: dict[tuple[str | None, ...], int]
    checksum: str

    @property
    def total(self) -> int:
        return sum(self.groups.values())

    def by(self, position: int) -> dict[str, int]:
        """Rows per value of one of the grouping columns, in order of the values."""
        counts: Counter[str] = Counter()
        for key, count in self.groups.items():
            counts[str(key[position])] += count
        return dict(sorted(counts.items()))


@dataclass(frozen=True)
class Counted:
    """A table to tally.

    Attributes:
        rows: the table.
        by: named expressions of few distinct values to count by.
    """

    rows: DataFrame
    by: Mapping[str, Column] = field(default_factory=dict)


def tally(rows: DataFrame, **by: Column) -> Tally:
    """Count and checksum one table in one pass. See `tallies`.

    Args:
        rows: the table.
        by: named expressions of few distinct values to count by.
    """
    return tallies({"rows": Counted(rows, by)})["rows"]


def tallies(tables: Mapping[str, Counted]) -> dict[str, Tally]:
    """Count and checksum tables, each in one pass, all in one query.

    Two 64-bit hashes of every row are summed exactly. Nulls are hashed apart from values, and a row that is there
    twice counts twice.
    """
    aggregated = [_aggregated(name, table) for name, table in tables.items()]
    found: dict[str, list[Row]] = {name: [] for name in tables}
    for row in reduce(DataFrame.unionAll, aggregated).collect():
        found[row["table"]].append(row)
    return {name: _tally_of(table.rows.columns, found[name]) for name, table in tables.items()}


def _aggregated(name: str, table: Counted) -> DataFrame:
    rows = table.rows
    cells = [part for name in rows.columns for part in (column_of(name).isNull(), column_of(name))]
    hashes = {seed: F.xxhash64(F.lit(seed), *cells) for seed in _SEEDS}
    # Halves of 32 bits: their sums fit 64 bits, and are many times faster than decimals.
    sums = [F.sum(F.shiftright(value, 32)).alias(f"{seed}_high") for seed, value in hashes.items()]
    sums += [F.sum(value.bitwiseAND(F.lit(0xFFFFFFFF))).alias(f"{seed}_low") for seed, value in hashes.items()]
    grouped = rows.groupBy(*(column.alias(f"_{key}") for key, column in table.by.items()))
    counted = grouped.agg(F.count(F.lit(1)).alias("_rows"), *sums)
    group = F.array(*(F.col(f"_{key}").cast("string") for key in table.by)).cast("array<string>")
    totals = [f"{seed}_{half}" for half in ("high", "low") for seed in _SEEDS]
    return counted.select(F.lit(name).alias("table"), group.alias("group"), "_rows", *totals)


def _tally_of(columns: Sequence[str], found: Sequence[Row]) -> Tally:
    groups = {tuple(row["group"]): row["_rows"] for row in found if row["_rows"]}
    totals = [sum(((row[f"{seed}_high"] or 0) << 32) + (row[f"{seed}_low"] or 0) for row in found) for seed in _SEEDS]
    return Tally(groups, f"{','.join(columns)} rows={sum(groups.values())} sums={totals[0]},{totals[1]}")
