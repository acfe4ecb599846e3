"""The order of runs under a real scheduler: candidates, missed intervals, backfills. The jobs only wait and answer."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from tests.worlds.services import until
from tests.worlds.stand_ins import Stage, stand_ins

INTERVAL_MINUTES = 3
POLICY = '''
"""Intervals of a few minutes in place of days."""

from airflow.sdk import CronDataIntervalTimetable


def dag_policy(dag):
    if dag.dag_id == "crane_retrain":
        dag.timetable = CronDataIntervalTimetable("*/{minutes} * * * *", timezone="UTC")
'''


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with stand_ins(POLICY.format(minutes=INTERVAL_MINUTES)) as made:
        yield made


def test_the_newest_candidate_is_judged_after_a_wait(stage: Stage) -> None:
    """Three candidates arrive while a person thinks about the first one."""
    airflow = stage.airflow
    airflow.unpause("crane_promote")
    status, answer = airflow.ask("POST", "/variables", {"key": "crane_approval", "value": "true"})
    assert status == 201, answer

    def announce(run: str) -> None:
        extra = {"store": "s", "run": run, "run_type": "scheduled", "overrides": [], "version": run[1:]}
        stage.announce("crane/candidate", extra=extra)

    announce("r1")
    first = until("promotion of r1", lambda: airflow.runs("crane_promote"))[0]["dag_run_id"]
    airflow.wait_for_task("crane_promote", first, "approve", ["awaiting_input", "deferred"])
    for run in ("r2", "r3", "r4"):
        announce(run)
        time.sleep(3)
    stage.approve(first)
    assert airflow.wait("crane_promote", first) == "success"
    second = until("the next run", lambda: airflow.runs("crane_promote")[1:], patience=120)[0]["dag_run_id"]
    stage.approve(second)
    assert airflow.wait("crane_promote", second) == "success"
    judged = [(call["run"], "--announced" in call["argv"]) for call in stage.calls("ml.promote")]
    assert judged == [("r1", True), ("r4", True)]
    assert [call["run"] for call in stage.calls("ml.judge")] == ["r1", "r4"]
    stage.pause("crane_promote")
    airflow.ask("DELETE", "/variables/crane_approval")


def test_a_run_over_two_intervals_names_what_it_missed(stage: Stage) -> None:
    airflow = stage.airflow
    before = {run["dag_run_id"] for run in airflow.runs("crane_retrain")}
    airflow.unpause("crane_retrain")

    def scheduled() -> list[dict[str, Any]]:
        runs = airflow.runs("crane_retrain")
        return [run for run in runs if run["run_type"] == "scheduled" and run["dag_run_id"] not in before]

    long = until("a scheduled run", scheduled, every=3)[0]
    run = re.sub(r"[:+]", "-", long["dag_run_id"])
    # Several jobs come before this one, so it reads what is set here.
    stage.wait({f"{run}/etl.features": 2.2 * 60 * INTERVAL_MINUTES})
    assert airflow.wait("crane_retrain", long["dag_run_id"]) == "success"
    after = until("the run after it", lambda: scheduled()[1:], every=3)[0]
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
