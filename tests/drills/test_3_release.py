"""Promotions under load and under failure, against an MLflow server on PostgreSQL."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest

from crane_core.release.ledger import Ledger
from crane_core.release.registry import Registry
from jobs.ml import promote, register
from jobs.stores import open_store
from tests.drills.conftest import Deployment
from tests.worlds.release_runs import make_run
from tests.worlds.services import until

NUM_PROMOTIONS = 30


@pytest.fixture(autouse=True)
def awake(deployment: Deployment) -> None:
    deployment.airflow.unpause("crane_promote", "crane_rollback")
    deployment.proxy.fails = lambda *_: False


class Releases:
    """A store with runs of a chosen quality and a registered model of its own, behind the deployment's proxy."""

    def __init__(self, deployment: Deployment, name: str) -> None:
        self.deployment = deployment
        self.root = deployment.root / name
        self.name = name
        self.runtime = (f"runtime.registry={deployment.proxy.uri}", f"runtime.model_name={name}")

    @property
    def ledger(self) -> Ledger:
        return Ledger(open_store(str(self.root)).storage, self.name)

    @property
    def registry(self) -> Registry:
        return Registry(f"http://127.0.0.1:{self.deployment.mlflow.port}", None, self.name)

    def register(self, run: str, **quality: float) -> list[str]:
        """A finished and registered run; the flags of its jobs."""
        argv = [*make_run(self.root, run, **quality), *(word for each in self.runtime for word in ("--set", each))]
        assert register.main(argv) == 0
        return argv

    def champion(self, run: str, **quality: float) -> None:
        """A run that is registered and promoted on the spot."""
        assert promote.main(self.register(run, **quality)) == 0

    def start(self, run: str, **more: object) -> str:
        """A run of `crane_promote`; its id."""
        conf = {"store": str(self.root), "run": run, "overrides": list(self.runtime), **more}
        return self.deployment.airflow.trigger("crane_promote", conf)

    def history(self) -> list[tuple[str, str, str | None]]:
        return [(entry.action, entry.version, entry.champion) for entry in self.ledger.history()]

    def assert_whole(self) -> None:
        assert self.ledger.verify(self.registry.ledger_anchors()) == self.ledger.size()
        assert self.registry.holder("champion") == self.ledger.champion()


def test_thirty_promotions_at_once(deployment: Deployment) -> None:
    releases = Releases(deployment, "crowd")
    quality = np.linspace(1.6, 0.1, NUM_PROMOTIONS)
    order = np.random.default_rng(3).permutation(NUM_PROMOTIONS)
    runs = [releases.register(f"run-{number:02d}", noise=float(quality[number]), seed=int(number)) for number in order]
    moves_before = len(deployment.proxy.alias_moves())
    # Processes of their own that share one import of mlflow and torch.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs.ml.promote"])
    racers = [context.Process(target=promote.main, args=(argv,)) for argv in runs]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(1800)
    assert [racer.exitcode for racer in racers] == [0] * NUM_PROMOTIONS

    history = releases.ledger.history()
    assert sorted(int(entry.version) for entry in history) == list(range(1, NUM_PROMOTIONS + 1))
    assert {entry.action for entry in history} <= {"promote", "refuse"}
    champion = None
    for entry in history:
        assert entry.champion_before == entry.numbers["champion"] == champion
        # The rule, applied once more to the numbers of the entry.
        assert (entry.action == "promote") == all(check["passed"] for check in entry.numbers["checks"])
        champion = entry.version if entry.action == "promote" else champion
        assert entry.champion == champion
    fences = [entry.fence for entry in history]
    assert fences == sorted(set(fences))
    promoted = [entry.version for entry in history if entry.action == "promote"]
    assert deployment.proxy.alias_moves()[moves_before:] == promoted
    assert releases.registry.holder("champion") == promoted[-1] == champion
    releases.assert_whole()


def test_a_broken_smoke_test_brings_the_champion_back_in_the_same_task(deployment: Deployment) -> None:
    releases = Releases(deployment, "smoke")
    releases.champion("run-1", noise=1.0)
    releases.register("run-2", noise=0.1)
    moves = len(deployment.proxy.alias_moves())
    # Whoever loads the model by its alias gets no answer; nothing else is wrong.
    deployment.proxy.fails = lambda method, path, _: method == "GET" and path.endswith("/registered-models/alias")
    run_id = releases.start("run-2")
    assert deployment.airflow.wait("crane_promote", run_id) == "failed"
    deployment.proxy.fails = lambda *_: False
    (task,) = deployment.airflow.tasks("crane_promote", run_id)["promote"]
    assert (task["state"], task["try_number"]) == ("failed", 1)
    assert "the champion is 1 again" in deployment.airflow.log("crane_promote", run_id, "promote")
    assert deployment.airflow.states("crane_promote", run_id)["export"] == ["upstream_failed"]
    assert releases.history() == [("promote", "1", "1"), ("promote", "2", "2"), ("restore", "2", "1")]
    assert "failed its smoke test" in releases.ledger.history()[-1].reason
    assert deployment.proxy.alias_moves()[moves:] == ["2", "1"]
    releases.assert_whole()
    # Mended, it is promoted after all.
    deployment.airflow.clear("crane_promote", run_id)
    assert deployment.airflow.wait("crane_promote", run_id) == "success"
    assert releases.history()[-1] == ("promote", "2", "2")
    releases.assert_whole()


def test_the_model_registry_answers_500(deployment: Deployment) -> None:
    """Down for every request from the first alias move on, until the first attempt has failed."""
    releases = Releases(deployment, "outage")
    releases.champion("run-1", noise=1.0)
    releases.register("run-2", noise=0.1)
    seen = len(deployment.proxy.requests)

    def down(method: str, path: str, before: list) -> bool:
        return any(request.path.endswith("/registered-models/alias") for request in before[seen:]) or (
            method == "POST" and path.endswith("/registered-models/alias")
        )

    deployment.proxy.fails = down
    run_id = releases.start("run-2")
    deployment.airflow.wait_for_task("crane_promote", run_id, "promote", ["up_for_retry", "failed"])
    deployment.proxy.fails = lambda *_: False
    assert "too many 500 error responses" in deployment.airflow.log("crane_promote", run_id, "promote")
    assert releases.history() == [("promote", "1", "1"), ("promote", "2", "2")]
    assert deployment.airflow.wait("crane_promote", run_id) == "success"
    assert releases.history() == [("promote", "1", "1"), ("promote", "2", "2")]
    assert releases.registry.version("2").tags["crane.smoke"] == "2"
    releases.assert_whole()


def test_a_rollback_through_airflow(deployment: Deployment) -> None:
    releases = Releases(deployment, "back")
    for number, noise in enumerate((1.5, 0.6, 0.1), start=1):
        releases.champion(f"run-{number}", noise=noise)
    conf = {"store": str(releases.root), "overrides": list(releases.runtime)}
    for to, champion in (("previous", "2"), ("1", "1")):
        run_id, state = deployment.airflow.do("crane_rollback", conf | {"to": to})
        assert state == "success", deployment.airflow.why("crane_rollback", run_id)
        assert releases.registry.holder("champion") == champion
        assert deployment.airflow.result("crane_rollback", run_id, "export")["version"] == champion
    run_id, state = deployment.airflow.do("crane_rollback", conf | {"to": "9"})
    assert state == "failed"
    assert "has no version '9'" in deployment.airflow.log("crane_rollback", run_id, "rollback")
    assert releases.history()[3:] == [("rollback", "2", "2"), ("rollback", "1", "1")]
    # Lineage tells which artifacts were made of which.
    exports = until("lineage of two exports", lambda: deployment.lineage("crane_rollback", "export")[1:] or None)
    made = {output["name"] for event in deployment.lineage("crane_rollback", "export") for output in event["outputs"]}
    store = open_store(str(releases.root))
    assert made == {f"ml.export/{store.artifact(run, 'ml.export').fingerprint}" for run in ("run-1", "run-2")}
    assert {each["name"].partition("/")[0] for each in exports[0]["inputs"]} == {"etl.interactions", "ml.train"}
    releases.assert_whole()


def test_a_person_is_asked_and_says_no_then_yes(deployment: Deployment) -> None:
    releases, airflow = Releases(deployment, "approval"), deployment.airflow
    releases.register("run-1", noise=0.5)
    for answer, champion in (("Reject", None), ("Approve", "1")):
        run_id = releases.start("run-1", approval=True)
        airflow.wait_for_task("crane_promote", run_id, "approve", ["deferred", "awaiting_input"])
        assert releases.ledger.size() == 0
        path = f"/dags/crane_promote/dagRuns/{run_id}/taskInstances/approve/-1/hitlDetails"
        status, detail = airflow.ask("PATCH", path, {"chosen_options": [answer], "params_input": {}})
        assert status == 200, detail
        assert airflow.wait("crane_promote", run_id) == "success"
        assert releases.registry.holder("champion") == champion
        assert airflow.states("crane_promote", run_id)["promote"] == ["success" if champion else "skipped"]
