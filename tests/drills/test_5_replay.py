"""MovieLens 100K as it came: every single day of its seven months, each run going on from the day before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from crane_core.raw.importers import import_movielens
from jobs.commands import paths
from jobs.commands.demo import wheel
from jobs.commands.steps import Steps
from tests.jobs.test_etl_days import JOBS, artifact, assert_same_log, ids, replay


def by_id(store: Path, run: str, kind: str, stage: str, file: str) -> NDArray[np.float32]:
    """Rows of a matrix in the order of the external ids."""
    names = ids(artifact(store, run), kind)
    return np.load(artifact(store, run, stage).file(file))[np.argsort(names)]


@pytest.mark.spark
@pytest.mark.timeout(7200)
def test_every_day_of_movielens(spark: SparkSession, tmp_path: Path) -> None:
    """Log, features and profiles are those of one run over everything; the sums of two hundred days, to the bit."""
    raw, store = tmp_path / "movielens", tmp_path / "store"
    import_movielens(wheel(paths.HOME / "downloads", Steps()), raw)
    last = replay(raw, tmp_path, 1, tuple(JOBS), features__standardise="l2")
    assert_same_log(store, last, "whole")
    rows = pq.read_table(artifact(store, last).path / "interactions", filters=[("split", "=", 0)])
    rows = rows.sort_by([("user_idx", "ascending"), ("item_idx", "ascending")])
    starts = np.flatnonzero(np.diff(rows["user_idx"].to_numpy(), prepend=-1))
    for name in artifact(store, last, "features").facts["modalities"]:
        matrices = [by_id(store, run, "item", "features", f"{name}/matrix.npy") for run in (last, "whole")]
        np.testing.assert_array_equal(*matrices)
        profiles = [by_id(store, run, "user", "profiles", f"{name}.npy") for run in (last, "whole")]
        np.testing.assert_allclose(*profiles, rtol=1e-6, atol=1e-7)
        matrix = np.load(artifact(store, last, "features").file(f"{name}/matrix.npy"))
        sums = np.add.reduceat(matrix[rows["item_idx"].to_numpy()].astype(np.float64), starts)
        found = np.load(artifact(store, last, "profiles").file(f"{name}.npy"))
        np.testing.assert_array_equal(found, sums.astype(np.float32))
