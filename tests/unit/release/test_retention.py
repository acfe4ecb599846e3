"""Which champions of a ledger are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from crane_core.release.ledger import Draft, Ledger
from crane_core.release.retention import champion_runs
from crane_core.storage.local import LocalStorage
from tests.worlds.ledgers import draft, promote


def test_the_newest_champions_are_kept(tmp_path: Path) -> None:
    ledger = Ledger(LocalStorage(tmp_path), "crane")
    for version in ("1", "2", "3", "4"):
        promote(ledger, version)
    ledger.append(ledger.size(), Draft("refuse", "5", "4", "run-5", "because"))
    assert champion_runs(ledger.entries(), 1) == {"run-4"}
    assert champion_runs(ledger.entries(), 3) == {"run-2", "run-3", "run-4"}
    assert champion_runs(ledger.entries(), 9) == {"run-1", "run-2", "run-3", "run-4"}


def test_after_a_rollback_those_it_can_go_back_to_come_first(tmp_path: Path) -> None:
    ledger = Ledger(LocalStorage(tmp_path), "crane")
    for version in ("1", "2", "3"):
        promote(ledger, version)
    promote(ledger, "2", "rollback")
    assert ledger.earlier_champions() == ["1"]
    assert champion_runs(ledger.entries(), 2) == {"run-1", "run-2"}


def test_models_that_share_a_store_keep_their_own(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    promote(Ledger(storage, "one"), "1")
    other = Ledger(storage, "other")
    other.append(1, replace(draft("1"), run_id="run-of-other"))
    assert champion_runs(other.entries(), 1) == {"run-1", "run-of-other"}
    assert champion_runs([], 1) == set()
