"""The DAGs through Airflow itself, with jobs that only note how they were called."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DAGS, Play

RETRAIN = {
    "store": "/data/a store",
    "run": "r1",
    "config": "demo",
    "overrides": ["train.seed=1", "runtime.device=cpu"],
}


HEARING = """
from pathlib import Path
from airflow.sdk import BaseNotifier

class Hearing(BaseNotifier):
    template_fields = ("message",)

    def __init__(self, message):
        super().__init__()
        self.message = message

    def notify(self, context):
        with Path(__file__).with_name("heard.txt").open("a") as handle:
            handle.write(self.message + "\\n")
"""


class DagRuns:
    """The process of `run_dags.py`, shared by the tests of this file."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("run_dags.py")), str(DAGS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, play, *runs, path=()):
        """Run DAGs one after the other with the jobs of `play`; their states and all asset events."""
        request = {"runs": runs, "environment": play.environment(), "path": [str(folder) for folder in path]}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        log = []
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
            log.append(line)
        raise AssertionError("".join(log[-100:]))

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def run():
    runs = DagRuns()
    yield runs
    runs.close()


@pytest.mark.airflow
@pytest.mark.slow
def test_retrain_announces_and_promote_judges(run, tmp_path):
    play = Play(tmp_path)
    (tmp_path / "hearing.py").write_text(HEARING)
    play.settings = {
        "AIRFLOW_VAR_CRANE_NOTIFIERS": json.dumps(
            [
                {
                    "class": "hearing.Hearing",
                    "on": ["decision"],
                    "arguments": {"message": "{{ dag.dag_id }} {{ dag_run.run_id }} decided"},
                }
            ]
        ),
    }
    window = ["window.start=1998-04-22T00:00:00+00:00", "window.end=1998-04-23T00:00:00+00:00"]
    retrain, promote = "1998-04-23T00:00:00+00:00", "1998-04-24T00:00:00+00:00"
    answer = run(
        play,
        ["crane_retrain", retrain, RETRAIN],
        ["crane_promote", promote, {"store": "/data/a store", "run": "r1", "overrides": ["runtime.device=cpu"]}],
        path=[tmp_path],
    )

    assert answer[retrain]["state"] == "success"
    assert answer[retrain]["tasks"]["knn"] == ["success"] * 3
    assert answer[retrain]["tasks"]["train"] == answer[retrain]["tasks"]["ship.train"] == ["success"]
    assert answer["events"] == [
        {
            "asset": "crane/candidate",
            "extra": {
                "store": "/data/a store",
                "run": "r1",
                "run_type": "manual",
                "overrides": ["runtime.device=cpu"],
                "version": "7",
            },
        }
    ]
    assert answer[promote] == {
        "state": "success",
        "tasks": {
            **{task: ["success"] for task in ("resolve", "ask", "promote", "export", "report")},
            **{task: ["skipped"] for task in ("judge", "approve", "restore")},
        },
    }

    (heard,) = (tmp_path / "heard.txt").read_text().splitlines()
    assert heard.startswith("crane_promote manual__") and heard.endswith(" decided")

    calls = play.calls()
    identity = ["--store", "/data/a store", "--run", "r1"]
    settings = [
        word
        for setting in ["runtime.delivery=none", "train.seed=1", "runtime.device=cpu", *window]
        for word in ("--set", setting)
    ]
    expected = [*identity, "--config", "demo", *settings]
    judged = [*identity, "--set", "runtime.device=cpu"]
    order = [call["job"] for call in calls]
    assert order.index("etl.interactions") < order.index("ml.behaviour") < order.index("ml.train")
    model = [
        *("etl.interactions", "etl.features", "etl.profiles", "ml.refine", "ml.knn", "ml.knn", "ml.knn", "ml.graph"),
        "ml.train",
    ]
    assert order.index("ml.evaluate") < order.index("ml.live") < order.index("ml.register")
    assert [name for name in order if name not in ("ml.behaviour", "ml.live")] == [
        *("plan", "deliveries", *model, "ml.evaluate", "ml.refit", *model),
        *("ml.register", "tidy", "prune", "ml.promote", "ml.export", "ml.report"),
    ]
    refitted = range(order.index("ml.refit") + 1, order.index("ml.register"))
    for place, call in enumerate(calls):
        argv = call["argv"]
        if call["job"] == "ml.knn":
            argv = argv[:-2]
        wanted = judged if call["job"] in ("ml.promote", "ml.export", "ml.report") else expected
        is_refit = place in refitted and call["job"] != "ml.live"
        assert argv == [*wanted, *(["--refit"] if is_refit else [])], call["job"]
    parts = [call["argv"][-2:] for call in calls if call["job"] == "ml.knn"]
    assert sorted(parts) == [["--part", part] for part in ("0", "0", "1", "1", "2", "2")]


@pytest.mark.airflow
@pytest.mark.slow
def test_a_data_error_stops_the_run_and_no_alias_means_no_event(run, tmp_path):
    play = Play(tmp_path)
    play.act({"etl.features": {"code": 3}})
    failed, silent = "1998-05-01T00:00:00+00:00", "1998-05-02T00:00:00+00:00"
    before = len(run(play)["events"])
    answer = run(play, ["crane_retrain", failed, RETRAIN])
    assert answer[failed]["state"] == "failed"
    assert answer[failed]["tasks"]["features"] == ["failed"]
    assert answer[failed]["tasks"]["profiles"] == ["upstream_failed"]
    assert [call["job"] for call in play.calls()].count("etl.features") == 1
    assert answer[failed]["tasks"]["tidy"] == answer[failed]["tasks"]["prune"] == ["success"]
    assert [call["job"] for call in play.calls()][-2:] == ["tidy", "prune"]

    # Registered elsewhere than in the store: whoever judges must be told where.
    told = "1998-05-03T00:00:00+00:00"
    play.act({"ml.register": {"answer": {"alias": "candidate", "version": "9", "registry": "http://mlflow"}}})
    answer = run(play, ["crane_retrain", told, RETRAIN])
    assert answer["events"][-1]["extra"]["overrides"] == ["runtime.device=cpu", "runtime.registry=http://mlflow"]
    before += 1

    play.act({"ml.register": {"answer": {"alias": None, "version": "8"}}, "tidy": {"code": 4}})
    answer = run(play, ["crane_retrain", silent, RETRAIN])
    assert answer[silent]["tasks"]["tidy"] == ["failed"]
    assert answer[silent]["state"] == "success"
    assert len(answer["events"]) == before


@pytest.mark.airflow
@pytest.mark.slow
def test_without_a_refit_the_evaluated_model_is_registered(run, tmp_path):
    play = Play(tmp_path)
    play.act({"ml.refit": {"answer": {"refit_run": None}}})
    plain, failed = "1998-05-04T00:00:00+00:00", "1998-05-05T00:00:00+00:00"
    answer = run(play, ["crane_retrain", plain, RETRAIN])
    tasks = answer[plain]["tasks"]
    assert answer[plain]["state"] == "success" and tasks["register"] == ["success"]
    ship = {task: states for task, states in tasks.items() if task.startswith("ship.")}
    assert ship.pop("ship.refit") == ship.pop("ship.wanted") == ["success"]
    assert {state for states in ship.values() for state in states} == {"skipped"}
    # A failure in the group is no reason to serve the evaluated model.
    play.act({"ml.refit": {"code": 3}})
    answer = run(play, ["crane_retrain", failed, RETRAIN])
    assert answer[failed]["state"] == "failed" and answer[failed]["tasks"]["register"] == ["upstream_failed"]


@pytest.mark.airflow
@pytest.mark.slow
def test_a_failed_export_takes_the_promotion_back(run, tmp_path):
    play = Play(tmp_path)
    play.act({"ml.export": {"code": 4}})
    date = "1998-06-01T00:00:00+00:00"
    answer = run(play, ["crane_promote", date, {"store": "/data/a store", "run": "r1"}])
    assert answer[date]["state"] == "failed"
    assert answer[date]["tasks"]["restore"] == ["success"]
    assert answer[date]["tasks"]["report"] == ["upstream_failed"]
    calls = {call["job"]: call["argv"] for call in play.calls()}
    assert calls["ml.restore"] == calls["ml.promote"] == ["--store", "/data/a store", "--run", "r1"]


@pytest.mark.airflow
@pytest.mark.slow
def test_a_backfill_maps_over_the_days_of_its_plan(run, tmp_path):
    play = Play(tmp_path)
    days = {"from": "2026-03-01", "to": "2026-03-03", "store": "/data/a store", "stages": ["ml.refine"]}
    plain, trained = "1998-07-01T00:00:00+00:00", "1998-07-02T00:00:00+00:00"
    answer = run(
        play,
        ["crane_backfill", plain, days | {"dry_run": False}],
        ["crane_backfill", trained, days | {"dry_run": False, "train": True}],
    )
    assert answer[plain]["state"] == answer[trained]["state"] == "success"
    assert answer[plain]["tasks"] == {
        **{task: ["success"] for task in ("resolve", "plan", "last_day", "check")},
        **{task: ["success"] * 2 for task in ("etl", "content")},
        "train": ["skipped"],
    }
    assert answer[trained]["tasks"]["train"] == ["success"]
    calls = play.calls()
    flags = calls[0]["argv"]
    assert flags[:4] == ["--store", "/data/a store", "--set", "runtime.backfill=true"]
    assert [word for word in flags if "/2026" in word] == [
        f"2026-03-0{day}T00:00:00+00:00/2026-03-0{day + 1}T00:00:00+00:00" for day in (1, 2, 3)
    ]
    # The days of one plan come in any order.
    assert sorted([call["argv"][len(flags) :] for call in calls if call["job"] == "backfill.etl"][:2]) == [
        ["--part", "2026-03-01"],
        ["--part", "2026-03-02"],
    ]
    assert [call["argv"][-2:] for call in calls if call["job"] == "backfill.train"] == [["--part", "2026-03-02"]]

    # The plan of a dry run names no day to work on.
    play.act({"backfill.plan": {"answer": {"days": []}}})
    dry = "1998-07-03T00:00:00+00:00"
    answer = run(play, ["crane_backfill", dry, days])
    assert answer[dry]["state"] == "success"
    skipped = {task for task, states in answer[dry]["tasks"].items() if states == ["skipped"]}
    assert skipped == {"etl", "content", "train", "check"}
    assert play.calls()[-1]["argv"][-1] == "--dry-run"


@pytest.mark.airflow
@pytest.mark.slow
def test_a_rollback_exports_the_champion(run, tmp_path):
    play = Play(tmp_path)
    date = "1998-08-01T00:00:00+00:00"
    answer = run(play, ["crane_rollback", date, {"store": "s", "to": "3", "overrides": ["runtime.device=cpu"]}])
    assert answer[date]["state"] == "success"
    back, export = (call["argv"] for call in play.calls())
    identity = ["--store", "s", "--set", "runtime.device=cpu", "--to", "3", "--request"]
    assert back[:-1] == identity and back[-1].startswith("manual__")
    assert export == ["--store", "s", "--run", "r3", "--set", "runtime.device=cpu"]
