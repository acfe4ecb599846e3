"""Run the stages of a run one after the other, as child processes, without Airflow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crane_core.config import RunConfig
from crane_core.errors import EXIT_ARTIFACT, EXIT_CONFIG, EXIT_DATA, ArtifactError, ConfigError, CraneError, DataError
from crane_core.stages import SHIPPED, STAGES, WHOLE
from jobs.commands.steps import Steps, ended, failure_in

SHIP = "ship."
"""Prefix of a stage that works for the refit run."""
PROMOTE = ("ml.promote", "ml.export", "ml.report")
ERRORS: dict[int, type[CraneError]] = {EXIT_CONFIG: ConfigError, EXIT_DATA: DataError, EXIT_ARTIFACT: ArtifactError}


def retrain_steps(config: RunConfig) -> list[str]:
    """Return the steps of a retraining in order: jobs, and after `SHIP` those that work for the refit run."""
    names = [name for name in STAGES if name not in ("ml.register", "ml.export")]
    refit = ["ml.refit", *(f"{SHIP}{name}" for name in SHIPPED)] if config.etl.refit else []
    return [*names, *refit, "ml.register"]


def run_stages(
    names: Sequence[str], config: RunConfig | None, flags: Sequence[str], log: Path, steps: Steps
) -> dict[str, dict[str, Any]]:
    """Run stages in order, every part of a mapped stage.

    Args:
        names: stages, `<group>.<stage>`, after `SHIP` those of the refit run.
        config: tells the parts of mapped stages; None where none of the names is a stage.
        flags: those of every job, and the jobs' own.
        log: file that gets everything the jobs say.
        steps: where progress is shown.

    Returns:
        Stage, or `stage.part`, to what the job printed.

    Raises:
        CraneError: a job failed; its own error, or one of the type its exit code stands for.
    """
    results: dict[str, dict[str, Any]] = {}
    for step in names:
        name, refit = step.removeprefix(SHIP), ["--refit"] if step.startswith(SHIP) else []
        for part in STAGES[name].parts(config) if config and name in STAGES else (WHOLE,):
            label = f"{step}.{part}" if part else step
            results[label] = run_child(name, [*flags, *refit, *(["--part", part] if part else [])], log, steps, label)
    return results


def run_child(name: str, flags: Sequence[str], log: Path, steps: Steps, label: str = "") -> dict[str, Any]:
    """Run one job and return the JSON object it prints.

    Raises:
        CraneError: it failed; its own error, or one of the type its exit code stands for.
    """
    label = label or name
    since = steps.seconds
    log.parent.mkdir(parents=True, exist_ok=True)
    steps.show(label, "start")
    with tempfile.TemporaryFile("w+") as output, log.open("a") as everything:
        process = subprocess.Popen(
            [sys.executable, "-m", f"jobs.{name}", *flags],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            start_new_session=True,
        )
        assert process.stderr is not None
        try:
            for line in process.stderr:
                everything.write(line)
                steps.job_line(label, line.rstrip())
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
        output.seek(0)
        lines = output.read().splitlines()
    if code != 0:
        silent = ERRORS.get(code, CraneError)(
            f"exit code {code}", f"Read the end of {log}, then run the same command again: it goes on from here."
        )
        raise ended(f"jobs.{name} failed", (failure_in(lines[-1]) if lines else None) or silent, log)
    steps.show(label, f"done seconds={steps.seconds - since:.1f}")
    return json.loads(lines[-1])
