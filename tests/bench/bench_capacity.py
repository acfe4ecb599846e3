"""What each stage takes on a run of a given size: the measurements behind `crane plan`.

python -m tests.bench.bench_capacity --users 10000 --items 5000 --interactions 200000 --dims 64 64 [--store FOLDER]

Makes random data of that size (power-law popularity), runs every stage as a process of its own, checks that the
artifacts are whole, and prints one JSON line: per stage the bytes of its artifact, its peak memory, and its processor
seconds, which other work on the machine disturbs less than the clock. Two epochs are trained: memory and storage do not
depend on their number, `epoch_core_seconds` is one.

python -m tests.bench.bench_capacity --fit FILE     fits the constants of crane_core/capacity.json to FILE
python -m tests.bench.bench_capacity --read STORE RUN COMMAND     prints a run that COMMAND has made as another line
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crane_core.capacity import WORK, fit
from crane_core.config import RunConfig
from crane_core.config_file import load_config
from crane_core.stages import STAGES, WHOLE
from crane_core.storage.artifacts import ArtifactStore
from jobs.stores import open_store

CONSTANTS = Path(__file__).parents[2] / "crane_core" / "capacity.json"
DAYS = 28
START = datetime(2026, 1, 1, tzinfo=UTC)
EPOCHS = 2
SETTINGS = (
    f"window.start={START + timedelta(days=DAYS - 1):%Y-%m-%d}",
    f"window.end={START + timedelta(days=DAYS):%Y-%m-%d}",
    "etl.validation_days=2",
    "etl.test_days=2",
    f"train.num_epochs={EPOCHS}",
    "refine.num_steps=20",
    "evaluate.num_bootstrap=200",
    "promote.beats=[]",
    "promote.min_users=1",
)
JOBS = (*(name for name in STAGES if name != "ml.export"), "ml.promote", "ml.export")


def write_raw(root: Path, users: int, items: int, interactions: int, dims: list[int]) -> None:
    """Random raw data; every user and item that the draw reaches, popularity falling as a power law."""
    draw = np.random.default_rng(0)
    weights = 1 / np.arange(1, items + 1) ** 0.6
    user = np.concatenate([np.arange(users), draw.integers(users, size=max(0, interactions - users))])
    item = draw.choice(items, size=len(user), p=weights / weights.sum())
    day = draw.integers(DAYS, size=len(user))
    for number in range(DAYS):
        chosen = np.flatnonzero(day == number)
        folder = root / "interactions" / f"dt={START + timedelta(days=number):%Y-%m-%d}"
        folder.mkdir(parents=True)
        instant = START + timedelta(days=number, hours=12)
        table = {
            "user_id": [f"user-{n}" for n in user[chosen]],
            "item_id": [f"item-{n}" for n in item[chosen]],
            "event_time": pa.array([instant] * len(chosen), pa.timestamp("us", "UTC")),
        }
        pq.write_table(pa.table(table), folder / "part-0.parquet")
    (root / "items").mkdir()
    ids = [f"item-{n}" for n in range(items)]
    pq.write_table(pa.table({"item_id": ids}), root / "items" / "part-0.parquet")
    for number, dim in enumerate(dims):
        folder = root / "features" / f"m{number}"
        folder.mkdir(parents=True)
        with pq.ParquetWriter(
            folder / "part-0.parquet", pa.schema([("item_id", pa.string()), ("vector", pa.list_(pa.float32()))])
        ) as writer:
            for start in range(0, items, 10_000):
                rows = draw.normal(size=(min(10_000, items - start), dim)).astype(np.float32)
                offsets = pa.array(np.arange(0, rows.size + 1, dim), pa.int32())
                vectors = pa.ListArray.from_arrays(offsets, pa.array(rows.ravel()))
                writer.write_table(pa.table({"item_id": ids[start : start + len(rows)], "vector": vectors}))


def measure(store_path: Path, raw: Path, settings: list[str]) -> dict[str, Any]:
    """Run every stage and read what its manifest says."""
    given = [flag for setting in settings for flag in ("--set", setting)]
    flags = ["--store", str(store_path), "--run", "sizing", "--set", f"runtime.raw={raw}", *given]
    config = load_config(None, settings)
    seconds: dict[str, float] = {}
    for name in JOBS:
        for part in STAGES[name].parts(config) if name in STAGES else (WHOLE,):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-m", f"jobs.{name}", *flags, *(["--part", part] if part else [])]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
            seconds[name] = seconds.get(name, 0.0) + used
    stages = stages_of(open_store(str(store_path)), "sizing", config)
    for name, stage in stages.items():
        # The JVM of a Spark job is nobody's child that is waited for: its seconds are unknown.
        if name.startswith("ml."):
            stage["core_seconds"] = round(seconds[name], 1)
        if name in WORK:
            stage["epoch_core_seconds"] = round(seconds[name] / EPOCHS, 1)
    return stages


def stages_of(store: ArtifactStore, run_id: str, config: RunConfig) -> dict[str, Any]:
    """Peak memory and bytes of the stages that a run has finished, from their manifests."""
    stages: dict[str, Any] = {}
    for name, stage in STAGES.items():
        parts = stage.parts(config)
        if name == "ml.register" or store.entry(run_id, stage.label(parts[0])) is None:
            continue
        found = [store.artifact(run_id, stage.label(part)) for part in parts]
        for artifact in found:
            artifact.verify()
        stages[name] = {
            "peak_bytes": max(artifact.manifest["peak_bytes"] for artifact in found),
            "bytes": sum(each["bytes"] for artifact in found for each in artifact.manifest["files"].values()),
        }
    return stages


def read(store_uri: str, run_id: str, origin: str) -> dict[str, Any]:
    """A run that something else made, as this bench prints its own.

    Args:
        store_uri: its store.
        run_id: the run.
        origin: the command that made it.
    """
    store = open_store(store_uri)
    config = load_config(None, [], store.run(run_id)["config"])
    counted = store.artifact(run_id, "etl.interactions").facts
    modalities = store.artifact(run_id, "etl.features").facts["modalities"]
    return {
        "users": counted["num_users"],
        "items": counted["num_items"],
        "interactions": counted["num_rows_read"],
        "dims": [each["dim"] for each in modalities.values()],
        "stages": stages_of(store, run_id, config),
        "command": origin,
    }


def write_constants(measured: Path) -> None:
    """Fit the constants of `crane plan` to the runs in a file of JSON lines, and ship them."""
    runs = [json.loads(line) for line in measured.read_text().splitlines()]
    CONSTANTS.write_text(json.dumps(fit(runs), indent=1) + "\n")


def main() -> None:
    if sys.argv[1:2] == ["--fit"]:
        write_constants(Path(sys.argv[2]))
        return
    if sys.argv[1:2] == ["--read"]:
        print(json.dumps(read(*sys.argv[2:5])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, required=True)
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--interactions", type=int, required=True)
    parser.add_argument("--dims", type=int, nargs="+", required=True, help="width of each modality")
    parser.add_argument("--set", action="append", default=[], metavar="section.field=value")
    parser.add_argument("--store", type=Path, help="keep the run here; by default it is removed")
    arguments = parser.parse_args()
    size = {name: getattr(arguments, name) for name in ("users", "items", "interactions", "dims")}
    with tempfile.TemporaryDirectory(prefix="crane-sizing-") as scratch:
        write_raw(Path(scratch) / "raw", **size)
        store = arguments.store or Path(scratch) / "store"
        stages = measure(store, Path(scratch) / "raw", [*SETTINGS, *arguments.set])
    print(
        json.dumps(
            {
                **size,
                "stages": stages,
                "command": " ".join(["python", "-m", "tests.bench.bench_capacity", *sys.argv[1:]]),
                "device": f"{platform.machine()}, {os.cpu_count()} cores",
                "versions": {name: version(name) for name in ("torch", "pyspark", "numpy")},
            }
        )
    )


if __name__ == "__main__":
    main()
