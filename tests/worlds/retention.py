"""A store of many small daily runs with a registry, and a retraining of three stages that takes milliseconds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from crane_core.config import RunConfig, Runtime
from crane_core.model_config import Choices
from crane_core.refit import refit_config, refit_run
from crane_core.release.ledger import Draft, Ledger
from crane_core.release.registry import Registry, open_registry
from crane_core.stages import STAGES, WHOLE
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import run_job
from jobs.ml.refit import refit_base
from jobs.runner import Job, Result, produce
from jobs.stores import open_store
from tests.worlds.raw_data import write_items, write_log, write_vectors

FIRST = datetime(2020, 1, 10, tzinfo=UTC)
CHAIN = ("etl.interactions", "etl.features", "etl.profiles")
NUM_BYTES = 2000


def write_raw(raw: Path) -> None:
    """Write the least that the stages' fingerprints look at."""
    write_log(raw, [("u", "i", "2020-01-05 10:00")])
    write_items(raw, [("i", "Item")])
    write_vectors(raw, "text", [("i", [1.0, 2.0])])


def flags(store: str, raw: Path, day: int, *settings: str, run: str = "") -> list[str]:
    """Return the flags of the run of a day, which is `day-07` where no other name is given."""
    start = FIRST + timedelta(days=day)
    pairs = (f"runtime.raw={raw}", f"window.start={start}", f"window.end={start + timedelta(days=1)}", *settings)
    return ["--store", store, "--run", run or name(day), *(word for pair in pairs for word in ("--set", pair))]


def with_refit(argv: Sequence[str]) -> None:
    """Run such a retraining, and the same stages of its refit run."""
    assert main(argv) == 0 and refit_main(argv) == 0 and main([*argv, "--refit"]) == 0


def refit_main(argv: Sequence[str]) -> int:
    """Record the refit run of a run, with choices that nobody has made."""
    return run_job("refit", _start_refit, argv)


def _start_refit(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    choices = Choices(behaviour_epochs=1, crane_epochs=1, crane_ranking="dot", share=0.5)
    store.restart_run(refit_run(arguments.run), refit_config(config, choices, refit_base(config, store)))
    return {"status": "done"}


def name(day: int) -> str:
    return f"day-{day:02d}"


def main(argv: Sequence[str]) -> int:
    """Run a retraining of three stages in one job, and what marks the run as one to go on from."""
    return run_job("small", _retrain, argv)


def _retrain(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    for stage in CHAIN:
        entry = produce(STAGES[stage], arguments.run, WHOLE, config, store, _write)
        store.record(arguments.run, stage, entry)
        # What a later job would do: read what was left.
        store.artifact(arguments.run, stage).verify()
    store.record(arguments.run, "ml.graph", {"status": "done", "fingerprint": entry["fingerprint"]})
    return {"status": "done"}


def _write(job: Job) -> Result:
    (job.out / "rows.txt").write_text(f"{job.run_id} {job.stage.name}".ljust(NUM_BYTES))
    return Result({"cutoffs": {"end": job.config.window.end.isoformat()}})


def register(store: str, run: str) -> str:
    """Make a version of a run, without any files; return its number."""
    registry = open_registry(Runtime(), store)
    version = MlflowClient(registry.uri, registry.uri).create_model_version(
        registry.name, "file:///nowhere", tags={"crane.run": run}
    )
    return str(version.version)


def crown(store: str, number: str) -> None:
    """Make a version champion, in the ledger and in the registry."""
    registry = open_registry(Runtime(), store)
    run = registry.version(number).run_id
    ledger = Ledger(open_store(store).storage, registry.name)
    ledger.append(ledger.size(), Draft("promote", number, number, run, "because"))
    registry.set_alias("champion", number)


def the_registry(store: str) -> Registry:
    return open_registry(Runtime(), store)


def assert_whole(store: str) -> list[str]:
    """Check that every record names artifacts that are there and whole; return the runs."""
    found = open_store(store)
    for run in found.run_ids():
        assert found.recorded_config(run) is not None, run
        for file in found.storage.names(f"runs/{run}"):
            entry = json.loads(found.storage.read(f"runs/{run}/{file}") or b"")
            stage = file.removesuffix(".json")
            if stage in CHAIN:
                artifact = found.find(stage, entry["fingerprint"])
                assert artifact is not None, (run, stage)
                artifact.verify()
    return found.run_ids()
