"""A private Airflow on this machine: SQLite, one folder, nothing reachable from elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from crane_core.errors import ConfigError, CraneError
from jobs.commands.paths import AIRFLOW_ENVIRONMENT, DAGS, POOLS, PROJECT
from jobs.commands.steps import Steps, ended, failure_in

STARTED = re.compile(r"^\[DAG TEST\] starting task_id=(?P<task>\S+) map_index=(?P<index>-?\d+)")
OPERATOR_LOGGER = "LocalJobOperator"
STOP_SECONDS = 30


class LocalAirflow:
    """Airflow with its own home, started task by task in the foreground.

    Args:
        home: folder for its database and settings.
        log: file that gets everything it says.
        steps: where progress is shown.
        environment: the virtual environment with Airflow.
    """

    def __init__(self, home: Path, log: Path, steps: Steps, environment: Path = AIRFLOW_ENVIRONMENT) -> None:
        self.home = home
        self.log = log
        self.steps = steps
        self.program = environment / "bin" / "airflow"
        if not self.program.exists():
            raise ConfigError(f"There is no Airflow at {self.program}.", f"Run make setup in {PROJECT}.")

    def environment(self) -> dict[str, str]:
        """Return the variables of an Airflow process: this process's own without any other Airflow's settings."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "_AIRFLOW"))}
        return inherited | {
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__PARALLELISM": "2",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{self.home / 'airflow.db'}",
            "AIRFLOW__LOGGING__JSON_LOGS": "True",
            "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(self.home / "logs"),
            "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW_VAR_CRANE_PROJECT": str(PROJECT),
            "AIRFLOW_VAR_CRANE_JOBS_PYTHON": sys.executable,
        }

    def prepare(self) -> None:
        """Make the database and the pools, once."""
        identity = POOLS.read_text() + self.program.read_text()
        stamp = self.home / "prepared"
        if stamp.exists() and stamp.read_text() == identity:
            return
        self.home.mkdir(parents=True, exist_ok=True)
        self.steps.show("airflow", f"database and pools in {self.home}")
        for arguments in (("db", "migrate"), ("pools", "import", str(POOLS))):
            with self.log.open("a") as log:
                code = subprocess.call(
                    [str(self.program), *arguments],
                    env=self.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            if code != 0:
                raise CraneError(
                    f"airflow {' '.join(arguments)} ended with exit code {code}.",
                    f"Read the end of {self.log}, then run the same command again.",
                )
        stamp.write_text(identity)

    def run_dag(self, dag_id: str, conf: Mapping[str, Any], logical_date: datetime | None = None) -> None:
        """Run one DAG to its end and show its tasks and their jobs' lines.

        Raises:
            CraneError: a task failed; the message is the job's own.
        """
        argv = [str(self.program), "dags", "test", dag_id, *([logical_date.isoformat()] if logical_date else [])]
        self.steps.show("airflow", f"dag={dag_id} conf={json.dumps(conf)}")
        process = subprocess.Popen(
            [*argv, "--conf", json.dumps(conf)],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
        )
        assert process.stdout is not None
        tasks = _Tasks(self.steps)
        try:
            with self.log.open("a") as log:
                _follow(process.stdout, log, tasks)
            code = process.wait()
        except BaseException:
            # An interrupt lets the running task end its job; a termination signal would leave the job behind.
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            process.kill()
            raise
        if code != 0:
            silent = CraneError(
                tasks.failure or "Airflow stopped.", f"Read the end of {self.log}, then run the same command again."
            )
            what = f"Task {tasks.failed or tasks.task or dag_id} of {dag_id} failed"
            error = ended(what, tasks.error or silent, self.log)
            raise CraneError(error.found, error.remedy)


class _Tasks:
    """Airflow's log records as steps."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.task = ""
        self.failed = ""
        self.error: CraneError | None = None
        self.failure = ""
        self._since = 0.0

    def record(self, record: Mapping[str, Any]) -> None:
        event = str(record.get("event", ""))
        if started := STARTED.match(event):
            index = int(started["index"])
            self.task = started["task"] + (f"[{index}]" if index >= 0 else "")
            self._since = self.steps.seconds
            self.steps.show(self.task, "start")
        elif str(record.get("logger", "")).endswith(OPERATOR_LOGGER):
            self.error = failure_in(event) or self.error
            self.steps.job_line(self.task, event)
        elif event == "Task instance state updated" or event.startswith("Task instance is in retry"):
            self._ended(str(record.get("new_state", "")))
        elif record.get("exception"):
            self.failure = str(record["exception"][0].get("exc_value", event))

    def _ended(self, state: str) -> None:
        if state in ("", "running", "queued", "scheduled"):
            return
        self.steps.show(self.task, f"{state} seconds={self.steps.seconds - self._since:.1f}")
        if state in ("failed", "up_for_retry"):
            self.failed = self.task


def _follow(lines: IO[str], log: IO[str], tasks: _Tasks) -> None:
    for line in lines:
        log.write(line)
        log.flush()
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                tasks.record(record)
