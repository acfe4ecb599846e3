"""The operator of the `local` profile: a job as a child process in the jobs environment, without a shell."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, Context, Variable
from airflow.sdk.exceptions import AirflowException, AirflowFailException

PROJECT = Path(__file__).resolve().parent.parent
FINAL_EXIT_CODES = {2: "configuration", 3: "data", 4: "artifact"}
TERMINATION_SECONDS = 15.0
PASSWORD = re.compile(r"(?<=://)([^/\s:@]*):[^/\s@]+(?=@)")
"""Of a URI; a job masks its own log lines, this is for its arguments."""


def setting(name: str, default: str) -> str:
    """An Airflow Variable `crane_<name>` (also the environment's `AIRFLOW_VAR_CRANE_<NAME>`), read at run time."""
    return Variable.get(f"crane_{name}", default=None) or default


def deployment_overrides() -> list[str]:
    """What this deployment says of every run: the Variable `crane_registry`, a URI, is `runtime.registry`."""
    registry = setting("registry", "")
    return [f"runtime.registry={registry}"] if registry else []


def jobs_python(project: Path) -> Path:
    """The interpreter of the jobs environment that `make setup` makes."""
    return project / ".venv" / "bin" / "python"


class LocalJobOperator(BaseOperator):
    """Run `python -m jobs.<job> <flags>` and return the plain values of the JSON object on its last stdout line.

    The interpreter is the Variable `crane_jobs_python`, the working directory `crane_project`; by default those of
    the checkout that holds this file. The job does not inherit Airflow's own settings and secrets.

    Args:
        job: `<group>.<stage>`.
        flags: JSON list of the flags, a template.
        part: which part of a mapped stage, "" for a whole stage.
        returns: return this one value of the job's JSON object instead, whatever it is.

    Raises:
        AirflowFailException: exit code 2, 3 or 4: trying again cannot help.
        AirflowException: any other exit code, or a signal.
    """

    template_fields = ("flags", "part")
    ui_color = "#e8f1fa"

    def __init__(self, *, job: str, flags: str, part: str = "", returns: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.job = job
        self.flags = flags
        self.part = part
        self.returns = returns
        self.process: subprocess.Popen[str] | None = None
        self.result: dict[str, Any] = {}

    def execute(self, context: Context) -> Any:
        project = Path(setting("project", str(PROJECT)))
        python = setting("jobs_python", str(jobs_python(project)))
        argv = [python, *command(self.job, self.flags, self.part)]
        self.log.info("run argv=%s", PASSWORD.sub(r"\1:***", json.dumps(argv)))
        with tempfile.TemporaryFile("w+") as output:
            code, last_error = self._stream(argv, project, output)
            output.seek(0)
            lines = output.read().splitlines()
        if code != 0:
            for line in lines[-1:]:
                # The job's error as data, for a reader of the task's log.
                self.log.info("%s", line)
            raise failure(self.job, code, last_error)
        if not lines:
            raise AirflowException(f"jobs.{self.job} ended with exit code 0 but printed no result.")
        self.result = json.loads(lines[-1])
        return returned(self.result, self.returns)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """The artifacts that the job has read and made or found; asked for only where OpenLineage is configured."""
        from airflow.providers.openlineage.extractors import OperatorLineage
        from openlineage.client.event_v2 import Dataset

        flags = json.loads(self.flags)
        store = flags[flags.index("--store") + 1]
        namespace = store if "://" in store else f"file://{store}"
        artifacts = lineage(self.result)
        inputs, outputs = ([Dataset(namespace, name) for name in names] for names in artifacts)
        return OperatorLineage(inputs=inputs, outputs=outputs)

    def on_kill(self) -> None:
        """End the whole process group of the job: SIGTERM, then SIGKILL for whatever is left."""
        process = self.process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + TERMINATION_SECONDS
            while time.monotonic() < deadline:
                # A reaped leader leaves the group alive as long as it has members.
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TERMINATION_SECONDS)

    def _stream(self, argv: list[str], project: Path, output: Any) -> tuple[int, str]:
        """Run the command, log its stderr line by line; its exit code and its last error line (or last line)."""
        last_line = last_error = ""
        self.process = subprocess.Popen(
            argv,
            cwd=project,
            env=job_environment(Path(argv[0]).parent),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            start_new_session=True,
        )
        try:
            assert self.process.stderr is not None
            for line in self.process.stderr:
                last_line = line.rstrip() or last_line
                if is_error(line):
                    last_error = line.rstrip()
                self.log.info("%s", line.rstrip())
            return self.process.wait(), last_error or last_line
        except BaseException:
            self.on_kill()
            raise


def lineage(result: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the artifacts, `<stage>/<fingerprint>`, that a job has read and made or found, from its JSON object."""
    if not result.get("fingerprint"):
        return [], []
    # The parts of a mapped stage share its folder.
    inputs = {
        f"{'.'.join(name.split('.')[:2])}/{fingerprint}" for name, fingerprint in result.get("inputs", {}).items()
    }
    return sorted(inputs), [f"{result['stage']}/{result['fingerprint']}"]


def command(job: str, flags: str, part: str = "") -> list[str]:
    """The arguments of the interpreter for a job: module, flags (a JSON list), and the part of a mapped stage."""
    return ["-m", f"jobs.{job}", *json.loads(flags), *(["--part", part] if part else [])]


def is_error(line: str) -> bool:
    """Whether a log line is the one in which a job says why it failed."""
    return " ERROR " in line and "failed stage=" in line


def failure(job: str, code: int, reason: str) -> AirflowException:
    """The exception for a job's exit code: final where trying again cannot help; -n is signal n."""
    if code in FINAL_EXIT_CODES:
        return AirflowFailException(f"jobs.{job} ended with a {FINAL_EXIT_CODES[code]} error: {reason}")
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return AirflowException(f"jobs.{job} {ended}: {reason}")


def returned(result: dict[str, Any], name: str | None) -> Any:
    """What a task returns of its job's result: one value by name, or the plain values.

    Tables of figures belong in the store, not in Airflow's database.
    """
    if name:
        return result[name]
    return {key: value for key, value in result.items() if not isinstance(value, (dict, list))}


def job_environment(bin_folder: Path) -> dict[str, str]:
    """This process's environment without Airflow's settings and secrets, the jobs' own programs first in PATH."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AIRFLOW_", "_AIRFLOW_")) and name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    return environment | {"PATH": os.pathsep.join((str(bin_folder), environment.get("PATH", os.defpath)))}
