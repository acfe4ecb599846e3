"""The turn of a backfill run, and the end of the last interval, against runs as Airflow would list them."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import AirflowRescheduleException
from airflow.sdk.execution_time import task_runner
from local_job import LocalJobOperator
from other_runs import last_interval_end, wait_for_turn

DAY = timedelta(days=1)
START = datetime(2026, 3, 1, tzinfo=UTC)


def run(run_type, day, state="running"):
    date = None if day is None else START + day * DAY
    return SimpleNamespace(
        dag_id="crane_retrain",
        run_id=f"{run_type}-{day}",
        run_type=run_type,
        logical_date=date,
        data_interval_end=date and date + DAY,
        state=state,
    )


class Listed:
    """The runs of a DAG behind the two questions that a task may ask."""

    def __init__(self, *runs, states=None):
        self.runs, self.states = runs, states or {}

    def send(self, request):
        found = [
            each
            for each in self.runs
            if each.logical_date and each.logical_date < request.logical_date and request.state in (None, each.state)
        ]
        return SimpleNamespace(dag_run=max(found, key=lambda each: each.logical_date, default=None))

    def get_dr_count(self, dag_id, states):
        return sum(each.state in states for each in self.runs)

    def get_task_states(self, dag_id, run_ids):
        return {each: self.states[each] for each in run_ids if each in self.states}


@pytest.fixture
def turn(monkeypatch):
    def ask(mine, *others, states=None):
        listed = Listed(mine, *others, states=states)
        monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", listed, raising=False)
        wait_for_turn({"dag_run": mine, "ti": listed})

    return ask


@pytest.mark.parametrize("run_type", ["scheduled", "manual", "asset_triggered"])
def test_other_runs_go_on_at_once(turn, run_type):
    turn(run(run_type, 5), run("backfill", 1), run("scheduled", 2))


def test_a_backfill_alone_goes_on(turn):
    turn(run("backfill", 1))
    # Later days wait for it, and what has ended is no matter.
    turn(run("backfill", 1), run("backfill", 2), run("backfill", 0, "success"), run("scheduled", 4, "failed"))


@pytest.mark.parametrize("other", [run("backfill", 0), run("scheduled", 9), run("manual", 9), run("manual", None)])
def test_a_backfill_waits_for_earlier_days_and_for_other_runs(turn, other):
    with pytest.raises(AirflowRescheduleException):
        turn(run("backfill", 1), other)


def test_a_run_that_waits_for_its_data_holds_no_backfill_up(turn):
    mine, daily = run("backfill", 1), run("scheduled", 9)
    for state in (None, "up_for_reschedule", "deferred", "running"):
        turn(mine, daily, states={daily.run_id: {"resolve": "success", "deliveries": state}})
    with pytest.raises(AirflowRescheduleException):
        turn(mine, daily, states={daily.run_id: {"deliveries": "success"}})


def test_every_job_of_a_backfill_asks(turn, play, monkeypatch):
    listed = Listed(run("backfill", 1), run("scheduled", 9))
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", listed, raising=False)
    with pytest.raises(AirflowRescheduleException):
        LocalJobOperator(task_id="t", job="etl.features", flags="[]").execute({"dag_run": listed.runs[0], "ti": listed})
    assert play.calls() == []


def test_the_last_interval_is_that_of_a_schedule(monkeypatch):
    runs = [run("scheduled", 1, "failed"), run("manual", 3), run("scheduled", 4)]
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", Listed(*runs), raising=False)
    assert last_interval_end(runs[-1]) == START + 2 * DAY
    assert last_interval_end(runs[0]) is None
