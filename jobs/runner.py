"""Find or make the artifact of a stage: fingerprint, lock, work, publication."""

from __future__ import annotations

import argparse
import logging
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crane_core.config import RunConfig
from crane_core.errors import ConfigError
from crane_core.stages import STAGES, Stage, fingerprint_of, input_labels
from crane_core.storage.artifacts import Artifact, ArtifactStore
from crane_core.storage.lock import locked
from jobs.entry_points import run_job
from jobs.stores import scratch
from jobs.usage import Usage

logger = logging.getLogger(__name__)


@dataclass
class Result:
    """Report of a stage about its output.

    Attributes:
        facts: counts, shapes and figures for the manifest.
        tables: folder to a checksum of its rows, for tables whose file names and row order are free.
    """

    facts: dict[str, Any]
    tables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One stage at work for one run.

    Attributes:
        stage: which stage.
        part: name of the part of a mapped stage, `WHOLE` for another.
        config: the run's configuration.
        run_id: the run.
        store: the artifact store.
        out: empty local folder that becomes the artifact.
        work: local folder that survives a kill and is removed once the artifact is published.
    """

    stage: Stage
    part: str
    config: RunConfig
    run_id: str
    store: ArtifactStore
    out: Path
    work: Path

    def input(self, label: str) -> Artifact:
        """Return the artifact that an earlier stage, or a part of it, left for this run."""
        return self.store.artifact(self.run_id, label)

    def input_parts(self, stage: str) -> list[Artifact]:
        """Return the artifacts of every part of a mapped stage, in order."""
        return [self.input(label) for label in STAGES[stage].labels(self.config)]


def run_stage(
    name: str,
    run: Callable[[Job], Result],
    argv: Sequence[str] | None = None,
) -> int:
    """Entry point of a job that leaves an artifact: skip when it is there, else run and publish.

    Args:
        name: the stage.
        run: does the work in `job.out`.
        argv: flags, the process's own when None.

    Returns:
        The exit code.
    """

    def work(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
        return produce(STAGES[name], arguments.run, arguments.part, config, store, run)

    return run_job(name, work, argv)


def identify(
    stage: Stage, run_id: str, part: str, config: RunConfig, store: ArtifactStore
) -> tuple[dict[str, Artifact], str]:
    """Find the inputs of a stage for a run, and the fingerprint of what it makes of them.

    Raises:
        ConfigError: the stage has no such part.
        ArtifactError: an input is missing or damaged.
    """
    parts = stage.parts(config)
    if part not in parts:
        raise ConfigError(f"Stage {stage.name} has no part {part!r}.", f"Give --part one of {', '.join(parts)}.")
    inputs = {label: store.artifact(run_id, label) for label in input_labels(stage, config)}
    contents = {label: artifact.manifest["content"] for label, artifact in inputs.items()}
    return inputs, fingerprint_of(stage, part, config, contents, stage.source(config, store))


def produce(
    stage: Stage,
    run_id: str,
    part: str,
    config: RunConfig,
    store: ArtifactStore,
    run: Callable[[Job], Result],
) -> dict[str, Any]:
    """Find or make the artifact of a stage for a run.

    Returns:
        The entry of the run record.

    Raises:
        ConfigError: the stage has no such part.
        ArtifactError: an input is missing or damaged.
    """
    inputs, fingerprint = identify(stage, run_id, part, config, store)
    store.claims.claim(run_id, fingerprint)
    base = scratch(store.storage.uri) / stage.name
    # A second runner waits, then finds the result.
    with locked(base / f"{fingerprint}.lock"):
        found = store.find(stage.name, fingerprint)
        status = "found" if found else "done"
        usage = Usage()
        if found is None:
            logger.info("start stage=%s part=%s fingerprint=%s", stage.name, part, fingerprint)
            out, work = base / f"{fingerprint}.out", base / f"{fingerprint}.work"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            work.mkdir(exist_ok=True)
            for artifact in inputs.values():
                artifact.verify()
            job = Job(stage, part, config, run_id, store, out, work)
            result = run(job)
            found = store.publish(
                out,
                {
                    "stage": stage.name,
                    "part": part,
                    "stage_version": stage.version,
                    "fingerprint": fingerprint,
                    "inputs": {name: artifact.fingerprint for name, artifact in inputs.items()},
                    "config": config.model_dump(mode="json", include=set(stage.obeys(config))),
                    "facts": result.facts,
                    "tables": result.tables,
                    **usage.entry(),
                    "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
                    "versions": {"python": platform.python_version(), "crane": version("crane-pipeline")},
                },
            )
            shutil.rmtree(work)
        seconds = usage.seconds
    logger.info("%s stage=%s part=%s seconds=%.1f path=%s", status, stage.name, part, seconds, found.path)
    return entry_of(found, status, seconds)


def entry_of(artifact: Artifact, status: str, seconds: float) -> dict[str, Any]:
    """Return the entry of the run record for a stage that has ended with this artifact."""
    return {
        "status": status,
        "fingerprint": artifact.fingerprint,
        "inputs": artifact.manifest["inputs"],
        "content": artifact.manifest["content"],
        "seconds": seconds,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
