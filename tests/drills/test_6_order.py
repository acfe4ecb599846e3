"""The order of runs under a real scheduler: candidates, missed intervals, backfills. The jobs only wait and answer."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.drills.conftest import HEARING
from tests.worlds.services import Airflow, Postgres, until

INTERVAL_MINUTES = 3
JOBS = (
    *("plan", "tidy", "prune", "delivery", "etl.interactions", "etl.features", "etl.profiles"),
    *(f"ml.{stage}" for stage in ("behaviour", "refine", "knn", "graph", "train", "evaluate", "register")),
    *(f"ml.{stage}" for stage in ("judge", "promote", "export", "report", "restore")),
)
JOB = '''
"""A job that notes when it ran, waits as it is told, and answers as the real one would."""
import json, pathlib, sys, time

name, here, begun = "{name}", pathlib.Path(__file__).parents[{depth}], time.time()
run = sys.argv[sys.argv.index("--run") + 1]
waits = json.loads((here / "waits.json").read_text())
time.sleep(waits.get(run + "/" + name, waits.get(name, 0)))
answer = {{"plan": {{"ml.knn": ["0", "1"]}}, "ml.promote": {{"decision": "refused"}}}}.get(name, {{}})
if name == "delivery":
    answer = {{"complete": True, "missing": ""}}
if name == "ml.register":
    answer = {{"version": "1", "alias": None if "runtime.backfill=true" in sys.argv else "candidate"}}
if name == "ml.judge":
    answer = {{"version": "1", "reason": "because"}}
line = {{"job": name, "run": run, "argv": sys.argv[1:], "begun": begun, "ended": time.time()}}
with (here / "called.jsonl").open("a") as handle:
    handle.write(json.dumps(line) + "\\n")
print(json.dumps({{"stage": name, **answer}}))
'''
POLICY = '''
"""Intervals of a few minutes in place of days."""

from airflow.sdk import CronDataIntervalTimetable


def dag_policy(dag):
    if dag.dag_id == "crane_retrain":
        dag.timetable = CronDataIntervalTimetable("*/{minutes} * * * *", timezone="UTC")
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


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    root = Path(tempfile.mkdtemp(prefix="crane-order-"))
    root.chmod(0o755)
    folder = root / "project"
    for name in JOBS:
        path = folder / "jobs" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(JOB.format(name=name, depth=name.count(".") + 1))
    (folder / "waits.json").write_text("{}")
    postgres = Postgres(root / "postgres")
    postgres.start()
    stops = [postgres.stop]
    try:
        postgres.create("airflow")
        notifier = {
            "class": "hearing.Hearing",
            "on": ["missed", "undelivered"],
            "arguments": {"message": "{{ dag_run.run_id }} {{ missed }}", "path": str(folder / "heard.txt")},
        }
        settings = {
            "AIRFLOW_VAR_CRANE_PROJECT": str(folder),
            "AIRFLOW_VAR_CRANE_JOBS_PYTHON": sys.executable,
            "AIRFLOW_VAR_CRANE_STORE": str(root / "store"),
            "AIRFLOW_VAR_CRANE_NOTIFIERS": json.dumps([notifier]),
        }
        airflow = Airflow(root / "airflow", postgres.uri("airflow", "psycopg"), settings)
        (airflow.home / "config").mkdir()
        (airflow.home / "config" / "airflow_local_settings.py").write_text(POLICY.format(minutes=INTERVAL_MINUTES))
        (airflow.home / "config" / "hearing.py").write_text(HEARING)
        airflow.prepare()
        stops.append(airflow.stop)
        airflow.start()
        yield Stage(folder, airflow)
    finally:
        for stop in reversed(stops):
            stop()
        if request.session.testsfailed:
            print(f"kept for inspection: {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)


def approve(stage: Stage, run_id: str) -> None:
    """Give a person's word."""
    path = f"/dags/crane_promote/dagRuns/{run_id.replace('+', '%2B')}/taskInstances/approve/-1/hitlDetails"
    status, answer = stage.airflow.ask("PATCH", path, {"chosen_options": ["Approve"], "params_input": {}})
    assert status == 200, answer


def announce(stage: Stage, run: str) -> None:
    """Send the event that a retraining sends at its end."""
    assets = stage.airflow.get("/assets?limit=100")["assets"]
    (asset,) = (each["id"] for each in assets if each["name"] == "crane/candidate")
    extra = {"store": "s", "run": run, "run_type": "scheduled", "overrides": [], "version": run[1:]}
    status, answer = stage.airflow.ask("POST", "/assets/events", {"asset_id": asset, "extra": extra})
    assert status == 200, answer


def test_the_newest_candidate_is_judged_after_a_wait(stage: Stage) -> None:
    """Three candidates arrive while a person thinks about the first one."""
    airflow = stage.airflow
    airflow.unpause("crane_promote")
    status, answer = airflow.ask("POST", "/variables", {"key": "crane_approval", "value": "true"})
    assert status == 201, answer
    announce(stage, "r1")
    first = until("promotion of r1", lambda: airflow.runs("crane_promote"))[0]["dag_run_id"]
    airflow.wait_for_task("crane_promote", first, "approve", ["awaiting_input", "deferred"])
    for run in ("r2", "r3", "r4"):
        announce(stage, run)
        time.sleep(3)
    approve(stage, first)
    assert airflow.wait("crane_promote", first) == "success"
    second = until("the next run", lambda: airflow.runs("crane_promote")[1:], patience=120)[0]["dag_run_id"]
    airflow.wait_for_task("crane_promote", second, "approve", ["awaiting_input", "deferred"])
    approve(stage, second)
    assert airflow.wait("crane_promote", second) == "success"
    judged = [(call["run"], "--announced" in call["argv"]) for call in stage.calls("ml.promote")]
    assert judged == [("r1", True), ("r4", True)]
    assert [call["run"] for call in stage.calls("ml.judge")] == ["r1", "r4"]
    stage.pause("crane_promote")
    airflow.ask("DELETE", "/variables/crane_approval")


def test_a_run_over_two_intervals_names_what_it_missed(stage: Stage) -> None:
    airflow = stage.airflow
    stage.wait({"etl.features": 2.2 * 60 * INTERVAL_MINUTES})
    before = {run["dag_run_id"] for run in airflow.runs("crane_retrain")}
    airflow.unpause("crane_retrain")

    def scheduled() -> list[dict[str, Any]]:
        runs = airflow.runs("crane_retrain")
        return [run for run in runs if run["run_type"] == "scheduled" and run["dag_run_id"] not in before]

    long = until("a scheduled run", scheduled, every=3)[0]
    airflow.wait_for_task("crane_retrain", long["dag_run_id"], "features", ["running"])
    stage.wait({})
    assert airflow.wait("crane_retrain", long["dag_run_id"]) == "success"
    after = until(
        "the run after it", lambda: [run for run in scheduled() if run != long][1:] or scheduled()[1:], every=3
    )[0]
    assert airflow.wait("crane_retrain", after["dag_run_id"]) == "success"
    stage.pause("crane_retrain")
    end, start = (datetime.fromisoformat(text) for text in (long["data_interval_end"], after["data_interval_start"]))
    assert start - end >= timedelta(minutes=INTERVAL_MINUTES)
    missed = f"{end:%Y-%m-%d %H:%M} to {start:%Y-%m-%d %H:%M} UTC"
    assert f"{after['dag_run_id']} {missed}" in stage.heard()
    assert missed in airflow.log("crane_retrain", after["dag_run_id"], "resolve")


def test_a_backfill_beside_the_daily_run_comes_in_order_and_gives_way(stage: Stage) -> None:
    airflow = stage.airflow
    stage.wait({"etl.features": 10})
    days = [datetime(2026, 2, 1, tzinfo=UTC) + timedelta(minutes=INTERVAL_MINUTES * place) for place in range(5)]
    before = len(stage.calls())
    airflow.unpause("crane_retrain")
    airflow.cli(
        *("backfill", "create", "--dag-id", "crane_retrain"),
        *("--from-date", days[0].isoformat(), "--to-date", days[-1].isoformat()),
    )

    def ended() -> list[dict[str, Any]] | None:
        runs = [run for run in airflow.runs("crane_retrain") if run["run_type"] == "backfill"]
        return runs if len(runs) == 5 and all(run["state"] in ("success", "failed") for run in runs) else None

    runs = until("end of the backfill", ended, patience=2400, every=5)
    stage.pause("crane_retrain")
    assert {run["state"] for run in runs} == {"success"}
    calls = stage.calls()[before:]
    backfilled = [call for call in calls if "runtime.backfill=true" in call["argv"]]
    order = list(dict.fromkeys(call["run"] for call in backfilled))
    assert order == sorted(order) and len(order) == 5
    # One day after the other: the last job of a day ends before the first of the next begins.
    for one, two in pairwise(order):
        last = max(call["ended"] for call in backfilled if call["run"] == one)
        assert last <= min(call["begun"] for call in backfilled if call["run"] == two)
    daily = {call["run"] for call in calls if call["run"].startswith("scheduled")}
    whole = [run for run in daily if {"plan", "tidy"} <= {call["job"] for call in calls if call["run"] == run}]
    assert whole
    for run in whole:
        mine = [call for call in calls if call["run"] == run]
        begun, over = min(call["begun"] for call in mine), max(call["ended"] for call in mine)
        # One that was running, and the one that may start before the daily run is seen to be at work.
        between = [call for call in backfilled if begun < call["begun"] < over]
        assert len(between) <= 1, [(call["run"], call["job"]) for call in between]
