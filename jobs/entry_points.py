"""The entry points of all jobs: flags, the run record, the last line on stdout and the exit code."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NoReturn

from crane_core.config import PREVIOUS, RunConfig, Runtime
from crane_core.config_file import load_config
from crane_core.errors import EXIT_OK, ArtifactError, ConfigError, error_of
from crane_core.refit import SUFFIX, is_refit, refit_run
from crane_core.storage.artifacts import ArtifactStore, check_run_id
from jobs.logs import shown, start_logging
from jobs.stores import open_store
from jobs.usage import Usage

logger = logging.getLogger(__name__)


class FlagParser(argparse.ArgumentParser):
    """A parser that raises what is wrong with the flags instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().removeprefix("usage: ").split())
        raise ConfigError(f"The command line is wrong: {message}.", f"Type {usage} (--help explains the flags).")


def run_job(
    name: str,
    work: Callable[[argparse.Namespace, RunConfig, ArtifactStore], dict[str, Any]],
    argv: Sequence[str] | None = None,
    flags: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Run a job of one run: parse the flags, log, record what `work` returns, turn errors into exit codes.

    Args:
        name: the stage.
        work: does it, and returns the entry of the run record.
        argv: flags, the process's own when None.
        flags: adds the job's own flags to those of every job.
    """

    def of_the_run(arguments: argparse.Namespace, store: ArtifactStore) -> dict[str, Any]:
        config = _start(arguments, store)
        if arguments.refit:
            if not config.etl.refit:
                return {"run": arguments.run, "status": "skipped", "reason": "etl.refit is false."}
            arguments.run = refit_run(arguments.run)
            config = recorded_run(store, arguments.run, config.runtime)
        usage = Usage()
        entry = work(arguments, config, store)
        entry = usage.entry() | entry
        label = f"{name}.{arguments.part}" if arguments.part else name
        store.record(arguments.run, label, entry)
        return {"part": arguments.part, "run": arguments.run, **entry}

    def all_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--run", required=True, help="run id: one window and one configuration")
        parser.add_argument("--part", default="", help="which part of a mapped stage")
        parser.add_argument("--refit", action="store_true", help="work for the refit run of the run")
        if flags:
            flags(parser)

    return run_command(name, of_the_run, argv, all_flags)


def _start(arguments: argparse.Namespace, store: ArtifactStore) -> RunConfig:
    """Record the run of the flags, or check that it is the one that was recorded; return its configuration."""
    check_run_id(arguments.run)
    store.claims.claim(arguments.run)
    recorded = store.recorded_config(arguments.run)
    config = load_config(arguments.config, arguments.set, recorded)
    if is_refit(arguments.run):
        _require(store, arguments.run)
    elif config.etl.refit:
        check_run_id(refit_run(arguments.run))
    if config.etl.base_run == PREVIOUS:
        before = recorded["etl"]["base_run"] if recorded else _run_before(config, store)
        config = config.model_copy(update={"etl": config.etl.going_on_from(before)})
    if config.etl.base_run:
        store.claims.claim(config.etl.base_run)
    store.start_run(arguments.run, config)
    return config


def recorded_run(store: ArtifactStore, run_id: str, runtime: Runtime) -> RunConfig:
    """Return the configuration of a recorded run, with another `runtime`.

    Raises:
        ArtifactError: there is no such run.
    """
    if is_refit(run_id):
        _require(store, run_id)
    return RunConfig.model_validate({**store.run(run_id)["config"], "runtime": runtime.model_dump()})


def _require(store: ArtifactStore, run_id: str) -> None:
    """Refuse a refit run that has not been started."""
    if store.recorded_config(run_id) is None:
        raise ArtifactError(
            f"There is no refit run {run_id!r} in {store.storage.uri}.",
            f"Run python -m jobs.ml.refit --store {store.storage.uri} --run {run_id.removesuffix(SUFFIX)} first.",
        )


def _run_before(config: RunConfig, store: ArtifactStore) -> str | None:
    """Return the run that `etl.base_run=previous` stands for.

    Raises:
        ConfigError: the run is one of a backfill, and the run found does not end where its window begins. Days that are
            built side by side would all go on from one run.
    """
    before = store.previous_run(config)
    while before is not None:
        store.claims.claim(before)
        # It may have been removed before it was claimed.
        if store.recorded_config(before) is not None:
            break
        before = store.previous_run(config)
    end = datetime.fromisoformat(store.run(before)["config"]["window"]["end"]) if before else None
    if config.runtime.backfill and end != config.window.start:
        found = (
            f"the last one before it, {before}, ends at {end:%Y-%m-%d %H:%M}" if before else "there is none before it"
        )
        raise ConfigError(
            f"etl.base_run=previous: no run with an item graph ends at {config.window.start:%Y-%m-%d %H:%M} UTC, where "
            f"the window of this backfill begins; {found}.",
            "Backfill the day before first, or begin a new numbering with --set etl.base_run=null.",
        )
    return before


def run_command(
    name: str,
    work: Callable[[argparse.Namespace, ArtifactStore], dict[str, Any]],
    argv: Sequence[str] | None = None,
    flags: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Run a job on a store; its last line on stdout is one JSON object.

    The object holds `stage` and what `work` returns. After an error it holds `stage`, `error`, `found` and `remedy`.

    Args:
        name: what runs, as the log and the last line tell it.
        work: does it, and returns JSON values.
        argv: flags, the process's own when None.
        flags: adds flags to `--store`, `--config` and `--set`.

    Returns:
        The exit code.
    """
    start_logging()
    try:
        parser = _parser(name)
        if flags:
            flags(parser)
        arguments = parser.parse_args(argv)
        store = open_store(arguments.store)
        try:
            result = work(arguments, store)
        finally:
            store.claims.release()
        print(json.dumps({"stage": name, **result}))
        return EXIT_OK
    except Exception as exception:
        return _fail(name, exception)


def load_runtime(arguments: argparse.Namespace) -> Runtime:
    """Return the `runtime` of a job's flags, for a job that is about no run in particular."""
    return load_general(arguments).runtime


def load_general(arguments: argparse.Namespace) -> RunConfig:
    """Return the configuration of a job's flags, for a job that is about no run; its window means nothing."""
    no_window = ["window.start=1970-01-01", "window.end=1970-01-02"]
    return load_config(arguments.config, [*no_window, *arguments.set])


def _fail(name: str, exception: Exception) -> int:
    """Log one ERROR line, print the JSON line, and return the exit code."""
    error = error_of(exception, f"Read the traceback in the log of jobs.{name}, on stderr.")
    traceback = None if error is exception else exception
    message = " ".join(str(error).split())
    logger.error("failed stage=%s error=%s message=%s", name, error.name, message, exc_info=traceback)
    print(json.dumps({"stage": name, **shown(error)}))
    return error.exit_code


def _parser(name: str) -> argparse.ArgumentParser:
    parser = FlagParser(prog=f"python -m jobs.{name}")
    parser.add_argument("--store", required=True, help="artifact store, a path or s3://bucket/prefix")
    parser.add_argument("--config", help="YAML file or name of a preset; for a known run, what it was started with")
    parser.add_argument("--set", action="append", default=[], metavar="section.field=value")
    return parser
