import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors.numpy import load_file, save_file

from crane_core.config import Runtime
from crane_core.errors import ArtifactError
from crane_core.release import champion_lock
from crane_core.release.ledger import Ledger
from crane_core.release.registry import Registry, open_registry
from crane_core.stages import STAGES
from crane_core.storage.artifacts import ArtifactStore
from crane_core.storage.lease import Lease
from jobs.commands.query import verify_ledger
from jobs.ml import export, judge, promote, register, report, restore, rollback
from jobs.stores import open_store
from tests.worlds.mlflow_tables import copy_tables
from tests.worlds.processes import CONTEXT, JobProcess
from tests.worlds.release_runs import (
    NUM_COLD,
    NUM_ITEMS,
    NUM_USERS,
    copy_registered,
    damage,
    item_ids,
    make_run,
    user_ids,
)


class Place:
    """A store of its own, and its jobs."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self._capsys = capsys

    def job(self, module, argv: list[str], code: int = 0) -> dict:
        """Run a job in this process and return its last line."""
        self._capsys.readouterr()
        assert module.main(argv) == code
        lines = self._capsys.readouterr().out.splitlines()
        return json.loads(lines[-1]) if lines else {}

    def run(self, run_id: str, **settings) -> list[str]:
        """A finished and registered run."""
        argv = make_run(self.root, run_id, **settings)
        assert register.main(argv) == 0
        return argv

    def start(self, *noises: float, promoted: int = 1) -> list[list[str]]:
        """Begin with registered runs `run-1`, `run-2` ... of these noises, the first of them promoted."""
        shutil.rmtree(self.root)
        return copy_registered(self.root, noises, promoted)

    @property
    def store(self) -> ArtifactStore:
        return open_store(str(self.root))

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.store.storage, "crane")

    @property
    def registry(self) -> Registry:
        return open_registry(Runtime(), str(self.root))

    def back(self, to: str = "previous", *extra: str, code: int = 0) -> dict:
        """Roll back."""
        return self.job(rollback, ["--store", str(self.root), "--to", to, *extra], code)

    def model_file(self, version: str, name: str) -> Path:
        return self.registry.model_folder(self.registry.version(version)) / name


def mlflow_client(place: Place) -> MlflowClient:
    return MlflowClient(place.registry.uri)


@pytest.fixture
def place(tmp_path, capsys) -> Place:
    copy_tables(tmp_path / "store")
    return Place(tmp_path / "store", capsys)


def test_registering_twice_gives_one_version(place):
    argv = make_run(place.root, "run-1")
    first = place.job(register, argv)
    assert (first["status"], first["version"], first["alias"]) == ("done", "1", "candidate")
    again = place.job(register, argv)
    assert (again["status"], again["version"], again["alias"]) == ("found", "1", "candidate")
    version = place.registry.version("1")
    assert version.aliases == ("candidate",)
    assert version.tags["crane.window_end"] == "2026-03-01T00:00:00Z"
    assert version.tags["crane.artifact.ml.train"] == "run-1"
    assert {"crane.config_hash", "crane.artifact.ml.evaluate", "crane.fingerprint"} <= set(version.tags)


def test_another_way_to_lay_a_model_out_makes_another_version(place, monkeypatch):
    argv = place.run("run-1")
    monkeypatch.setitem(STAGES, "ml.register", replace(STAGES["ml.register"], version=99))
    assert place.job(register, argv)["version"] == "2"


def test_a_crash_before_the_alias_is_made_good(place):
    argv = place.run("run-1")
    place.registry.set_alias("candidate", None)
    assert place.job(register, argv)["alias"] == "candidate"
    assert place.registry.holder("candidate") == "1"


def test_registering_an_old_run_again_does_not_bring_its_alias_back(place):
    old = place.run("run-1")
    place.run("run-2", noise=0.4)
    assert place.job(register, old)["alias"] is None
    assert place.registry.holder("candidate") == "2"


def test_a_backfill_registers_and_moves_nothing(place):
    argv = [*make_run(place.root, "run-1"), "--set", "runtime.backfill=true"]
    assert place.job(register, argv)["alias"] is None
    assert place.registry.holder("candidate") is None
    assert place.job(promote, argv, code=2)["found"] == "A backfill moves no alias."
    assert place.ledger.size() == 0


def test_a_damaged_artifact_is_not_registered(place):
    argv = make_run(place.root, "run-1")
    damage(place.root / "ml.train" / "run-1" / "embeddings.safetensors")
    place.job(register, argv, code=4)
    assert place.registry.versions() == []


def test_promotion_from_the_first_champion_to_a_better_one(place):
    first = place.run("run-1", noise=1.0)
    done = place.job(promote, first)
    assert (done["status"], done["decision"], done["champion"], done["previous"]) == ("done", "promoted", "1", None)
    found = place.job(promote, first)
    assert found["status"] == "found"
    assert {key: found[key] for key in ("decision", "reason", "champion", "ledger")} == {
        key: done[key] for key in ("decision", "reason", "champion", "ledger")
    }
    better = place.run("run-2", noise=0.1, window_end="2026-03-02")
    done = place.job(promote, better)
    assert (done["decision"], done["champion"], done["previous"]) == ("promoted", "2", "1")
    assert place.ledger.size() == 2
    assert place.registry.holder("champion") == "2"
    version = place.registry.version("2")
    assert version.tags["crane.decision"] == "promoted" and version.tags["crane.smoke"] == "2"
    numbers = place.ledger.history()[-1].numbers
    assert numbers["differences"]["recall@20"]["low"] > 0.2
    assert numbers["standings"]["champion"]["version"] == "1"
    table = place.registry.load("@champion").predict(pd.DataFrame({"user_id": ["user-37", "nobody"]}))
    assert table["fallback"].tolist() == [False, True]


def test_users_without_training_items_are_evaluated_as_they_are_served(place):
    argv = place.run("run-1", noise=0.3, num_untrained=30)
    assert place.job(promote, argv)["decision"] == "promoted"
    users = pq.read_table(place.store.artifact("run-1", "ml.evaluate").file("per_user.parquet")).slice(0, 30)
    for metric in ("recall@20", "ndcg@20"):
        assert users.column(f"crane.{metric}").equals(users.column(f"popularity.{metric}"))


def test_the_champion_is_measured_as_it_was_evaluated(place):
    """Both runs see the same data, so the champion's numbers must be those of its own evaluation."""
    place.job(promote, place.run("run-1", noise=0.8))
    place.job(promote, place.run("run-2", noise=0.3))
    measured = place.ledger.history()[-1].numbers["standings"]["champion"]
    evaluated = json.loads(place.store.artifact("run-1", "ml.evaluate").file("metrics.json").read_text())
    crane = evaluated["models"]["crane"]
    assert measured["recall@20"] == pytest.approx(crane["recall@20"]["mean"], abs=1e-6)
    assert measured["ndcg@20"] == pytest.approx(crane["ndcg@20"]["mean"], abs=1e-6)
    assert measured["coverage@20"] == pytest.approx(crane["coverage@20"])
    recall = evaluated["slices"]["cold_items"]["crane"]["recall@20"]
    assert measured["cold_recall@20"] == pytest.approx(recall)
    cold = evaluated["cold_items"]
    assert cold["items"] >= NUM_COLD and cold["models"]["crane"]["mean"] == pytest.approx(recall)
    # The planted model knows its cold items; to what counts co-occurrences they are all alike.
    auc = cold["cold_auc"]["models"]
    assert auc["crane"]["low"] > 0.5 and auc["crane"]["mean"] > auc["lightgcn"]["mean"]
    assert auc["item_knn"] == {"mean": 0.5, "low": 0.5, "high": 0.5}


def _lucky(rows, users, items):
    """Sixteen of 120 users get perfect rows, everybody else a little more noise."""
    noise = np.random.default_rng(5).normal(size=users.shape)
    rows["user_embeddings"] += 0.2 * noise
    rows["user_embeddings"][:16] = 4 * users[:16]


def _equal(rows, users, items):
    """Twice the length ranks the same: other files, the same metrics."""
    rows["user_embeddings"] *= 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        pytest.param({"noise": 1.5}, "not better than champion 1 (ndcg@20 -", id="worse"),
        pytest.param({"noise": 0.6, "edit": _equal}, "champion 1 (ndcg@20 +0.0000 [+0.0000, +0.0000]", id="equal"),
        pytest.param({"noise": 0.6, "edit": _lucky}, "too uncertain to be better than champion 1", id="lucky"),
        pytest.param({"noise": 0.05, "cold_noise": 0.1}, "recall@20 of cold items", id="cold items collapse"),
        pytest.param({"noise": 0.05, "window_end": "2026-02-28"}, "before that of champion 1", id="older window"),
    ],
)
def test_a_challenger_that_does_not_deserve_it_is_refused(place, settings, reason):
    """Every metric here comes from `ml.evaluate` over the challenger's own rows."""
    place.start(0.6)
    argv = place.run("run-2", **settings)
    done = place.job(promote, argv)
    assert (done["decision"], done["champion"]) == ("refused", "1")
    assert reason in done["reason"]
    assert place.registry.holder("champion") == "1"
    assert place.registry.version("2").tags["crane.decision"] == "refused"
    again = place.job(promote, argv)
    assert (again["status"], again["reason"], place.ledger.size()) == ("found", done["reason"], 2)


def test_what_the_gate_cases_rest_on(place):
    """The lucky one gains on average, the collapsing one gains in both metrics, the better one passes every check."""
    place.start(0.6)
    place.job(promote, place.run("run-2", noise=0.6, edit=_lucky))
    place.job(promote, place.run("run-3", noise=0.05, cold_noise=0.1))
    place.job(promote, place.run("run-4", noise=0.3))
    lucky, collapsing, better = (entry.numbers for entry in place.ledger.history()[1:])
    lucky_gain = lucky["differences"]["recall@20"]
    assert lucky_gain["mean"] > 0 > lucky_gain["low"]
    assert all(gain["low"] > 0 for gain in collapsing["differences"].values())
    assert [check["name"] for check in collapsing["checks"] if not check["passed"]] == ["recall@20 of cold items"]
    assert all(check["passed"] for check in better["checks"])
    assert place.registry.holder("champion") == "4"


def test_a_first_champion_below_lightgcn_is_refused_and_nothing_is_exported(place):
    argv = place.run("run-1", noise=2.0, lightgcn_noise=0.3)
    done = place.job(promote, argv)
    assert (done["decision"], done["champion"]) == ("refused", None)
    assert "recall@20 against lightgcn" in done["reason"]
    assert "no better than lightgcn" in done["remedy"] and "deliver more interactions" in done["remedy"]
    assert place.registry.holder("champion") is None
    assert place.job(export, argv)["status"] == "skipped"
    assert "There is no champion" in Path(place.job(report, argv)["report"]).read_text()


def test_a_tampered_model_is_not_promoted(place):
    _, argv = place.start(1.0, 0.1)
    damage(place.model_file("2", "embeddings.safetensors"))
    place.job(promote, argv, code=4)
    assert place.ledger.size() == 1
    assert place.registry.holder("champion") == "1"


def test_evidence_that_does_not_fit_the_model_is_refused(place, monkeypatch):
    """Another model's embeddings under one run's evaluation: both whole, and not of one another."""
    argv = make_run(place.root, "run-1", noise=0.3)
    trained = place.store.artifact("run-1", "ml.train")
    path = trained.path / "embeddings.safetensors"
    rows = load_file(path)
    save_file({name: np.ascontiguousarray(values[::-1]) for name, values in rows.items()}, path)
    monkeypatch.setattr("crane_core.storage.artifacts.Artifact.verify", lambda artifact: None)
    place.job(register, argv)
    place.job(promote, argv, code=4)
    assert place.ledger.size() == 0


def test_a_crash_between_ledger_and_alias_is_repaired(place, monkeypatch):
    _, argv = place.start(1.0, 0.1)

    def crash(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(champion_lock, "hand_over", crash)
    with pytest.raises(KeyboardInterrupt):
        promote.main(argv)
    monkeypatch.undo()
    assert place.ledger.champion() == "2" and place.registry.holder("champion") == "1"
    done = place.job(promote, argv)
    assert (done["status"], done["decision"], done["champion"]) == ("found", "promoted", "2")
    assert place.registry.holder("champion") == "2"
    assert place.registry.version("2").tags["crane.smoke"] == "2"
    assert place.ledger.size() == 2


def test_a_registry_that_fails_at_the_alias_is_tried_again(place, monkeypatch):
    _, argv = place.start(1.0, 0.1)

    def fail(*arguments):
        raise MlflowException("500 Internal Server Error")

    monkeypatch.setattr(Registry, "set_alias", fail)
    place.job(promote, argv, code=1)
    assert (place.ledger.champion(), place.registry.holder("champion")) == ("2", "1")
    monkeypatch.undo()
    done = place.job(promote, argv)
    assert (done["status"], done["champion"], place.registry.holder("champion")) == ("found", "2", "2")
    assert place.ledger.size() == 2


def test_a_failed_smoke_test_restores_the_champion(place, monkeypatch):
    _, argv = place.start(1.0, 0.1)

    def fail(*arguments):
        raise ArtifactError("The served model recommends something else.", "Look.")

    monkeypatch.setattr(champion_lock, "smoke_test", fail)
    place.job(promote, argv, code=4)
    assert place.registry.holder("champion") == "1"
    assert [entry.action for entry in place.ledger.history()] == ["promote", "promote", "restore"]
    monkeypatch.undo()
    assert place.job(promote, argv)["champion"] == "2"


def test_a_promotion_during_another_waits_for_its_end(place, tmp_path, monkeypatch):
    """Version 2 is being tested, and fails, while 3 is judged: 3 must be held against 1, not against 2."""
    _, second, third = place.start(1.5, 0.8, 0.1)
    racers = []

    def slow_failure(predict, probe):
        if not racers:
            racers.append(JobProcess("jobs.ml.promote", third, tmp_path / "racer"))
            while "waiting for=lease" not in racers[0].said() and racers[0].running:
                time.sleep(0.02)
        raise ArtifactError("The served model recommends something else.", "Look.")

    monkeypatch.setattr(champion_lock, "smoke_test", slow_failure)
    place.job(promote, second, code=4)
    assert racers[0].wait() == 0 and "waiting for=lease" in racers[0].said()
    history = [(entry.action, entry.version, entry.champion_before, entry.champion) for entry in place.ledger.history()]
    assert history == [
        ("promote", "1", None, "1"),
        ("promote", "2", "1", "2"),
        ("restore", "2", "2", "1"),
        ("promote", "3", "1", "3"),
    ]
    assert [entry.fence for entry in place.ledger.history()] == [1, 2, 2, 3]
    assert place.registry.holder("champion") == "3"


def _die_at_the_smoke_test() -> None:
    champion_lock.smoke_test = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def test_a_promoter_that_is_killed_is_finished_by_the_next(place, tmp_path):
    """Killed with the alias moved and nothing tested: the next promotion of another run tests the champion first."""
    _, second, third = place.start(1.5, 0.8, 1.6)
    killed = JobProcess("jobs.ml.promote", second, tmp_path / "killed", prepare=_die_at_the_smoke_test)
    assert killed.wait() == -signal.SIGKILL
    assert place.registry.holder("champion") == "2"
    assert "crane.smoke" not in place.registry.version("2").tags
    held = Lease(place.store.storage).newest()
    assert held.token == 2 and not held.released
    # Nobody waits a minute here.
    place.store.storage.write(f"lease/{held.name}", replace(held, expires_at=time.time()).encode())
    done = place.job(promote, third)
    assert (done["decision"], done["champion"], done["previous"]) == ("refused", "2", "2")
    assert place.registry.version("2").tags["crane.smoke"] == "2"
    assert place.job(promote, second)["status"] == "found"


def test_a_failure_after_a_promotion_takes_it_back(place):
    first, argv = place.start(1.0, 0.1, promoted=2)
    assert place.job(restore, first)["status"] == "skipped"
    assert place.registry.holder("champion") == "2"
    assert place.job(restore, argv)["champion"] == place.registry.holder("champion") == "1"
    last = place.ledger.history()[-1]
    assert (last.action, last.version, last.run_id) == ("restore", "2", "run-2")
    assert "what had to follow the promotion of version 2 failed" in last.reason
    assert place.job(restore, argv)["status"] == "skipped"
    assert place.job(promote, argv)["champion"] == place.registry.holder("champion") == "2"
    place.job(export, argv)
    assert place.job(restore, argv)["status"] == "skipped"
    assert place.registry.holder("champion") == "2"
    assert place.ledger.size() == 4


def test_judging_changes_nothing(place):
    argv = place.run("run-1", noise=1.0)
    before = place.registry.version("1")
    done = place.job(judge, argv)
    assert (done["decision"], done["version"], place.ledger.size()) == ("promoted", "1", 0)
    assert place.registry.version("1") == before
    promoted = place.job(promote, argv)
    assert promoted["reason"] == done["reason"]


def test_a_version_carries_what_it_was_made_of(place):
    place.run("run-1")
    version = place.registry.version("1")
    folder = next(each for each in place.registry.model_folder(version).parents if (each / "MLmodel").exists())
    described = yaml.safe_load((folder / "MLmodel").read_text())
    columns = [column["name"] for column in json.loads(described["signature"]["inputs"])]
    assert columns == ["user_id", "history", "history_times"]
    assert json.loads(described["signature"]["params"])[0]["name"] == "k"
    assert described["saved_input_example_info"]["artifact_path"] == "input_example.json"
    run = mlflow_client(place).get_run(version.mlflow_run)
    assert {each.dataset.name for each in run.inputs.dataset_inputs} == {"etl.interactions", "ml.train", "ml.evaluate"}
    assert set(version.tags) >= {
        *("crane.run", "crane.window_start", "crane.window_end", "crane.config_hash", "crane.fingerprint"),
        *("crane.checksums", "crane.evidence.metrics.json", "crane.evidence.per_user.parquet"),
        *(f"crane.artifact.{stage}" for stage in ("etl.interactions", "ml.train", "ml.evaluate")),
    }
    files = {path.name for path in place.root.joinpath("mlartifacts").rglob("*") if path.is_file()}
    assert {"embeddings.safetensors", "weights.safetensors", "checksums.json"} <= files
    assert [name for name in files if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"))] == []


def test_a_model_damaged_after_promotion_cannot_be_rolled_back_to(place):
    place.start(1.0, 0.1, promoted=2)
    damage(place.model_file("1", "items.parquet"))
    place.back("1", code=4)
    assert place.registry.holder("champion") == "2"
    assert [entry.action for entry in place.ledger.history()] == ["promote", "promote", "rollback", "restore"]


def test_rollback_to_the_previous_and_to_a_version(place):
    place.start(1.0, 0.1, promoted=2)
    done = place.back("previous")
    assert (done["status"], done["champion"], done["previous"], done["champion_run"]) == ("done", "1", "2", "run-1")
    assert place.registry.holder("champion") == "1"
    place.back("previous", code=4)
    assert place.back("1")["status"] == "found"
    place.back("99", code=4)
    assert place.ledger.size() == 3
    assert place.back("2")["champion"] == "2"


def test_a_wish_is_granted_once(place):
    place.start(1.5, 0.8, 0.1, promoted=3)
    assert place.back("previous", "--request", "monday")["champion"] == "2"
    assert place.back("previous", "--request", "monday")["status"] == "found"
    assert place.registry.holder("champion") == "2"
    assert place.back("previous", "--request", "tuesday")["champion"] == "1"


def test_a_rollback_that_died_is_finished_and_not_repeated(place, monkeypatch):
    place.start(1.5, 0.8, 0.1, promoted=3)
    assert [entry.champion for entry in place.ledger.history()] == ["1", "2", "3"]

    def crash(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(champion_lock, "hand_over", crash)
    with pytest.raises(KeyboardInterrupt):
        rollback.main(["--store", str(place.root)])
    monkeypatch.undo()
    assert place.back()["champion"] == "2"
    assert place.registry.holder("champion") == "2"
    assert place.ledger.size() == 4


def test_the_ledger_is_checked_against_the_registry(place):
    place.start(1.0, 0.1, promoted=2)
    answer = verify_ledger(place.store, Runtime())
    assert (answer["entries"], answer["anchored"], answer["champion"]) == (2, 2, "2")
    assert answer["last"] == place.ledger.entries()[-1].hash
    place.registry.set_alias("champion", "1")
    with pytest.raises(ArtifactError, match="points to version 1, the ledger says 2"):
        verify_ledger(place.store, Runtime())
    (place.root / "ledger" / "00000002.json").unlink()
    with pytest.raises(ArtifactError, match="entry 2 is not the one the registry remembers"):
        verify_ledger(place.store, Runtime())


def test_a_cut_ledger_stops_promotions(place):
    argv = place.run("run-1")
    place.job(promote, argv)
    (place.root / "ledger" / "00000001.json").unlink()
    place.job(promote, argv, code=4)


@pytest.mark.slow
def test_concurrent_promotions_end_in_one_order(place):
    runs = [place.run(f"run-{number}", noise=noise) for number, noise in enumerate((1.2, 0.6, 0.1), start=1)]
    racers = [CONTEXT.Process(target=promote.main, args=(argv,)) for argv in runs]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    history = place.ledger.history()
    assert sorted(entry.version for entry in history) == ["1", "2", "3"]
    champion = None
    for entry in history:
        assert entry.champion_before == champion
        assert entry.numbers["champion"] == champion
        champion = entry.champion
    # Each run is better than those before it, so whatever the order, the best one ends as champion.
    assert champion == place.registry.holder("champion") == "3"
    assert place.ledger.verify(place.registry.ledger_anchors()) == 3


def test_export_of_the_champion_by_external_ids(place):
    first = place.run("run-1", noise=0.3)
    place.job(promote, first)
    second = place.run("run-2", noise=1.5)
    assert place.job(promote, second)["decision"] == "refused"
    done = place.job(export, second)
    assert (done["status"], done["version"], done["champion_run"]) == ("done", "1", "run-1")
    assert place.store.entry("run-1", "ml.export") == place.store.entry("run-2", "ml.export")
    assert place.job(export, first)["status"] == "found"
    artifact = place.store.artifact("run-1", "ml.export")
    assert artifact.fingerprint == place.store.artifact("run-2", "ml.export").fingerprint
    table = pq.read_table(artifact.file("recommendations")).to_pylist()
    assert len(table) == NUM_USERS * 10
    rows = load_file(place.store.artifact("run-1", "ml.train").file("embeddings.safetensors"))
    served = place.registry.load("@champion").predict(pd.DataFrame({"user_id": ["user-37"]}), params={"k": 10})
    mine = [row["item_id"] for row in table if row["user_id"] == "user-37"]
    assert mine == served["item_ids"][0]
    index = faiss.read_index(str(artifact.file("ann.faiss")))
    user = user_ids().index("user-37")
    _, found = index.search(rows["user_embeddings"][user : user + 1], NUM_ITEMS)
    order = np.argsort(-(rows["item_embeddings"] @ rows["user_embeddings"][user]))
    assert found[0].tolist() == order.tolist()
    assert pq.read_table(artifact.file("items.parquet")).column("item_id").to_pylist() == item_ids()
    assert pq.read_table(artifact.file("users.parquet")).column("user_id").to_pylist() == user_ids()
    exported = load_file(artifact.file("embeddings.safetensors"))
    assert {name: np.array_equal(values, rows[name]) for name, values in exported.items()} == {
        "user_embeddings": True,
        "item_embeddings": True,
    }
    assert len(pq.read_table(artifact.file("similar"))) == NUM_ITEMS * 5


def test_the_report_tells_the_whole_story(place):
    _, argv = place.start(1.0, 0.1, promoted=2)
    place.job(export, argv)
    done = place.job(report, argv)
    path = place.root / "reports" / "run-2.html"
    assert done["report"] == str(path)
    page = path.read_text()
    assert "Promoted · model version 2" in page
    assert page.count("<svg") == 6
    assert "Better than champion 1" in page
    for part in (
        "ml.behaviour",
        "Quarantine: null user id",
        "Title 1",
        "Lower bound of Recall@20",
        "AUC among the cold items",
        "Diverse users",
    ):
        assert part in page, part
    assert "has no artifact of ml.graph" in page
    for outside in ("<script", "<link", "src=", "@import", "url(http"):
        assert outside not in page, outside
