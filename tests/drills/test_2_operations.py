"""What people do by hand, and what breaks: backfills by their plan, the REST API, dead processes, full disks."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest

from crane_core.stages import STAGES
from jobs.stores import open_store
from tests.drills.conftest import Deployment
from tests.worlds.services import PATIENCE, children, small_disk, until

CONTENT = ["ml.graph"]
PLANNED = re.compile(r"plan day=(\S+) run=(\S+) stage=(\S+) part=(\S*) state=(\S+) fingerprint=(\w+)")


def planned(text: str) -> list[tuple[str, ...]]:
    """The steps in a log of `plan`: day, run, stage, part, state, fingerprint."""
    return list(dict.fromkeys(PLANNED.findall(text)))


def days(deployment: Deployment, first: int, last: int, **more: object) -> dict[str, object]:
    """Parameters of a backfill over days counted back from today."""
    return {"from": str(deployment.day(first)), "to": str(deployment.day(last)), **more}


@pytest.fixture(autouse=True)
def awake(deployment: Deployment) -> None:
    """Every DAG may run; nothing is left over from the drill before."""
    deployment.airflow.unpause("crane_backfill", "crane_promote", "crane_rollback")
    deployment.proxy.fails = lambda *_: False


def test_a_dry_run_prints_what_a_run_makes(deployment: Deployment) -> None:
    airflow, store = deployment.airflow, deployment.store
    # Yesterday's artifacts are there since the scheduled days, those of the day before the backfills are not.
    wish = days(deployment, 7, 6, stages=["etl.profiles"])
    before = {path for path in deployment.store_path.rglob("*") if ".scratch" not in path.parts}
    run_id, state = airflow.do("crane_backfill", wish)
    assert state == "success"
    states = airflow.states("crane_backfill", run_id)
    assert {task for task, found in states.items() if set(found) == {"skipped"}} == {"etl", "content", "train", "check"}
    assert {path for path in deployment.store_path.rglob("*") if ".scratch" not in path.parts} == before
    plan = planned(airflow.log("crane_backfill", run_id, "plan"))
    assert [step[2] for step in plan] == ["etl.interactions", "etl.features", "etl.profiles"] * 2
    assert {step[4] for step in plan} == {"make"}

    run_id, state = airflow.do("crane_backfill", wish | {"dry_run": False})
    assert state == "success"
    assert planned(airflow.log("crane_backfill", run_id, "plan")) == plan
    assert airflow.states("crane_backfill", run_id)["etl"] == ["success"] * 2
    for _, run, stage, part, _, fingerprint in plan:
        entry = store.entry(run, STAGES[stage].label(part))
        assert entry is not None and entry["status"] == "done"
        assert fingerprint in ("None", entry["fingerprint"])
    # Once more: all is found, nothing runs.
    run_id, state = airflow.do("crane_backfill", wish | {"dry_run": False})
    assert state == "success"
    assert airflow.states("crane_backfill", run_id)["etl"] == ["skipped"]
    assert {step[4] for step in planned(airflow.log("crane_backfill", run_id, "plan"))} == {"found"}


@pytest.mark.parametrize(
    ("dag_id", "conf"),
    [
        ("crane_backfill", {"from": "2026-01-01"}),
        ("crane_backfill", {"from": "yesterday", "to": "2026-01-01"}),
        ("crane_backfill", {"from": "2026-01-01", "to": "2026-01-02", "stages": ["ml.train"]}),
        ("crane_retrain", {"overrides": ["--config=/etc/passwd"]}),
        ("crane_retrain", {"run": "../elsewhere"}),
        ("crane_promote", {"run": "a run"}),
        ("crane_rollback", {"to": "latest"}),
    ],
)
def test_bad_parameters_are_refused_before_any_task(deployment: Deployment, dag_id: str, conf: dict) -> None:
    before = len(deployment.airflow.runs(dag_id))
    status, answer = deployment.airflow.ask("POST", f"/dags/{dag_id}/dagRuns", {"logical_date": None, "conf": conf})
    assert status in (400, 422), answer
    assert len(deployment.airflow.runs(dag_id)) == before


def test_parameters_reach_the_jobs_over_the_rest_api(deployment: Deployment) -> None:
    run_id, state = deployment.airflow.do(
        "crane_backfill", days(deployment, 8, 8, stages=["etl.interactions"], overrides=["etl.test_days=3"])
    )
    assert state == "success"
    flags = deployment.airflow.result("crane_backfill", run_id, "resolve")["flags"]
    assert flags[flags.index("etl.test_days=3") - 1] == "--set"
    (step,) = planned(deployment.airflow.log("crane_backfill", run_id, "plan"))
    assert step[0] == str(deployment.day(8))


def test_a_failed_run_is_told_to_whom_the_deployment_names(deployment: Deployment) -> None:
    # The order of two dates is no matter of a schema: the first task refuses it.
    run_id, state = deployment.airflow.do("crane_backfill", days(deployment, 1, 2))
    assert state == "failed"
    assert deployment.airflow.states("crane_backfill", run_id)["plan"] == ["upstream_failed"]
    until("the notice", lambda: f"crane_backfill {run_id} failed" in deployment.heard())


def test_a_killed_scheduler_is_replaced(deployment: Deployment) -> None:
    airflow = deployment.airflow
    run_id = airflow.trigger("crane_backfill", days(deployment, 9, 9, stages=CONTENT, dry_run=False))
    airflow.wait_for_task("crane_backfill", run_id, "etl", ["running"])
    airflow.services["scheduler"].kill()
    time.sleep(5)
    airflow.services["scheduler"].start()
    assert airflow.wait("crane_backfill", run_id) == "success"
    assert airflow.states("crane_backfill", run_id)["check"] == ["success"]
    deployment.assert_whole()


def test_a_killed_task_is_retried(deployment: Deployment) -> None:
    airflow = deployment.airflow
    run_id = airflow.trigger("crane_backfill", days(deployment, 10, 10, stages=CONTENT, dry_run=False))
    airflow.wait_for_task("crane_backfill", run_id, "content", ["running"])

    def job() -> int | None:
        scheduler = airflow.services["scheduler"].process
        assert scheduler is not None
        for pid in children(scheduler.pid):
            with contextlib.suppress(OSError):
                if b"jobs.backfill.content" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    os.kill(until("job of content", job, every=0.1), signal.SIGKILL)
    assert airflow.wait("crane_backfill", run_id) == "success"
    (content,) = airflow.tasks("crane_backfill", run_id)["content"]
    assert content["try_number"] == 2
    assert "was killed by SIGKILL" in airflow.log("crane_backfill", run_id, "content")
    deployment.assert_whole()


def test_the_database_goes_away_for_twenty_seconds(deployment: Deployment) -> None:
    airflow = deployment.airflow
    run_id = airflow.trigger("crane_backfill", days(deployment, 11, 11, stages=CONTENT, dry_run=False))
    airflow.wait_for_task("crane_backfill", run_id, "etl", ["running"])
    deployment.postgres.stop()
    time.sleep(20)
    deployment.postgres.start()

    # What a service manager does: a component that gave up is started again.
    def ended() -> str | None:
        for service in (*airflow.services.values(), deployment.mlflow.service):
            if not service.is_alive():
                service.start()
        with contextlib.suppress(OSError, KeyError):
            state = airflow.run("crane_backfill", run_id)["state"]
            return state if state in ("success", "failed") else None
        return None

    state = until("end of the run", ended, PATIENCE, every=3)
    if state == "failed":
        # Loud, and the same run resumes.
        airflow.clear("crane_backfill", run_id)
        state = airflow.wait("crane_backfill", run_id)
    assert state == "success"
    deployment.assert_whole()


def test_the_disk_of_the_store_is_full(deployment: Deployment) -> None:
    airflow = deployment.airflow
    with small_disk(deployment.root / "small", 64) as disk:
        wish = days(deployment, 1, 1, stages=CONTENT, dry_run=False, store=str(disk / "store"))
        filler = disk / "filler"
        with filler.open("wb") as handle, contextlib.suppress(OSError):
            while True:
                handle.write(b"\0" * 65536)
        run_id, state = airflow.do("crane_backfill", wish)
        assert state == "failed"
        assert "No space left on device" in airflow.log("crane_backfill", run_id, "etl")
        store = open_store(str(disk / "store"))
        assert [stage for stage in store.storage.names("") if stage.startswith(("etl.", "ml."))] == []
        filler.unlink()
        airflow.clear("crane_backfill", run_id)
        assert airflow.wait("crane_backfill", run_id) == "success"
        assert deployment.assert_whole(store) == 7
