"""The operator of the `local` profile: it runs a job as a child process in the jobs environment, without a shell."""

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
from airflow.sdk.exceptions import AirflowException
from job_output import failure, returned
from other_runs import wait_for_turn

PROJECT = Path(__file__).resolve().parent.parent
TERMINATION_SECONDS = 15.0
PASSWORD = re.compile(r"(?<=://)([^/\s:@]*):[^/\s@]+(?=@)")
"""Password of a URI. A job masks those in its log lines; this masks those in its arguments."""


def setting(name: str, default: str) -> str:
    """Read the Airflow Variable `crane_<name>`. The environment may set it as `AIRFLOW_VAR_CRANE_<NAME>`."""
    return Variable.get(f"crane_{name}", default=None) or default


def deployment_overrides() -> list[str]:
    """Return the overrides that hold for every run of this deployment: `runtime.registry` from `crane_registry`."""
    registry = setting("registry", "")
    return [f"runtime.registry={registry}"] if registry else []


def jobs_python(project: Path) -> Path:
    """Return the interpreter of the jobs environment that `make setup` makes."""
    return project / ".venv" / "bin" / "python"


class LocalJobOperator(BaseOperator):
    """Run `python -m jobs.<job> <flags>` and return the plain values of the JSON object on its last stdout line.

    The Variable `crane_jobs_python` names the interpreter and `crane_project` the working directory. By default both
    are those of the checkout that holds this file. The job does not inherit Airflow's own settings and secrets.

    Args:
        job: `<group>.<stage>`.
        flags: JSON list of the flags, a template.
        part: part of a mapped stage, None for a whole stage.
        returns: name of the one value of the JSON object to return instead, of any type.

    Raises:
        FinalJobError: exit code 2, 3 or 4, with which Airflow does not try again.
        AirflowException: any other exit code, or a signal.
    """

    template_fields = ("flags", "part")
    ui_color = "#e8f1fa"

    def __init__(
        self, *, job: str, flags: str, part: str | None = None, returns: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.job = job
        self.flags = flags
        self.part = part
        self.returns = returns
        self.process: subprocess.Popen[str] | None = None
        self.result: dict[str, Any] = {}

    def execute(self, context: Context) -> Any:
        wait_for_turn(context)
        project = Path(setting("project", str(PROJECT)))
        python = setting("jobs_python", str(jobs_python(project)))
        argv = [python, *command(self.job, self.flags, self.part)]
        self.log.info("run argv=%s", PASSWORD.sub(r"\1:***", json.dumps(argv)))
        with tempfile.TemporaryFile("w+") as output:
            code, last_line = self._stream(argv, project, output)
            output.seek(0)
            lines = output.read().splitlines()
        if code != 0:
            for line in lines[-1:]:
                # The job's error as data, for readers of the task's log.
                self.log.info("%s", line)
            raise failure(self.job, code, [*lines, last_line])
        if not lines:
            raise AirflowException(f"jobs.{self.job} ended with exit code 0 but printed no result.")
        self.result = json.loads(lines[-1])
        return returned(self.result, self.returns)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        return lineage_event(self.flags, self.result)

    def on_kill(self) -> None:
        """End the process group of the job with SIGTERM, and with SIGKILL what is left after `TERMINATION_SECONDS`."""
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
        """Run the command and log its stderr line by line. Return its exit code and its last line on stderr."""
        last_line = ""
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
                self.log.info("%s", line.rstrip())
            return self.process.wait(), last_line
        except BaseException:
            self.on_kill()
            raise


def lineage_event(flags: str, result: dict[str, Any]) -> Any:
    """Return the artifacts that a job has read, and made or found, for OpenLineage, which alone calls this.

    Args:
        flags: of the job, a JSON list.
        result: what it printed last.
    """
    from airflow.providers.openlineage.extractors import OperatorLineage
    from openlineage.client.event_v2 import Dataset

    given = json.loads(flags)
    store = given[given.index("--store") + 1]
    namespace = store if "://" in store else f"file://{store}"
    inputs, outputs = ([Dataset(namespace, name) for name in names] for names in lineage(result))
    return OperatorLineage(inputs=inputs, outputs=outputs)


def lineage(result: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the names `<stage>/<fingerprint>` of the artifacts that a job has read, and has made or found."""
    if not result.get("fingerprint"):
        return [], []
    # The parts of a mapped stage share its folder.
    inputs = {
        f"{'.'.join(name.split('.')[:2])}/{fingerprint}" for name, fingerprint in result.get("inputs", {}).items()
    }
    return sorted(inputs), [f"{result['stage']}/{result['fingerprint']}"]


def command(job: str, flags: str, part: str | None = None) -> list[str]:
    """Return the arguments of the interpreter for a job: module, flags (a JSON list), and part of a mapped stage."""
    return ["-m", f"jobs.{job}", *json.loads(flags), *(["--part", part] if part else [])]


def job_environment(bin_folder: Path) -> dict[str, str]:
    """Return the environment without Airflow's settings and secrets, and with the jobs' programs first in PATH."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AIRFLOW_", "_AIRFLOW_")) and name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    return environment | {"PATH": os.pathsep.join((str(bin_folder), environment.get("PATH", os.defpath)))}
