"""A backfill and the daily job know a stage by the same facts: their fingerprints are equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crane_core.config import RunConfig
from crane_core.config_file import load_config
from crane_core.stages import STAGES
from crane_core.storage.artifacts import ArtifactStore
from jobs.backfill.days import Day, survey
from jobs.runner import Job, Result, produce
from jobs.stores import open_store
from tests.worlds.raw_data import write_items, write_log, write_vectors

ENGINES = {"pyspark", "torch", "faiss", "mlflow"}
PRODUCED = tuple(name for name in STAGES if name != "ml.register")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    raw = tmp_path / "raw"
    write_log(raw, [(f"u{n}", f"i{n}", f"2026-01-{19 + n} 10:00") for n in range(3)])
    write_items(raw, [(f"i{n}", f"Item {n}") for n in range(3)])
    write_vectors(raw, "text", [(f"i{n}", [float(n), 1.0]) for n in range(3)])
    return open_store(str(tmp_path))


def configure(end: str, *overrides: str) -> RunConfig:
    start = f"{end[:-2]}{int(end[-2:]) - 1:02d}"
    return load_config(None, [f"window.start={start}", f"window.end={end}", "knn.num_shards=2", *overrides])


def make(store: ArtifactStore, run_id: str, config: RunConfig) -> dict[str, str]:
    """Make every stage of a run as its job does, and return the fingerprints; what a stage computes is left out."""

    def run(job: Job) -> Result:
        (job.out / "whole.json").write_text(json.dumps([run_id, job.stage.name, job.part]))
        return Result({"cutoffs": {"end": config.window.end.isoformat()}, "status": "no_export", "reason": "made here"})

    store.start_run(run_id, config)
    for name in PRODUCED:
        for part in STAGES[name].parts(config):
            label = STAGES[name].label(part)
            store.record(run_id, label, produce(STAGES[name], run_id, part, config, store, run))
    return {
        label: (store.entry(run_id, label) or {})["fingerprint"]
        for name in PRODUCED
        for label in STAGES[name].labels(config)
    }


@pytest.mark.parametrize("mode", ["staged", "joint"])
@pytest.mark.parametrize(
    "overrides",
    [(), ("etl.base_run=yesterday",), ("refine.max_drift=0.05",), ("etl.base_run=yesterday", "refine.max_drift=0.05")],
)
def test_a_backfill_finds_what_the_daily_job_made(store: ArtifactStore, overrides: tuple[str, ...], mode: str) -> None:
    make(store, "yesterday", configure("2026-01-21", "refine.max_drift=0.05"))
    config = configure("2026-01-22", f"crane.mode={mode}", *overrides)
    daily = make(store, "today", config)
    steps = list(survey(Day("2026-01-21", "backfill", config, PRODUCED), store))
    assert {step.state for step in steps} == {"found"}
    assert {STAGES[step.stage].label(step.part): step.fingerprint for step in steps} == daily


@pytest.mark.parametrize("stage", ["etl.interactions", "ml.refine", "ml.knn"])
def test_what_grows_from_a_base_is_known_by_it(store: ArtifactStore, stage: str) -> None:
    """Two bases of other content lead to other fingerprints, so neither run is served the other's artifact."""
    found = []
    for base in ("one", "other"):
        make(store, base, configure("2026-01-21", "refine.max_drift=0.05", f"refine.seed={len(base)}"))
        growing = configure("2026-01-22", f"etl.base_run={base}", "refine.max_drift=0.05")
        found.append(make(store, f"from-{base}", growing)[STAGES[stage].labels(growing)[0]])
    assert found[0] != found[1]


def imported(code: str, *arguments: str) -> tuple[list[str], list[str]]:
    """Run code in a new process; return which engines it has imported, and what it has printed."""
    told = f"{code}\nprint(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}} & {ENGINES})))"
    command = [sys.executable, "-c", f"import sys\n{told}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *printed, engines = done.stdout.splitlines()
    return engines.split(), printed


FIND = """
from importlib import import_module
for label in sys.argv[2].split(","):
    group, stage, *part = label.split(".")
    flags = ["--store", sys.argv[1], "--run", "made", *(["--part", part[0]] if part else [])]
    assert import_module(f"jobs.{group}.{stage}").main(flags) == 0
"""


def test_a_job_that_finds_its_artifact_imports_no_engine(store: ArtifactStore) -> None:
    """Neither an engine nor, without PySpark, a JVM: most jobs of a run that is repeated find what they would make."""
    config = configure("2026-01-21")
    make(store, "made", config)
    labels = [label for name in PRODUCED if name != "ml.export" for label in STAGES[name].labels(config)]
    engines, printed = imported(FIND, store.storage.uri, ",".join(labels))
    assert [json.loads(line)["status"] for line in printed] == ["found"] * len(labels)
    assert engines == []


def test_jobs_of_the_release_import_no_torch_where_they_look_a_version_up() -> None:
    jobs = ("register", "export", "promote", "rollback", "restore")
    engines, _ = imported(f"import {', '.join(f'jobs.ml.{job}' for job in jobs)}")
    assert "mlflow" in engines and not {"torch", "faiss"} & set(engines)


def test_a_backfill_imports_no_engine_before_it_has_work() -> None:
    jobs = ("plan", "check", "etl", "content", "train")
    assert imported(f"import {', '.join(f'jobs.backfill.{job}' for job in jobs)}") == ([], [])
