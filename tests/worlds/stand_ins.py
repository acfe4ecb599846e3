"""An Airflow whose jobs are stand-ins: they note when they ran and wait as they are told. Only `deliveries` is real."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.commands.paths import PROJECT
from tests.worlds.services import Airflow, Postgres

JOBS = (
    *("plan", "tidy", "prune", "deliveries", "etl.interactions", "etl.features", "etl.profiles"),
    *(
        f"ml.{stage}"
        for stage in ("behaviour", "refine", "knn", "graph", "train", "evaluate", "live", "refit", "register")
    ),
    *(f"ml.{stage}" for stage in ("judge", "promote", "export", "report", "restore")),
)
JOB = '''
"""A job that notes when it ran, waits as it is told, and answers as the real one would."""
import json, os, pathlib, subprocess, sys, time

name, here, begun = "{name}", pathlib.Path(__file__).parents[{depth}], time.time()
run = sys.argv[sys.argv.index("--run") + 1]
waits = json.loads((here / "waits.json").read_text())
time.sleep(waits.get(run + "/" + name, waits.get(name, 0)))
answer = {{"plan": {{"ml.knn": ["0", "1"]}}, "ml.promote": {{"decision": "refused"}}}}.get(name, {{}})
if name == "ml.refit":
    # No refit run, so the DAG skips the group `ship`: the turns of runs are the same with fewer jobs.
    answer = {{"refit_run": None}}
if name == "deliveries":
    # The real job, in the real project.
    program = [sys.executable, "-m", "jobs.deliveries", *sys.argv[1:]]
    environment = os.environ | {{"PYTHONPATH": "{project}"}}
    ended = subprocess.run(program, cwd="{project}", env=environment, stdout=subprocess.PIPE)
    print(ended.stdout.decode(), end="")
    if ended.returncode:
        sys.exit(ended.returncode)
    answer = json.loads(ended.stdout.splitlines()[-1])
if name == "ml.register":
    answer = {{"version": "1", "alias": None if "runtime.backfill=true" in sys.argv else "candidate"}}
if name == "ml.judge":
    answer = {{"version": "1", "reason": "because"}}
line = {{"job": name, "run": run, "argv": sys.argv[1:], "begun": begun, "ended": time.time()}}
with (here / "called.jsonl").open("a") as handle:
    handle.write(json.dumps(line) + "\\n")
print(json.dumps({{"stage": name, **answer}}))
'''
HEARING = '''
"""A notifier of Airflow's kind that writes down what it is told."""

from airflow.sdk import BaseNotifier


class Hearing(BaseNotifier):
    template_fields = ("message",)

    def __init__(self, message, path):
        super().__init__()
        self.message, self.path = message, path

    def notify(self, context):
        with open(self.path, "a") as handle:
            handle.write(self.message + "\\n")
'''


@dataclass
class Stage:
    """An Airflow whose jobs are stand-ins.

    Attributes:
        folder: project of the jobs.
        airflow: the services.
    """

    folder: Path
    airflow: Airflow

    def wait(self, waits: dict[str, float]) -> None:
        """Set how many seconds a job takes, by `job` or `run/job`."""
        (self.folder / "waits.json").write_text(json.dumps(waits))

    def calls(self, job: str | None = None) -> list[dict[str, Any]]:
        """What has run, in the order of its end."""
        path = self.folder / "called.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if job in (None, line["job"])]

    def heard(self) -> list[str]:
        path = self.folder / "heard.txt"
        return path.read_text().splitlines() if path.exists() else []

    def pause(self, dag_id: str) -> None:
        assert self.airflow.ask("PATCH", f"/dags/{dag_id}", {"is_paused": True})[0] == 200

    def approve(self, run_id: str) -> None:
        """Give a person's word in a run of `crane_promote`."""
        self.airflow.wait_for_task("crane_promote", run_id, "approve", ["awaiting_input", "deferred"])
        # An answer within the second in which the question is asked is lost, and the task asks again.
        time.sleep(5)
        path = f"/dags/crane_promote/dagRuns/{run_id.replace('+', '%2B')}/taskInstances/approve/-1/hitlDetails"
        status, answer = self.airflow.ask("PATCH", path, {"chosen_options": ["Approve"], "params_input": {}})
        assert status == 200, answer

    def announce(self, asset: str, **event: Any) -> None:
        """Send an event of an asset."""
        assets = self.airflow.get("/assets?limit=100")["assets"]
        (number,) = (each["id"] for each in assets if each["name"] == asset)
        status, answer = self.airflow.ask("POST", "/assets/events", {"asset_id": number, **event})
        assert status == 200, answer


@contextlib.contextmanager
def stand_ins(policy: str = "", settings: Mapping[str, str] | None = None) -> Iterator[Stage]:
    """Start PostgreSQL and Airflow; keep their folder where the block fails.

    Args:
        policy: an `airflow_local_settings.py`.
        settings: variables of Airflow's environment.
    """
    root = Path(tempfile.mkdtemp(prefix="crane-order-"))
    root.chmod(0o755)
    folder = root / "project"
    for name in JOBS:
        path = folder / "jobs" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(JOB.format(name=name, depth=name.count(".") + 1, project=PROJECT))
    (folder / "waits.json").write_text("{}")
    postgres = Postgres(root / "postgres")
    postgres.start()
    stops = [postgres.stop]
    try:
        postgres.create("airflow")
        message = "{{ dag_run.run_id }} {{ missed }}{{ exception }}"
        notifier = {
            "class": "hearing.Hearing",
            "on": ["missed", "undelivered"],
            "arguments": {"message": message, "path": str(folder / "heard.txt")},
        }
        environment = {
            "AIRFLOW_VAR_CRANE_PROJECT": str(folder),
            "AIRFLOW_VAR_CRANE_JOBS_PYTHON": sys.executable,
            "AIRFLOW_VAR_CRANE_STORE": str(root / "store"),
            "AIRFLOW_VAR_CRANE_NOTIFIERS": json.dumps([notifier]),
            **(settings or {}),
        }
        airflow = Airflow(root / "airflow", postgres.uri("airflow", "psycopg"), environment)
        (airflow.home / "config").mkdir()
        (airflow.home / "config" / "airflow_local_settings.py").write_text(policy)
        (airflow.home / "config" / "hearing.py").write_text(HEARING)
        airflow.prepare()
        stops.append(airflow.stop)
        airflow.start()
        yield Stage(folder, airflow)
    finally:
        for stop in reversed(stops):
            stop()
    # Not reached where a test has failed: its folder is kept for inspection.
    shutil.rmtree(root, ignore_errors=True)
