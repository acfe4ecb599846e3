"""Runs as the retraining leaves them, made by hand: planted preferences, and models of a chosen quality."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from crane_core.config import RunConfig
from crane_core.config_file import load_config
from crane_core.refit import refit_config, refit_run
from crane_core.schema import TEST, TRAIN
from crane_core.storage.artifacts import Artifact
from jobs.ml import evaluate, promote, register
from jobs.stores import open_store
from tests.worlds.mlflow_tables import copy_tables

NUM_USERS, NUM_ITEMS, NUM_COLD, DIM = 120, 90, 6, 8
SETTINGS = (
    *("evaluate.num_bootstrap=200", "promote.min_users=20", "export.k=10", "export.num_similar=5"),
    "etl.refit=false",
)


def flags(store: Path, run_id: str, window_end: str = "2026-03-01", *settings: str) -> list[str]:
    """Command line of a job of such a run."""
    end = datetime.fromisoformat(window_end).replace(tzinfo=UTC)
    window = (f"window.start={(end - timedelta(days=1)).isoformat()}", f"window.end={end.isoformat()}")
    pairs = [word for setting in (*SETTINGS, *window, *settings) for word in ("--set", setting)]
    return ["--store", str(store), "--run", run_id, *pairs]


def make_run(
    store: Path,
    run_id: str,
    noise: float = 0.5,
    lightgcn_noise: float = 2.0,
    window_end: str = "2026-03-01",
    cold_noise: float | None = None,
    seed: int = 0,
    num_untrained: int = 0,
    settings: tuple[str, ...] = (),
    edit: Callable[[dict[str, np.ndarray], np.ndarray, np.ndarray], None] | None = None,
) -> list[str]:
    """Publish `etl.interactions`, `ml.refine`, `ml.behaviour`, `ml.train` and `ml.evaluate` of a run.

    Args:
        noise: standard deviation added to the true embeddings by the model of the run; 0 is the best there can be.
        lightgcn_noise: the same for the baseline.
        cold_noise: noise on the rows of the cold items, `noise` when None.
        seed: of the noise; the data are the same for every run.
        num_untrained: users, the first ones, whose items are all held out.
        settings: further `section.field=value` of the run.
        edit: changes the rows of the run's model in place, given the true embeddings of users and items.

    Returns:
        Flags of the run's jobs.
    """
    argv = flags(store, run_id, window_end, *settings)
    config = load_config(None, argv[5::2])
    artifacts = open_store(str(store))
    artifacts.start_run(run_id, config)
    users, items = _true_rows()
    _interactions(store, run_id, config, users, items, num_untrained)
    folder = _folder(store)
    np.save(folder / "fused_items.npy", items.astype(np.float32))
    (folder / "fit.json").write_text(json.dumps({"curve": [], "mean_cosine": [0.1]}))
    _publish(store, run_id, "ml.refine", folder, {"modalities": ["planted"]})
    for stage, scale in (("ml.train", noise), ("ml.behaviour", lightgcn_noise)):
        generator = np.random.default_rng(seed + 100)
        rows = {
            "user_embeddings": users + scale * generator.normal(size=users.shape),
            "item_embeddings": items + scale * generator.normal(size=items.shape),
        }
        if cold_noise is not None and stage == "ml.train":
            rows["item_embeddings"][-NUM_COLD:] = cold_noise * generator.normal(size=(NUM_COLD, DIM)) - 5
        if edit and stage == "ml.train":
            edit(rows, users, items)
        folder = _folder(store)
        save_file({name: value.astype(np.float32) for name, value in rows.items()}, folder / "embeddings.safetensors")
        save_file({"scale": np.float32([scale])}, folder / "weights.safetensors")
        curve = [
            {"epoch": e, "loss": 0.7 / (e + 1), "bpr": 0.6 / (e + 1), "recall@20": 0.3 - 0.2 / (e + 1),
             "ndcg@20": 0.2 - 0.1 / (e + 1), "seconds": 0.5 * (e + 1)}
            for e in range(12)
        ]  # fmt: skip
        (folder / "curve.json").write_text(json.dumps(curve))
        facts = {"best_epoch": 11, "num_epochs": 12, "validation": {"recall@20": 0.28, "ndcg@20": 0.19}}
        if stage == "ml.train":
            (folder / "trust.json").write_text(
                json.dumps({"share": 0.5, "curve": [[0.0, 0.2], [0.5, 0.3], [1.0, 0.25]]})
            )
            facts |= {"trust": 0.5}
        _publish(store, run_id, stage, folder, facts)
    assert evaluate.main(argv) == 0
    return argv


def ship(argv: list[str], noise: float) -> list[str]:
    """Publish what `ml.register` reads of the refit run of a run: every held-out item is training too.

    Args:
        argv: flags of the run, from `make_run`.
        noise: standard deviation added to the true embeddings by the model that is served.

    Returns:
        Flags of the run's jobs, for a run with a refit run.
    """
    store, run_id = Path(argv[1]), argv[3]
    argv = [word if word != "etl.refit=false" else "etl.refit=true" for word in argv]
    config = load_config(None, argv[5::2])
    artifacts = open_store(str(store))
    artifacts.restart_run(run_id, config)
    artifacts.start_run(refit_run(run_id), refit_config(config, None, None))
    users, items = _true_rows()
    _interactions(store, refit_run(run_id), config, users, items, 0, (TRAIN, TRAIN))
    generator = np.random.default_rng(200)
    folder = _folder(store)
    rows = {"user_embeddings": users, "item_embeddings": items}
    noisy = {name: (each + noise * generator.normal(size=each.shape)).astype(np.float32) for name, each in rows.items()}
    save_file(noisy, folder / "embeddings.safetensors")
    save_file({"scale": np.float32([noise])}, folder / "weights.safetensors")
    _publish(store, refit_run(run_id), "ml.train", folder, {})
    return argv


def copy_registered(store: Path, noises: tuple[float, ...], num_promoted: int) -> list[list[str]]:
    """Put runs `run-1`, `run-2` ... of these noises into a store, all registered and the first of them promoted.

    They are made once for the whole test run: to evaluate, register and promote a run takes a second, to copy it does
    not.

    Args:
        store: folder to make.
        noises: `noise` of each run.
        num_promoted: how many of them are promoted, each before the next one is registered.

    Returns:
        Flags of the jobs of each run.
    """
    _move_copy(_registered(noises, num_promoted), store)
    return [flags(store, f"run-{number}") for number in range(1, len(noises) + 1)]


@functools.cache
def _registered(noises: tuple[float, ...], num_promoted: int) -> Path:
    store = Path(tempfile.mkdtemp(prefix="registered-", dir=_home())) / "store"
    number = len(noises)
    if number == 0:
        copy_tables(store)
        return store
    _move_copy(_registered(noises[:-1], min(num_promoted, number - 1)), store)
    argv = make_run(store, f"run-{number}", noise=noises[-1])
    assert register.main(argv) == 0
    if number <= num_promoted:
        assert promote.main(argv) == 0
    return store


@functools.cache
def _home() -> Path:
    home = Path(tempfile.mkdtemp(prefix="crane-registered-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


def _move_copy(source: Path, target: Path) -> None:
    """Copy a store with its registry; whatever names the folder of the source names that of the copy."""
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        if path.is_file() and path.suffix != ".db" and str(source).encode() in (data := path.read_bytes()):
            path.write_bytes(data.replace(str(source).encode(), str(target).encode()))
    with closing(sqlite3.connect(target / "mlflow.db")) as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        for table in tables:
            for _, column, *_ in database.execute(f'pragma table_info("{table}")').fetchall():
                database.execute(
                    f'update "{table}" set "{column}" = replace("{column}", ?1, ?2) where instr("{column}", ?1)',
                    (str(source), str(target)),
                )
        database.commit()


def damage(path: Path) -> None:
    """Flip one byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _true_rows() -> tuple[np.ndarray, np.ndarray]:
    world = np.random.default_rng(7)
    return world.normal(size=(NUM_USERS, DIM)), world.normal(size=(NUM_ITEMS, DIM))


def _interactions(
    store: Path,
    run_id: str,
    config: RunConfig,
    users: np.ndarray,
    items: np.ndarray,
    num_untrained: int,
    splits: tuple[int, int] = (TRAIN, TEST),
) -> None:
    world = np.random.default_rng(8)
    order = np.argsort(-(users @ items.T + 0.5 * world.gumbel(size=(NUM_USERS, NUM_ITEMS))), axis=1)
    rows = []
    for user in range(NUM_USERS):
        warm = [item for item in order[user] if item < NUM_ITEMS - NUM_COLD][:12]
        cold = [item for item in order[user][:12] if item >= NUM_ITEMS - NUM_COLD]
        trained = warm[::2] if user >= num_untrained else []
        rows += [(user, item, splits[0]) for item in trained]
        rows += [(user, item, splits[1]) for item in warm[1::2] + cold]
    rows.sort()
    folder = _folder(store)
    columns = list(zip(*rows, strict=True))
    time = pa.array([config.window.start] * len(rows), pa.timestamp("us", tz="UTC"))
    tables = {
        "interactions": {
            "user_idx": pa.array(columns[0], pa.int32()),
            "item_idx": pa.array(columns[1], pa.int32()),
            "event_time": time,
            "weight": pa.array(np.ones(len(rows), np.float32)),
            "split": pa.array(columns[2], pa.int8()),
        },
        # Ids that sort in another order than their indices.
        "users": {"user_idx": pa.array(range(NUM_USERS), pa.int32()), "user_id": user_ids()},
        "items": {
            "item_idx": pa.array(range(NUM_ITEMS), pa.int32()),
            "item_id": item_ids(),
            "title": pa.array([f"Title {i}" if i % 10 else None for i in range(NUM_ITEMS)], pa.string()),
            "category": [f"category-{i % 7}" for i in range(NUM_ITEMS)],
            "in_stock": [i % 9 != 4 for i in range(NUM_ITEMS)],
            "available_until": pa.array(
                [config.window.end if i % 9 == 5 else None for i in range(NUM_ITEMS)], pa.timestamp("us", tz="UTC")
            ),
        },
        "cold": {
            "user_id": ["stranger"],
            "item_id": ["item-0"],
            "event_time": time[:1],
            "weight": pa.array([1.0], pa.float32()),
            "split": pa.array([TEST], pa.int8()),
            "user_idx": pa.array([None], pa.int32()),
            "item_idx": pa.array([0], pa.int32()),
            "reason": ["unknown_user"],
        },
    }
    for name, table in tables.items():
        (folder / name).mkdir()
        pq.write_table(pa.table(table), folder / name / "part-0.parquet")
    counts = np.bincount(columns[2], minlength=3).tolist()
    quality = {
        "num_users": NUM_USERS,
        "num_items": NUM_ITEMS,
        "num_rows_read": len(rows) + 4,
        "num_train": counts[0],
        "num_validation": counts[1],
        "num_test": counts[2],
        "num_cold_rows": 1,
        "quarantine": {"null_user_id": 2, "duplicate_event": 1},
    }
    (folder / "quality.json").write_text(json.dumps({**quality, "events_per_day": {"2026-02-27": 300}}))
    _publish(store, run_id, "etl.interactions", folder, quality)


def user_ids() -> list[str]:
    return [f"user-{(i * 37) % NUM_USERS}" for i in range(NUM_USERS)]


def item_ids() -> list[str]:
    return [f"item-{i}" for i in range(NUM_ITEMS)]


def _folder(store: Path) -> Path:
    folder = store / ".scratch" / f"made-{np.random.default_rng().integers(1 << 60):x}"
    folder.mkdir(parents=True)
    return folder


def _publish(store: Path, run_id: str, stage: str, folder: Path, facts: dict) -> Artifact:
    artifacts = open_store(str(store))
    manifest = {
        "stage": stage,
        "part": "",
        "stage_version": 1,
        "fingerprint": run_id,
        "inputs": {},
        "config": {},
        "facts": facts,
        "seconds": 1.25,
        "peak_bytes": 300_000_000,
    }
    artifact = artifacts.publish(folder, manifest)
    artifacts.record(run_id, stage, {"status": "done", "fingerprint": run_id, "content": artifact.manifest["content"]})
    return artifact
