"""The days of a backfill: what is there, what is missing, and how the missing is made.

Each day is a run of its own, `backfill-{end of its window}-{configuration}`; artifacts of other runs with the same
inputs and configuration are found. What a wanted stage reads is wanted too. A day that is trained has a refit run,
whose stages before the trainings need no choice and are made with those of the day.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from crane_core.config import PREVIOUS, RunConfig
from crane_core.config_file import load_config
from crane_core.errors import ArtifactError, ConfigError
from crane_core.refit import choices_of, refit_config, refit_run
from crane_core.stages import SHIPPED, STAGES, WHOLE, fingerprint_of, input_labels
from crane_core.storage.artifacts import Artifact, ArtifactStore
from jobs.commands.demo import run_id
from jobs.entry_points import recorded_run, run_command
from jobs.ml.refit import refit, refit_base
from jobs.runner import Job, Result, produce

logger = logging.getLogger(__name__)

Work = Callable[[Job], Result]
TRAININGS = ("ml.behaviour", "ml.train")
"""Stages that obey the choices of a refit run."""
REFIT = "ml.refit"
REGISTER = "ml.register"
"""Last stage of `--train`; the stages that it reads, directly or not, come before it."""


@dataclass(frozen=True)
class Step:
    """One part of one stage of one day.

    Attributes:
        day: first day of the window, ISO 8601.
        run: the day's run.
        stage, part: what is made.
        state: `found` or `make`.
        fingerprint: of the artifact; None where it depends on something that is still to be made.
    """

    day: str
    run: str
    stage: str
    part: str
    state: str
    fingerprint: str | None


@dataclass(frozen=True)
class Day:
    """One day of a backfill.

    Attributes:
        name: first day of the window, ISO 8601.
        run: its run.
        config: its configuration.
        stages: the wanted stages in the order of the pipeline.
        refit: configuration of its refit run, without the choices; None where there is none to make.
    """

    name: str
    run: str
    config: RunConfig
    stages: tuple[str, ...]
    refit: RunConfig | None = None

    def work(self) -> Iterator[tuple[str, str]]:
        """Yield the runs and stages in order: those of the day, those of its refit run, and the registration."""
        yield from ((self.run, stage) for stage in self.stages if stage != REGISTER)
        if self.refit:
            yield self.run, REFIT
            yield from ((refit_run(self.run), stage) for stage in SHIPPED)
        if REGISTER in self.stages:
            yield self.run, REGISTER


def days(arguments: argparse.Namespace, store: ArtifactStore) -> list[Day]:
    """The days that the flags name, oldest first.

    Raises:
        ConfigError: a window or the configuration is wrong.
    """
    found = []
    for window in arguments.windows:
        start, slash, end = window.partition("/")
        if not slash:
            raise ConfigError(
                f"--windows {window!r} is not of the form START/END.",
                "Write it as --windows START/END, for example --windows 2026-03-01/2026-03-02.",
            )
        config = load_config(arguments.config, [*arguments.set, f"window.start={start}", f"window.end={end}"])
        if config.etl.base_run == PREVIOUS:
            raise ConfigError(
                "etl.base_run=previous: a backfill makes its days side by side, which came first would decide.",
                "Give --set etl.base_run=null, or --set etl.base_run=RUN.",
            )
        trained = arguments.train and window == arguments.windows[-1]
        shipped = refit_config(config, None, refit_base(config, store)) if trained and config.etl.refit else None
        wanted = _with_inputs([*arguments.stages, *([REGISTER] if trained else [])], config)
        found.append(Day(f"{config.window.start:%Y-%m-%d}", run_id("backfill", config), config, wanted, shipped))
    return found


def survey(day: Day, store: ArtifactStore) -> Iterator[Step]:
    """Every step of a day; reads the store and changes nothing."""
    made: dict[tuple[str, str], Artifact | None] = {}
    for run, name in day.work():
        if name == REGISTER:
            yield Step(day.name, run, name, WHOLE, "found" if store.entry(run, name) else "make", None)
        if name in (REGISTER, REFIT):
            continue
        stage, config = STAGES[name], day.config if run == day.run else _shipped(day, made)
        is_open = run != day.run and name in TRAININGS and config.choices is None
        for part in stage.parts(config):
            inputs = {label: made[run, label] for label in input_labels(stage, config)}
            contents = {label: artifact.manifest["content"] for label, artifact in inputs.items() if artifact}
            artifact = fingerprint = None
            if len(contents) == len(inputs) and not is_open:
                fingerprint = fingerprint_of(stage, part, config, contents, stage.source(config, store))
                artifact = store.find(name, fingerprint)
            made[run, stage.label(part)] = artifact
            yield Step(day.name, run, name, part, "found" if artifact else "make", fingerprint)


def _shipped(day: Day, made: Mapping[tuple[str, str], Artifact | None]) -> RunConfig:
    """Return the configuration of the refit run of a day, with its choices if the day is trained."""
    assert day.refit is not None
    behaviour, trained = (made[day.run, name] for name in TRAININGS)
    choices = choices_of(behaviour.facts, trained.facts) if behaviour and trained else None
    return day.refit.model_copy(update={"choices": choices})


def plan(arguments: argparse.Namespace, store: ArtifactStore) -> dict[str, Any]:
    """Log the plan; `days` are those with something to make, none at all on a dry run.

    Raises:
        ArtifactError: `--complete` was asked for, and something is missing.
    """
    steps = [step for day in days(arguments, store) for step in survey(day, store)]
    for step in steps:
        logger.info("plan %s", " ".join(f"{name}={value}" for name, value in asdict(step).items()))
    missing = [step for step in steps if step.state == "make"]
    logger.info("planned found=%d make=%d", len(steps) - len(missing), len(missing))
    if arguments.complete and missing:
        first = missing[0]
        raise ArtifactError(
            f"{len(missing)} of {len(steps)} steps are missing, first {first.stage} of {first.day}.",
            "Clear the failed tasks of this run of the DAG crane_backfill, or trigger it again with the same windows.",
        )
    return {
        "found": len(steps) - len(missing),
        "make": len(missing),
        "days": [] if arguments.dry_run else sorted({step.day for step in missing}),
    }


def rebuild(name: str, jobs: Mapping[str, Work | None], argv: Sequence[str] | None = None) -> int:
    """Entry point of a job that makes or finds some of the stages of one day, `--part DAY`.

    Args:
        name: the job.
        jobs: stage to what makes its artifact; None for `ml.refit` and `ml.register`.
        argv: flags, the process's own when None.
    """

    def work(arguments: argparse.Namespace, store: ArtifactStore) -> dict[str, Any]:
        chosen = [day for day in days(arguments, store) if day.name == arguments.part]
        if not chosen:
            raise ConfigError(
                f"--part {arguments.part!r} is none of the days.",
                f"Give --part YYYY-MM-DD, the first day of one of {', '.join(arguments.windows)}.",
            )
        (day,) = chosen
        store.claims.keep(day.run)
        _record(day, store)
        done = found = 0
        for run, stage in day.work():
            if stage not in jobs:
                continue
            config = day.config if run == day.run else recorded_run(store, run, day.config.runtime)
            for part in STAGES[stage].parts(config) if stage in STAGES else (WHOLE,):
                entry = _make(stage, part, jobs[stage], run, config, store)
                store.record(run, STAGES[stage].label(part) if part else stage, entry)
                done, found = done + (entry["status"] == "done"), found + (entry["status"] == "found")
        return {"part": arguments.part, "run": day.run, "done": done, "found": found}

    return run_command(name, work, argv, flags=add_flags)


def _record(day: Day, store: ArtifactStore) -> None:
    """Record the run of a day, and its refit run unless that is there with its choices."""
    store.start_run(day.run, day.config)
    if day.refit is None:
        return
    run = refit_run(day.run)
    recorded = store.recorded_config(run)
    if recorded is None or RunConfig.model_validate(recorded | {"choices": None}).identity() != day.refit.identity():
        store.restart_run(run, day.refit)


def _make(
    stage: str, part: str, work: Work | None, run: str, config: RunConfig, store: ArtifactStore
) -> dict[str, Any]:
    if stage == REFIT:
        return refit(argparse.Namespace(run=run), config, store) | {"status": "chosen"}
    if work is None:
        # Imports mlflow, which the other jobs of a backfill do without.
        from jobs.ml.register import register

        return register(argparse.Namespace(run=run), config, store)
    return produce(STAGES[stage], run, part, config, store, work)


def _with_inputs(stages: Sequence[str], config: RunConfig) -> tuple[str, ...]:
    """The stages and all they read, directly or not, in the order of the pipeline."""
    wanted = set(stages)
    for name in reversed(STAGES):
        if name in wanted:
            wanted |= set(STAGES[name].inputs(config))
    return tuple(name for name in STAGES if name in wanted)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that all jobs of a backfill get."""
    parser.add_argument("--windows", nargs="+", required=True, metavar="START/END", help="ISO 8601, oldest first")
    parser.add_argument("--stages", nargs="*", default=[], choices=list(STAGES), metavar="STAGE")
    parser.add_argument("--train", action="store_true", help="train, evaluate and register the last day")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, make nothing of it")
    parser.add_argument("--part", default="", metavar="DAY", help="which day to rebuild")


def run_plan(name: str, complete: bool, argv: Sequence[str] | None = None) -> int:
    """Entry point of the jobs that plan, and that check that nothing is left to make."""

    def flags(parser: argparse.ArgumentParser) -> None:
        add_flags(parser)
        parser.set_defaults(complete=complete)

    return run_command(name, plan, argv, flags=flags)
