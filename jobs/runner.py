"""What all jobs share: flags, logging, the run record, fingerprints, skipping, publishing and exit codes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crane_core.config import PREVIOUS, RunConfig, Runtime
from crane_core.config_file import load_config
from crane_core.errors import EXIT_OK, EXIT_UNEXPECTED, ConfigError, CraneError
from crane_core.stages import STAGES, Stage, fingerprint_of, input_labels
from crane_core.storage import open_storage
from crane_core.storage.artifacts import Artifact, ArtifactStore, check_run_id
from crane_core.storage.lock import locked
from jobs.usage import Usage

logger = logging.getLogger(__name__)


@dataclass
class Result:
    """What a stage reports about its output.

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


def run_job(
    name: str,
    work: Callable[[argparse.Namespace, RunConfig, ArtifactStore], dict[str, Any]],
    argv: Sequence[str] | None = None,
    flags: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Entry point of a job of one run: parse, log, record what `work` returns, turn errors into exit codes.

    Args:
        name: the stage.
        work: does it, and returns the entry of the run record.
        argv: flags, the process's own when None.
        flags: adds the job's own flags to those of every job.
    """

    def of_the_run(arguments: argparse.Namespace, store: ArtifactStore) -> dict[str, Any]:
        check_run_id(arguments.run)
        recorded = store.recorded_config(arguments.run)
        config = load_config(arguments.config, arguments.set, recorded)
        if config.etl.base_run == PREVIOUS:
            before = recorded["etl"]["base_run"] if recorded else store.previous_run(config)
            config = config.model_copy(update={"etl": config.etl.going_on_from(before)})
        store.start_run(arguments.run, config)
        usage = Usage()
        entry = work(arguments, config, store)
        entry = usage.entry() | entry
        label = f"{name}.{arguments.part}" if arguments.part else name
        store.record(arguments.run, label, entry)
        return {"part": arguments.part, "run": arguments.run, **entry}

    def all_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--run", required=True, help="run id: one window and one configuration")
        parser.add_argument("--part", default="", help="which part of a mapped stage")
        if flags:
            flags(parser)

    return run_command(name, of_the_run, argv, all_flags)


def run_command(
    name: str,
    work: Callable[[argparse.Namespace, ArtifactStore], dict[str, Any]],
    argv: Sequence[str] | None = None,
    flags: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Entry point of everything that works on a store: parse, log, print what `work` returns as the last line.

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
        print(json.dumps({"stage": name, **work(arguments, store)}))
        return EXIT_OK
    except CraneError as error:
        logger.error("failed stage=%s error=%s message=%s", name, type(error).__name__, error)
        return error.exit_code
    except Exception:
        logger.exception("failed stage=%s", name)
        return EXIT_UNEXPECTED


def open_store(uri: str) -> ArtifactStore:
    """The store at a URI, with its local scratch folder."""
    storage = open_storage(uri)
    return ArtifactStore(storage, scratch(storage.uri) / "cache")


def load_runtime(arguments: argparse.Namespace) -> Runtime:
    """Where a job works that is about no run in particular: the `runtime` of its flags."""
    no_window = ["window.start=1970-01-01", "window.end=1970-01-02"]
    return load_config(arguments.config, [*no_window, *arguments.set]).runtime


def scratch(store_uri: str) -> Path:
    """Local folder for work in progress: inside a local store, in the temporary folder for a remote one."""
    if "://" not in store_uri:
        return Path(store_uri) / ".scratch"
    return Path(tempfile.gettempdir()) / "crane" / store_uri.replace("://", "-").replace("/", "-")


class Redacting(logging.Formatter):
    """Log lines without secrets: passwords inside URIs, and the values of the environment's secret variables."""

    PASSWORD = re.compile(r"(?<=://)([^/\s:@]*):[^/\s@]+(?=@)")
    VARIABLE = re.compile(r"SECRET|PASSWORD|TOKEN|CREDENTIAL", re.IGNORECASE)
    SHORTEST = 6

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def redacted(text: str) -> str:
    """A text as it may be shown."""
    text = Redacting.PASSWORD.sub(r"\1:***", text)
    for name, value in os.environ.items():
        if Redacting.VARIABLE.search(name) and len(value) >= Redacting.SHORTEST:
            text = text.replace(value, "***")
    return text


def start_logging() -> None:
    """Log lines to stderr, secrets left out; stdout belongs to results."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Redacting("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("py4j", "matplotlib", "botocore", "alembic", "faiss", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{name}")
    parser.add_argument("--store", required=True, help="artifact store, a path or s3://bucket/prefix")
    parser.add_argument("--config", help="YAML file or name of a preset; for a known run, what it was started with")
    parser.add_argument("--set", action="append", default=[], metavar="section.field=value")
    return parser


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
    """What the run record says of a stage that has ended with this artifact."""
    return {
        "status": status,
        "fingerprint": artifact.fingerprint,
        "inputs": artifact.manifest["inputs"],
        "content": artifact.manifest["content"],
        "seconds": seconds,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
