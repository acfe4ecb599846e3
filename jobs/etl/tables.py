"""Spark tables: contiguous row numbers, sorted Parquet of sane size, and checksums over rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

logger = logging.getLogger(__name__)

ROWS_PER_FILE = 4_000_000
_ROW_BITS = 33


def number_rows(rows: DataFrame, order: Sequence[Column | str], name: str, partitions: int) -> DataFrame:
    """Add a contiguous int column from 0 that follows a total order.

    Rows are range-partitioned and sorted; a row's number is its place in its partition plus the sizes of the
    partitions before it. Only those sizes come to the driver.

    Args:
        rows: with a unique sort key.
        order: the sort key.
        name: of the new column.
        partitions: ranges to cut the rows into.
    """
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


def write_table(rows: DataFrame, folder: Path, num_rows: int, order: Sequence[str] = ()) -> None:
    """Write Parquet files `part-00000.parquet`, ... of about four million rows.

    Args:
        rows: the table.
        folder: where to.
        num_rows: an upper bound of the rows, decides the number of files.
        order: sort key within and across files; free when empty.
    """
    files = max(1, -(-num_rows // ROWS_PER_FILE))
    if not order:
        rows = rows.coalesce(files) if files == 1 else rows.repartition(files)
    elif files == 1:
        rows = rows.coalesce(1).sortWithinPartitions(*order)
    else:
        rows = rows.repartitionByRange(files, *order).sortWithinPartitions(*order)
    started = time.monotonic()
    rows.write.mode("overwrite").parquet(str(folder))
    written = sorted(folder.glob("part-*.parquet"))
    for index, path in enumerate(written):
        path.rename(folder / f"part-{index:05d}.parquet")
    for path in [*folder.glob("_*"), *folder.glob(".*")]:
        path.unlink()
    logger.info("write table=%s files=%d seconds=%.1f", folder.name, len(written), time.monotonic() - started)


def checksum(rows: DataFrame) -> tuple[int, str]:
    """Count and checksum of a table, independent of the order of its rows and of its files.

    Two 64-bit hashes of every row are summed exactly. Nulls are hashed apart from values, and a row that is
    there twice counts twice.

    Returns:
        The number of rows, and the checksum.
    """
    cells = [part for name in rows.columns for part in (F.col(name).isNull(), F.col(name))]
    first = F.xxhash64(*cells).cast("decimal(20,0)")
    second = F.xxhash64(F.lit("second"), *cells).cast("decimal(20,0)")
    row = rows.agg(F.count(F.lit(1)).alias("n"), F.sum(first).alias("first"), F.sum(second).alias("second")).first()
    assert row is not None
    return row["n"], f"rows={row['n']} sums={row['first'] or 0},{row['second'] or 0} columns={','.join(rows.columns)}"
