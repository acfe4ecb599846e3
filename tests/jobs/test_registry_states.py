"""Every state of a registry that somebody has changed by hand is named, and a command leads out of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from crane_core.config import Runtime
from crane_core.errors import ArtifactError
from crane_core.release import champion_lock
from crane_core.release.ledger import Ledger
from crane_core.release.registry import Registry, open_registry
from jobs.commands.query import verify_ledger
from jobs.ml import promote, repair, rollback
from jobs.stores import open_store
from tests.worlds.release_runs import copy_registered, damage, user_ids


class Hands:
    """A person with access to MLflow.

    Args:
        store: of the runs; its registry is the file in it.
    """

    def __init__(self, store: Path) -> None:
        self.store = store

    @property
    def registry(self) -> Registry:
        return open_registry(Runtime(), str(self.store))

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.registry.uri, self.registry.uri)

    @property
    def ledger(self) -> Ledger:
        return Ledger(open_store(str(self.store)).storage, "crane")

    def remove_version(self, number: str) -> None:
        self.client.delete_model_version("crane", number)

    def change_version(self, number: str) -> None:
        self.client.set_model_version_tag("crane", number, "crane.evidence.probe.json", "0" * 64)

    def remove_alias(self, number: str) -> None:
        if self.registry.holder("champion"):
            self.client.delete_registered_model_alias("crane", "champion")

    def change_alias(self, number: str) -> None:
        self.client.set_registered_model_alias("crane", "champion", "3" if number != "3" else "1")

    def remove_evidence(self, number: str) -> None:
        self._evidence(number).unlink()

    def change_evidence(self, number: str) -> None:
        damage(self._evidence(number))

    def remove_files(self, number: str) -> None:
        shutil.rmtree(self._files(number))

    def change_files(self, number: str) -> None:
        damage(next(self._files(number).rglob("items.parquet")))

    def remove_run(self, number: str) -> None:
        self.client.delete_run(self.registry.version(number).mlflow_run)

    def _evidence(self, number: str) -> Path:
        (path,) = self.store.glob(
            f"mlartifacts/**/{self.registry.version(number).mlflow_run}/artifacts/evidence/probe.json"
        )
        return path

    def _files(self, number: str) -> Path:
        return self.registry.model_folder(self.registry.version(number)).parent

    def assert_answers(self) -> str:
        """Check that the champion, which the ledger names too, gives recommendations; return its number."""
        answer = verify_ledger(open_store(str(self.store)), Runtime())
        users = pd.DataFrame({"user_id": user_ids()[:3]})
        found = self.registry.load("@champion").predict(users)
        assert list(found["user_id"]) == user_ids()[:3] and all(len(items) > 0 for items in found["item_ids"])
        return answer["champion"]


STATES = [name for name in vars(Hands) if name.startswith(("remove_", "change_"))]
NAMED = {
    "remove_version": "version 2 was removed",
    "change_version": "its evidence probe.json is not what was registered",
    "remove_alias": "points to version None, the ledger says 2",
    "change_alias": "points to version 3, the ledger says 2",
    "remove_evidence": "its evidence probe.json cannot be read",
    "change_evidence": "its evidence probe.json is not what was registered",
    "remove_files": "Version 2 .* is refused",
    "change_files": "items.parquet does not match its sha256",
}
HARMLESS = ("remove_alias", "change_alias", "remove_run")
"""States that leave the version itself whole; MLflow keeps what a removed run holds until its bin is emptied."""


@pytest.fixture
def hands(tmp_path: Path) -> Hands:
    """Champion is version 2, after version 1; version 3 is better and has not been judged."""
    copy_registered(tmp_path / "store", (1.5, 0.8, 0.1), 2)
    return Hands(tmp_path / "store")


def run_flags(hands: Hands, run: str) -> list[str]:
    return ["--store", str(hands.store), "--run", run]


WAYS: dict[str, Callable[[Hands], int]] = {
    "promote": lambda hands: promote.main(run_flags(hands, "run-3")),
    "rollback": lambda hands: rollback.main(["--store", str(hands.store), "--to", "1"]),
    "repair": lambda hands: repair.main(["--store", str(hands.store)]),
}
CHAMPIONS = {"promote": "3", "rollback": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("state", STATES)
def test_before_a_move(hands: Hands, state: str, way: str) -> None:
    getattr(hands, state)("2")
    before = [entry.hash for entry in hands.ledger.entries()]
    if state in NAMED:
        with pytest.raises(ArtifactError, match=NAMED[state]):
            verify_ledger(open_store(str(hands.store)), Runtime())
    assert WAYS[way](hands) == 0
    # Repaired, version 1 is the last champion that is whole.
    assert hands.assert_answers() == CHAMPIONS.get(way, "2" if state in HARMLESS else "1")
    # No line is rewritten.
    assert [entry.hash for entry in hands.ledger.entries()][: len(before)] == before


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_within_a_move(
    hands: Hands, state: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The change comes between the line in the ledger and the move of the alias to version 3."""
    real = champion_lock.hand_over

    def meddled(ledger, aliases, entry, smoke, fence):
        monkeypatch.undo()
        getattr(hands, state)("3")
        real(ledger, aliases, entry, smoke, fence)

    monkeypatch.setattr(champion_lock, "hand_over", meddled)
    code = promote.main(run_flags(hands, "run-3"))
    assert code == (0 if state in HARMLESS else 4)
    assert hands.assert_answers() == ("3" if state in HARMLESS else "2")
    if state not in HARMLESS:
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"] == "ArtifactError"
        assert hands.ledger.history()[-1].action == "restore"
    # The next commands work.
    assert rollback.main(["--store", str(hands.store)]) == 0
    assert hands.assert_answers() == ("2" if state in HARMLESS else "1")


@pytest.mark.slow
def test_with_no_earlier_champion_left_the_next_promotion_is_a_first_one(hands: Hands) -> None:
    for number in ("1", "2"):
        hands.remove_version(number)
    assert repair.main(["--store", str(hands.store)]) == 0
    last = hands.ledger.history()[-1]
    assert (last.action, last.version, last.champion) == ("repair", "2", None)
    assert hands.registry.holder("champion") is None
    assert repair.main(["--store", str(hands.store)]) == 0
    assert hands.ledger.history()[-1] == last
    assert rollback.main(["--store", str(hands.store)]) == 4
    assert promote.main(run_flags(hands, "run-3")) == 0
    assert hands.assert_answers() == "3"
    assert "first champion" in hands.ledger.history()[-1].reason


@pytest.mark.slow
def test_a_pruned_run_is_no_way_back(hands: Hands, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(hands.store / "runs" / "run-1")
    hands.registry.tag("1", {"crane.pruned": "2026-03-01T00:00:00+00:00"})
    capsys.readouterr()
    assert rollback.main(["--store", str(hands.store), "--to", "1"]) == 4
    assert "was pruned at 2026-03-01" in capsys.readouterr().out
    assert rollback.main(["--store", str(hands.store)]) == 4
    assert "version 1 was removed" in capsys.readouterr().out
    assert hands.assert_answers() == "2"
