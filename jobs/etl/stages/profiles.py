"""Sum the feature rows of every user's training items, per modality, each times the weight of the interaction.

Sums are taken in float64 over one user's items, in the order of their numbers. Partitions and batches do not matter, so
two runs agree bit for bit. A run with `etl.base_run` sums only for users whose items, or whose items' rows, have
changed since that run. It copies the rows of all others: the same bytes for less work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from crane_core.schema import ITEM_IDX, SPLIT, TRAIN, USER_IDX, WEIGHT
from crane_core.storage.artifacts import Artifact
from crane_core.storage.matrix import RowWriter, blocks, changed_rows, open_matrix, rows_per_block
from jobs.etl.session import open_session
from jobs.etl.tables import lookup, write_balanced, write_parts
from jobs.runner import Job, Result
from jobs.stores import scratch

logger = logging.getLogger(__name__)

ROWS_PER_RANGE = 2_000_000
FEW_ROWS = 100_000
"""Rows that one Python worker sums in less time than a second one needs to start."""
BATCH_ROWS = 4096


def sum_profiles(train: DataFrame, features: Sequence[tuple[str, str]], mean: bool, partitions: int) -> DataFrame:
    """Profiles of the users that have training rows.

    Args:
        train: user_idx, item_idx and weight, one row per user and item.
        features: per modality the paths of its matrix and its mask; every worker maps them into memory.
        mean: divide by the weight of the items that have the modality.
        partitions: ranges of users to work on apart.

    Returns:
        user_idx int, and per modality m `sum_m` array<float> and `count_m` int: the items that have it.
    """
    columns = ", ".join(f"sum_{m} array<float>, count_{m} int" for m in range(len(features)))
    ranged = train.select(USER_IDX, ITEM_IDX, WEIGHT).repartitionByRange(partitions, USER_IDX)
    ordered = ranged.sortWithinPartitions(USER_IDX, ITEM_IDX)
    return ordered.mapInArrow(_summer(list(features), mean), f"{USER_IDX} int, {columns}")


class Met(NamedTuple):
    """Who met what: user_idx and item_idx, int32 [n], and weight, float32 [n]."""

    users: NDArray[np.int32]
    items: NDArray[np.int32]
    weights: NDArray[np.float32]

    def part(self, rows: slice) -> Met:
        """Return some rows."""
        return Met(self.users[rows], self.items[rows], self.weights[rows])


def whole_users(batches: Iterator[pa.RecordBatch]) -> Iterator[Met]:
    """Regroup sorted rows so that no user straddles two groups.

    Args:
        batches: columns user_idx, item_idx and weight, sorted by user across batches.
    """
    held = Met(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32))
    for batch in batches:
        new = (batch.column(name).to_numpy() for name in (USER_IDX, ITEM_IDX, WEIGHT))
        held = Met(*(np.concatenate(pair) for pair in zip(held, new, strict=True)))
        if len(held.users) == 0:
            continue
        cut = int(np.searchsorted(held.users, held.users[-1]))
        if cut:
            yield held.part(slice(0, cut))
            held = held.part(slice(cut, None))
    if len(held.users):
        yield held


def segment_sums(
    rows: NDArray, items: NDArray[np.int32], weights: NDArray[np.float32], starts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Sum `weights * rows[items]` from each start to the next, in float64.

    A segment is summed in blocks counted from its own start, so its sum depends on its items only.

    Args:
        rows: float32 or float16 [num_items, dim].
        items: int32 [n].
        weights: float32 [n].
        starts: int64 [segments], strictly increasing, from 0.

    Returns:
        float64 [segments, dim].
    """
    dim = rows.shape[1]
    limit = rows_per_block(dim * 8)
    ends = np.append(starts[1:], len(items))
    sums = np.empty((len(starts), dim))
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + limit, side="right")))
        begin, end = starts[first], ends[last - 1]
        if end - begin <= limit:
            values = rows[items[begin:end]].astype(np.float64) * weights[begin:end, None]
            sums[first:last] = np.add.reduceat(values, starts[first:last] - begin, axis=0)
        else:
            sums[first] = 0
            for start in range(begin, end, limit):
                block = slice(start, min(start + limit, end))
                values = rows[items[block]].astype(np.float64) * weights[block, None]
                sums[first] += np.add.reduce(values, axis=0)
        first = last
    return sums


def run(job: Job) -> Result:
    """Run the stage; see the module docstring."""
    interactions, features = job.input("etl.interactions"), job.input("etl.features")
    num_users, num_train = (interactions.facts[name] for name in ("num_users", "num_train"))
    dims = {name: entry["dim"] for name, entry in sorted(features.facts["modalities"].items())}
    paths = [(str(features.file(f"{name}/matrix.npy")), str(features.file(f"{name}/mask.npy"))) for name in dims]
    spark = open_session(job.config.runtime, scratch(job.store.storage.uri), num_train)
    train = spark.read.parquet(str(interactions.file("interactions"))).where(F.col(SPLIT) == TRAIN)
    partitions = 1 if num_train <= FEW_ROWS else max(2, -(-num_train // ROWS_PER_RANGE))
    earlier = find_earlier(job, interactions, dims)
    if earlier is not None:
        changed = changed_items(earlier.features, features, list(dims))
        stale = stale_users(train, earlier.train(spark), changed)
        stale = write_balanced(stale, job.work / "stale")
        num_stale = stale.count()
        logger.info("base run=%s stale_users=%d changed_items=%d", earlier.run, num_stale, changed.sum())
        train = train.join(lookup(stale, num_stale), USER_IDX, "left_semi")
    profiles = sum_profiles(train, paths, job.config.profiles.aggregate == "mean", partitions)
    # The ranges are in the order of the users and so are the rows within: the files need no further sort.
    write_parts(profiles, job.work / "profiles")
    if earlier is None:
        written = _write_matrices(job.work / "profiles", job.out, dims, num_users)
    else:
        written = _update_matrices(job.work, earlier.profiles, job.out, dims, num_users)
    facts = {}
    for name, dim in dims.items():
        counts = written[name]
        np.save(job.out / f"{name}.counts.npy", counts)
        facts[name] = {"dim": dim, "num_users_without": int((counts == 0).sum()), "num_rows_summed": int(counts.sum())}
        logger.info("profiles modality=%s users=%d without=%d", name, num_users, facts[name]["num_users_without"])
    return Result({"num_users": num_users, "aggregate": job.config.profiles.aggregate, "modalities": facts})


@dataclass(frozen=True)
class Earlier:
    """The artifacts of the run that this one goes on from.

    Attributes:
        run: its id.
        interactions, features, profiles: what it left.
    """

    run: str
    interactions: Artifact
    features: Artifact
    profiles: Artifact

    def train(self, spark: SparkSession) -> DataFrame:
        """Its training rows."""
        return spark.read.parquet(str(self.interactions.file("interactions"))).where(F.col(SPLIT) == TRAIN)


def find_earlier(job: Job, interactions: Artifact, dims: Mapping[str, int]) -> Earlier | None:
    """Artifacts of `etl.base_run` to reuse; None unless it has profiles of the same kind under the same ids."""
    run = job.config.etl.base_run
    if run is None or job.store.entry(run, "etl.profiles") is None:
        return None
    found = Earlier(run, *(job.store.artifact(run, f"etl.{name}") for name in ("interactions", "features", "profiles")))
    then = found.profiles.facts
    same_ids = found.interactions.fingerprint == interactions.facts["base"]
    same_kind = then["aggregate"] == job.config.profiles.aggregate
    same_dims = dict(dims) == {name: entry["dim"] for name, entry in then["modalities"].items()}
    if not (same_ids and same_kind and same_dims):
        logger.info("base run=%s unused same_ids=%s same_kind=%s same_dims=%s", run, same_ids, same_kind, same_dims)
        return None
    for artifact in (found.interactions, found.features, found.profiles):
        artifact.verify()
    return found


def changed_items(before: Artifact, now: Artifact, names: Sequence[str]) -> NDArray[np.bool_]:
    """bool [items of `before`]: true where a modality of the item has another row, is new or is gone."""
    files = [f"{name}/{part}.npy" for name in names for part in ("mask", "matrix")]
    changed = [changed_rows(*(open_matrix(side.file(file)) for side in (before, now))) for file in files]
    num_before = len(open_matrix(before.file(files[0])))
    return np.logical_or.reduce(changed)[:num_before]


def stale_users(train: DataFrame, before: DataFrame, changed: NDArray[np.bool_]) -> DataFrame:
    """Users whose items or weights differ between two tables of training rows, or who have a changed item.

    Sets are compared by their number of items and three sums of 40-bit hashes. A fault of the machine is more likely
    than two different sets that agree in all four.

    Args:
        train, before: user_idx, item_idx and weight, no pair twice.
        changed: bool [items], items whose rows have changed.

    Returns:
        user_idx, each once.
    """
    sides = []
    for name, rows in (("now", train), ("then", before)):
        hashes = [
            F.sum(F.xxhash64(F.lit(seed), F.col(ITEM_IDX), F.col(WEIGHT)).bitwiseAND(F.lit(2**40 - 1)))
            for seed in range(3)
        ]
        marks = F.struct(F.count(F.lit(1)), *hashes).alias(name)
        sides.append(rows.groupBy(USER_IDX).agg(marks))
    both = sides[0].join(sides[1], USER_IDX, "full")
    stale = both.where(~F.col("now").eqNullSafe(F.col("then"))).select(USER_IDX)
    if changed.any():
        session = train.sparkSession
        items = session.createDataFrame(pa.table({ITEM_IDX: pa.array(np.flatnonzero(changed).astype(np.int32))}))
        stale = stale.union(train.join(items, ITEM_IDX, "left_semi").select(USER_IDX)).distinct()
    return stale


def _update_matrices(
    work: Path, before: Artifact, out: Path, dims: dict[str, int], num_users: int
) -> dict[str, NDArray[np.int32]]:
    """Copy the rows of the earlier profiles, then replace those of the stale users."""
    counts, matrices = {}, {}
    for name, dim in dims.items():
        old = open_matrix(before.file(f"{name}.npy"))
        with RowWriter(out / f"{name}.npy", num_users, dim) as writer:
            for block in blocks(len(old), dim * old.itemsize):
                writer.write(np.arange(block.start, block.stop), old[block])
        matrices[name] = np.load(out / f"{name}.npy", mmap_mode="r+", allow_pickle=False)
        counts[name] = np.zeros(num_users, dtype=np.int32)
        counts[name][: len(old)] = np.load(before.file(f"{name}.counts.npy"))
    for batch in _batches(work / "stale"):
        for name in dims:
            matrices[name][batch.column(USER_IDX).to_numpy()] = 0
            counts[name][batch.column(USER_IDX).to_numpy()] = 0
    for batch in _batches(work / "profiles"):
        index = batch.column(USER_IDX).to_numpy()
        for m, (name, dim) in enumerate(dims.items()):
            values = pc.list_flatten(batch.column(f"sum_{m}")).to_numpy()
            matrices[name][index] = values.reshape(len(index), dim)
            counts[name][index] = batch.column(f"count_{m}").to_numpy()
    for matrix in matrices.values():
        matrix.flush()
    return counts


def _batches(folder: Path) -> Iterator[pa.RecordBatch]:
    for path in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(path) as parquet:
            yield from parquet.iter_batches(BATCH_ROWS)


def _summer(
    features: list[tuple[str, str]], mean: bool
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def work(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        matrices = [(open_matrix(Path(rows)), open_matrix(Path(mask))) for rows, mask in features]
        for users, items, weights in whole_users(batches):
            starts = np.flatnonzero(np.diff(users, prepend=-1))
            columns: dict[str, pa.Array] = {USER_IDX: pa.array(users[starts], pa.int32())}
            for m, (rows, mask) in enumerate(matrices):
                sums = segment_sums(rows, items, weights, starts)
                counts = np.add.reduceat(mask[items].astype(np.int32), starts)
                if mean:
                    total = np.add.reduceat(mask[items] * weights.astype(np.float64), starts)
                    sums /= np.where(total > 0, total, 1)[:, None]
                offsets = np.arange(len(starts) + 1, dtype=np.int32) * rows.shape[1]
                values = pa.array(sums.astype(np.float32).reshape(-1))
                columns[f"sum_{m}"] = pa.ListArray.from_arrays(pa.array(offsets), values)
                columns[f"count_{m}"] = pa.array(counts, pa.int32())
            yield pa.record_batch(columns)

    return work


def _write_matrices(source: Path, out: Path, dims: dict[str, int], num_users: int) -> dict[str, NDArray[np.int32]]:
    counts = {name: np.zeros(num_users, dtype=np.int32) for name in dims}
    with ExitStack() as stack:
        writers = [stack.enter_context(RowWriter(out / f"{name}.npy", num_users, dim)) for name, dim in dims.items()]
        for batch in _batches(source):
            index = batch.column(USER_IDX).to_numpy()
            for m, (name, dim) in enumerate(dims.items()):
                values = pc.list_flatten(batch.column(f"sum_{m}")).to_numpy()
                writers[m].write(index, values.reshape(len(index), dim))
                counts[name][index] = batch.column(f"count_{m}").to_numpy()
    return counts
