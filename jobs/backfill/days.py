"""The days of a backfill: what is there, what is missing, and how the missing is made.

Each day is a run of its own, `backfill-{end of its window}-{configuration}`; artifacts of other runs with the same
inputs and configuration are found. What a wanted stage reads is wanted too.
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
from crane_core.stages import STAGES, fingerprint_of, input_labels
from crane_core.storage.artifacts import ArtifactStore
from jobs.commands.demo import run_id
from jobs.entry_points import run_command
from jobs.runner import Job, Result, produce

logger = logging.getLogger(__name__)

Work = Callable[[Job], Result]
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
    """

    name: str
    run: str
    config: RunConfig
    stages: tuple[str, ...]


def days(arguments: argparse.Namespace) -> list[Day]:
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
        ends = [REGISTER] if arguments.train and window == arguments.windows[-1] else []
        wanted = _with_inputs([*arguments.stages, *ends], config)
        found.append(Day(f"{config.window.start:%Y-%m-%d}", run_id("backfill", config), config, wanted))
    return found


def survey(day: Day, store: ArtifactStore) -> Iterator[Step]:
    """Every step of a day; reads the store and changes nothing."""
    contents: dict[str, str | None] = {}
    for name in day.stages:
        stage = STAGES[name]
        for part in stage.parts(day.config):
            label = stage.label(part)
            if name == REGISTER:
                state = "found" if store.entry(day.run, name) else "make"
                yield Step(day.name, day.run, name, part, state, None)
                continue
            labels = input_labels(stage, day.config)
            known = {each: content for each in labels if (content := contents[each]) is not None}
            artifact = fingerprint = None
            if len(known) == len(labels):
                fingerprint = fingerprint_of(stage, part, day.config, known, stage.source(day.config, store))
                artifact = store.find(name, fingerprint)
            contents[label] = artifact.manifest["content"] if artifact else None
            yield Step(day.name, day.run, name, part, "found" if artifact else "make", fingerprint)


def plan(arguments: argparse.Namespace, store: ArtifactStore) -> dict[str, Any]:
    """Log the plan; `days` are those with something to make, none at all on a dry run.

    Raises:
        ArtifactError: `--complete` was asked for, and something is missing.
    """
    steps = [step for day in days(arguments) for step in survey(day, store)]
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
        jobs: stage to what makes its artifact; None for `ml.register`.
        argv: flags, the process's own when None.
    """

    def work(arguments: argparse.Namespace, store: ArtifactStore) -> dict[str, Any]:
        chosen = [day for day in days(arguments) if day.name == arguments.part]
        if not chosen:
            raise ConfigError(
                f"--part {arguments.part!r} is none of the days.",
                f"Give --part YYYY-MM-DD, the first day of one of {', '.join(arguments.windows)}.",
            )
        (day,) = chosen
        store.claims.keep(day.run)
        store.start_run(day.run, day.config)
        done = found = 0
        for stage in day.stages:
            if stage not in jobs:
                continue
            for part in STAGES[stage].parts(day.config):
                entry = _make(stage, part, jobs[stage], day, store)
                store.record(day.run, STAGES[stage].label(part), entry)
                done, found = done + (entry["status"] == "done"), found + (entry["status"] == "found")
        return {"part": arguments.part, "run": day.run, "done": done, "found": found}

    return run_command(name, work, argv, flags=add_flags)


def _make(stage: str, part: str, work: Work | None, day: Day, store: ArtifactStore) -> dict[str, Any]:
    if work is None:
        # Imports mlflow, which the other jobs of a backfill do without.
        from jobs.ml.register import register

        return register(argparse.Namespace(run=day.run), day.config, store)
    return produce(STAGES[stage], day.run, part, day.config, store, work)


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
