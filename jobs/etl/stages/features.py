"""Align the feature vectors of every modality with the item numbers: one matrix and one mask each.

Spark reads the vectors as Arrow batches and sorts them by item, then they are written to `.npy` files. No step holds a
whole matrix in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from crane_core.config import Features, RunConfig
from crane_core.dataset.interactions import load_ids
from crane_core.dataset.standardisation import fit_projection, fit_standardisation, projected, standardised
from crane_core.errors import DataError
from crane_core.raw.checks import Footer, check_features, read_ids, read_matrix_rows
from crane_core.raw.files import FEATURES_FOLDER, MATRIX, list_features, raw_root
from crane_core.raw.location import Location
from crane_core.raw.parquet import open_parquet
from crane_core.schema import ITEM_ID, ITEM_IDX, REASON, STATE, TRAINED, VECTOR
from crane_core.storage.matrix import RowWriter, open_matrix
from jobs.etl.session import open_session, readable, unreadable
from jobs.etl.tables import tally, write_table
from jobs.runner import Job, Result
from jobs.stores import scratch

logger = logging.getLogger(__name__)

MODALITY = "modality"
DIM = "dim"
IS_FINITE = "is_finite"
SCANNED = f"{MODALITY} string, {ITEM_ID} string, {VECTOR} array<float>, {DIM} int, {IS_FINITE} boolean"
BATCH_ROWS = 4096
BYTES_PER_TASK = 8 * 1024 * 1024
"""Bytes of vectors that one Python worker reads in less time than a second one needs to start."""
MAX_TASKS = 1024
_ROW_GROUP = ("row_group", pa.int32())
MALFORMED = ("null_id", "empty_id", "non_finite", "wrong_length")
"""Reasons that mean broken data. They count towards `features.max_quarantine_share`. A null or empty vector does not:
the item has none."""
LOW_COVERAGE = 0.9
"""A modality that a smaller share of the trained items has is worth a warning."""


def scan(spark: SparkSession, footers: Mapping[str, Sequence[Footer]], binary: str = "float32") -> DataFrame:
    """All vectors of all modalities as float32, with their length and whether they are finite.

    The workers read the row groups with pyarrow, so that half-precision and fixed-size lists are understood, and
    fixed-size binary is read as numbers of the type `binary`.
    """
    pieces = [
        {MODALITY: name, "path": str(footer.file.path), "row_group": group}
        for name, files in sorted(footers.items())
        for footer in files
        for group in range(footer.num_row_groups)
    ]
    size = sum(footer.file.size for files in footers.values() for footer in files)
    tasks = min(len(pieces), max(1, -(-size // BYTES_PER_TASK)), MAX_TASKS)
    table = pa.Table.from_pylist(pieces, pa.schema([(MODALITY, pa.string()), ("path", pa.string()), _ROW_GROUP]))
    rows = spark.createDataFrame(table).repartition(tasks)
    return rows.mapInArrow(partial(_scan_row_groups, binary), SCANNED)


def mark_bad(rows: DataFrame, items: DataFrame, dims: Mapping[str, int]) -> DataFrame:
    """Add `item_idx` and `reason`: why a vector cannot be used, null when it can.

    Of several usable vectors of one item the smallest is kept, the others are `duplicate_item`.

    Args:
        rows: columns of `SCANNED`.
        items: item_id, item_idx.
        dims: modality to the length its vectors must have.
    """
    expected = F.create_map(*(F.lit(part) for pair in dims.items() for part in pair))
    reason = (
        F.when(F.col(ITEM_ID).isNull(), "null_id")
        .when(F.trim(ITEM_ID) == "", "empty_id")
        .when(F.col(VECTOR).isNull() | (F.col(DIM) == 0), "null_vector")
        .when(F.col(DIM) != expected[F.col(MODALITY)], "wrong_length")
        .when(~F.col(IS_FINITE), "non_finite")
        .when(F.col(ITEM_IDX).isNull(), "unknown_item")
    )
    marked = rows.join(items, ITEM_ID, "left").withColumn(REASON, reason)
    # Bad rows need no comparison: spread them, so that a million null ids do not end in one task.
    spread = F.when(F.col(REASON).isNotNull(), F.monotonically_increasing_id())
    place = F.row_number().over(Window.partitionBy(MODALITY, ITEM_ID, "_spread").orderBy(VECTOR))
    again = F.col(REASON).isNull() & (place > 1)
    repeated = F.when(again, "duplicate_item").otherwise(F.col(REASON))
    return marked.withColumn("_spread", spread).withColumn(REASON, repeated).drop("_spread")


def choose_dims(rows: DataFrame, folder: Location) -> dict[str, int]:
    """The length that most vectors of each modality have.

    Raises:
        DataError: no length is that of more than half of them.
    """
    lengths: dict[str, list[tuple[int, int]]] = {}
    for row in rows.where(F.col(DIM) > 0).groupBy(MODALITY, DIM).count().collect():
        lengths.setdefault(row[MODALITY], []).append((row["count"], row[DIM]))
    dims = {}
    for (name,) in rows.select(MODALITY).distinct().orderBy(MODALITY).collect():
        found = sorted(lengths.get(name, []), reverse=True)
        total = sum(count for count, _ in found)
        if not found or 2 * found[0][0] <= total:
            seen = ", ".join(f"{count} rows of length {dim}" for count, dim in found[:5]) or "no vector"
            raise DataError(
                f"{folder / name} ({total} rows): no vector length has a majority, found {seen}.",
                "Deliver vectors of one length per modality.",
            )
        dims[name] = found[0][1]
    return dims


def run(job: Job) -> Result:
    """Run the stage; see the module docstring."""
    config = job.config
    root = raw_root(config, job.store.storage.uri)
    listed = list_features(root, config.features.modalities)
    footers = {name: check_features(files, config.features.binary) for name, files in listed.items()}
    read = {name: sum(footer.num_rows for footer in files) for name, files in footers.items()}
    interactions = job.input("etl.interactions")
    num_items = interactions.facts["num_items"]
    logger.info("read %s", " ".join(f"{name}={rows}" for name, rows in read.items()))
    is_train = load_ids(interactions, "items", STATE).to_numpy() == TRAINED
    for name, files in footers.items():
        _compare_ids(root / FEATURES_FOLDER / name, files, load_ids(interactions, "items", ITEM_ID), is_train, config)
    spark = open_session(config.runtime, scratch(job.store.storage.uri), sum(read.values()))

    with readable():
        rows = scan(spark, footers, config.features.binary).localCheckpoint(eager=True)
    dims = choose_dims(rows, root / FEATURES_FOLDER)
    items = spark.read.parquet(str(interactions.file("items"))).select(ITEM_ID, ITEM_IDX)
    marked = mark_bad(rows, items, dims).localCheckpoint(eager=True)
    counts = _count_reasons(marked, read)
    _stop_if_unusable(counts, config.features, root / FEATURES_FOLDER)
    placed = marked.where(F.col(REASON).isNull()).select(MODALITY, ITEM_IDX, VECTOR)
    row_bytes = 4 * max(dims.values())
    write_table(placed, job.work / "placed", sum(read.values()), (MODALITY, ITEM_IDX), row_bytes)
    bad = marked.where(F.col(REASON).isNotNull()).select(MODALITY, ITEM_ID, VECTOR, REASON)
    num_bad = sum(number for found in counts.values() for reason, number in found.items() if reason)
    quarantine_sum = tally(write_table(bad, job.out / "quarantine", num_bad, row_bytes=row_bytes)).checksum

    masks = _write_raw_matrices(job.work, dims, num_items)
    kind = config.features.standardise
    facts: dict[str, Any] = {}
    for name, dim in dims.items():
        folder = job.out / name
        folder.mkdir()
        raw = open_matrix(job.work / f"{name}.npy")
        fitted = fit_standardisation(raw, masks[name], is_train, kind)
        written = standardised(raw, masks[name], kind, fitted)
        np.savez(folder / "standardisation.npz", allow_pickle=False, kind=np.array(kind), **fitted)
        present = int(masks[name].sum())
        facts[name] = {"dim": dim, "present": present, "missing": num_items - present, "num_rows_read": read[name]}
        facts[name]["trained_coverage"] = _check_coverage(root / FEATURES_FOLDER / name, masks[name], is_train, config)
        most = config.features.max_dim
        if most is not None and dim > most:
            axes = fit_projection(
                standardised(raw, masks[name], kind, fitted), masks[name] & is_train, most, config.features.projection
            )
            np.savez(folder / "projection.npz", allow_pickle=False, **axes)
            written = projected(written, masks[name], axes)
            facts[name] |= {"dim": most, "delivered_dim": dim, "explained": float(axes["explained"])}
            dim = most
        dtype = config.features.dtype
        num_unfit, num_zeroed = write_matrix(folder / "matrix.npy", written, (num_items, dim), dtype)
        if num_unfit:
            raise DataError(
                f"{root / FEATURES_FOLDER / name}: {num_unfit} of {present} vectors have numbers beyond the largest of "
                f"{dtype}, {np.finfo(dtype).max:.6g}, where features.standardise is {kind}.",
                "Correct these vectors, or set features.dtype=float32 or features.standardise to zscore or l2.",
            )
        facts[name]["zeroed"] = num_zeroed
        if num_zeroed:
            logger.warning("zeroed modality=%s numbers=%d too small for %s", name, num_zeroed, dtype)
        np.save(folder / "mask.npy", masks[name])
        logger.info("align modality=%s dim=%d present=%d missing=%d", name, dim, present, num_items - present)
    quarantine = {name: {reason: n for reason, n in found.items() if reason} for name, found in counts.items()}
    return Result({"modalities": facts, "quarantine": quarantine}, {"quarantine": quarantine_sum})


def _compare_ids(
    folder: Location, files: Sequence[Footer], items: pa.ChunkedArray, is_train: NDArray[np.bool_], config: RunConfig
) -> None:
    """Stop before Spark starts where the ids of a modality are not those of the log.

    Raises:
        DataError: it has no item of the log or the catalog, or too few of the trained ones.
    """
    found = np.zeros(len(items), dtype=bool)
    items = items.cast(pa.string())
    first: list[str] = []
    for footer in files:
        for ids in read_ids(footer):
            first += ids[: 0 if first else 3].to_pylist()
            found |= pc.is_in(items, ids).to_numpy(zero_copy_only=False)
    if len(items) and not found.any():
        total = sum(footer.num_rows for footer in files)
        raise DataError(
            f"{folder}: none of its {total} rows belongs to an item of the log or the catalog: its ids are such as "
            f"{', '.join(map(repr, first))}, theirs such as {', '.join(map(repr, items[:3].to_pylist()))}.",
            "Use the item ids of the interactions in the features, in the same form.",
        )
    _check_coverage(folder, found, is_train, config)


def _check_coverage(
    folder: Location, found: NDArray[np.bool_], is_train: NDArray[np.bool_], config: RunConfig
) -> float:
    """Return the share of the trained items that have a vector; warn of a low one.

    Raises:
        DataError: it is below `features.min_trained_coverage`.
    """
    coverage = float(found[is_train].mean()) if is_train.any() else 1.0
    least = config.features.min_trained_coverage
    if coverage < least:
        raise DataError(
            f"{folder}: {int(found[is_train].sum())} of {int(is_train.sum())} items with training interactions have a "
            f"vector, a share of {coverage:.4f}; features.min_trained_coverage is {least}.",
            "Deliver the features of the other items, or lower features.min_trained_coverage.",
        )
    if coverage < LOW_COVERAGE:
        logger.warning("coverage modality=%s trained_items_with_vector=%.4f", folder.name, coverage)
    return coverage


def _scan_row_groups(binary: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for piece in batch.to_pylist():
            location = Location.at(piece["path"])
            try:
                if location.path.suffix == MATRIX:
                    for rows in read_matrix_rows(location, piece["row_group"], BATCH_ROWS):
                        yield describe(piece[MODALITY], rows)
                    continue
                with open_parquet(location) as parquet:
                    for rows in parquet.iter_batches(BATCH_ROWS, [piece["row_group"]], [ITEM_ID, VECTOR]):
                        yield describe(piece[MODALITY], rows, binary)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise unreadable(piece["path"]) from error


def describe(modality: str, rows: pa.RecordBatch, binary: str = "float32") -> pa.RecordBatch:
    """Vectors as float32 lists, with their length and whether they are finite: the columns of `SCANNED`."""
    vectors = rows.column(VECTOR)
    if pa.types.is_fixed_size_binary(vectors.type):
        kind, width = np.dtype(binary).newbyteorder("<"), vectors.type.byte_width
        first = vectors.offset * width
        numbers = np.frombuffer(vectors.buffers()[1], kind, len(vectors) * width // kind.itemsize, first)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(numbers), width // kind.itemsize)
        vectors = pc.if_else(vectors.is_valid(), lists, pa.scalar(None, lists.type))
    if pa.types.is_fixed_size_list(vectors.type):
        vectors = vectors.cast(pa.list_(vectors.type.value_type))
    lengths = pc.fill_null(pc.list_value_length(vectors), 0).cast(pa.int32())
    values = pc.fill_null(pc.list_flatten(vectors).cast(pa.float32()), float("nan"))
    ends = np.concatenate([[0], np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)])
    wrong = np.concatenate([[0], np.cumsum(~np.isfinite(values.to_numpy()), dtype=np.int64)])
    narrow = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values, mask=pc.is_null(vectors))
    return pa.record_batch(
        {
            MODALITY: pa.repeat(modality, rows.num_rows),
            ITEM_ID: rows.column(ITEM_ID).cast(pa.string()),
            VECTOR: narrow,
            DIM: lengths,
            IS_FINITE: pa.array(wrong[ends[1:]] == wrong[ends[:-1]]),
        }
    )


def _count_reasons(marked: DataFrame, read: Mapping[str, int]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {name: {} for name in read}
    for row in marked.groupBy(MODALITY, REASON).count().orderBy(MODALITY, REASON).collect():
        counts[row[MODALITY]][row[REASON] or ""] = row["count"]
    for name, found in counts.items():
        assert sum(found.values()) == read[name], f"{name}: {read[name]} rows read, {found} accounted for"
    return counts


def _stop_if_unusable(counts: Mapping[str, Mapping[str, int]], features: Features, folder: Location) -> None:
    for name, found in counts.items():
        total = sum(found.values())
        malformed = {reason: found[reason] for reason in MALFORMED if reason in found}
        if sum(malformed.values()) > features.max_quarantine_share * total:
            reasons = ", ".join(f"{reason} {count}" for reason, count in malformed.items())
            raise DataError(
                f"{folder / name}: {sum(malformed.values())} of {total} rows are malformed ({reasons}); "
                f"features.max_quarantine_share is {features.max_quarantine_share}.",
                "Correct the vectors and deliver them again, or raise features.max_quarantine_share.",
            )
        if not found.get(""):
            raise DataError(
                f"{folder / name}: none of its {total} rows belongs to an item of the log or the catalog "
                f"({', '.join(f'{reason} {count}' for reason, count in found.items())}).",
                "Use the item ids of the interactions in the features.",
            )


def write_matrix(
    path: Path, rows: Iterable[tuple[slice, NDArray[np.float64]]], shape: tuple[int, int], dtype: str
) -> tuple[int, int]:
    """Write blocks of rows in a number type.

    Returns:
        The number of rows with a number too large for it, and the number of numbers that it rounds to 0.
    """
    num_unfit, num_zeroed = 0, 0
    with RowWriter(path, *shape, dtype) as writer:
        for block, values in rows:
            with np.errstate(over="ignore", under="ignore"):
                stored = values.astype(dtype)
            num_zeroed += int(((stored == 0) & (values != 0)).sum())
            num_unfit += int((~np.isfinite(stored)).any(axis=1).sum())
            writer.write(np.arange(block.start, block.stop), stored)
    return num_unfit, num_zeroed


def _write_raw_matrices(work: Path, dims: Mapping[str, int], num_items: int) -> dict[str, NDArray[np.bool_]]:
    masks = {name: np.zeros(num_items, dtype=bool) for name in dims}
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(RowWriter(work / f"{name}.npy", num_items, dim)) for name, dim in dims.items()
        }
        for path in sorted((work / "placed").glob("part-*.parquet")):
            with pq.ParquetFile(path) as parquet:
                for batch in parquet.iter_batches(BATCH_ROWS):
                    for name in pc.unique(batch.column(MODALITY)).to_pylist():
                        rows = batch.filter(pc.equal(batch.column(MODALITY), name))
                        index = rows.column(ITEM_IDX).to_numpy()
                        values = pc.list_flatten(rows.column(VECTOR)).to_numpy()
                        writers[name].write(index, values.reshape(len(index), dims[name]))
                        masks[name][index] = True
    return masks
