"""Judging the newest candidate on behalf of a schedule: what becomes of the older ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from crane_core.config import Runtime
from crane_core.release.ledger import Ledger
from crane_core.release.registry import open_registry
from jobs.ml import promote, rollback
from jobs.stores import open_store
from tests.worlds.release_runs import copy_registered


def lines(store: Path) -> list[tuple[str, str, str | None]]:
    """Action, version and champion of every entry."""
    return [
        (entry.action, entry.version, entry.champion)
        for entry in Ledger(open_store(str(store)).storage, "crane").history()
    ]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_older_candidates_that_nobody_judged_get_a_line(store: Path) -> None:
    runs = copy_registered(store, (1.0, 0.9, 0.8, 0.1), 1)
    assert promote.main([*runs[3], "--announced"]) == 0
    assert lines(store) == [("promote", "1", "1"), ("promote", "4", "4"), ("pass", "2", "4"), ("pass", "3", "4")]
    registry = open_registry(Runtime(), str(store))
    assert registry.version("2").tags["crane.decision"] == "passed over"
    assert "version 4" in registry.version("3").tags["crane.decision_reason"]
    assert registry.holder("champion") == "4"
    client = MlflowClient(registry.uri, registry.uri)
    judged, waiting = (client.get_model_version("crane", number).description for number in ("4", "3"))
    assert "**Decision.** Promoted: better than champion 1" in judged and "| champion (version 1) | 0." in judged
    assert "reports/run-4.html" in judged and "Not judged yet." in waiting
    Ledger(open_store(str(store)).storage, "crane").verify(registry.ledger_anchors())
    # A second announcement of the same candidate writes nothing, and rolling back goes past the lines.
    assert promote.main([*runs[3], "--announced"]) == 0
    assert len(lines(store)) == 4
    assert rollback.main(["--store", str(store), "--to", "previous"]) == 0
    assert lines(store)[-1] == ("rollback", "1", "1")


def test_a_person_passes_nobody_over_and_may_judge_one_that_was(store: Path) -> None:
    runs = copy_registered(store, (1.0, 0.5, 0.8), 1)
    assert promote.main(runs[2]) == 0
    assert [line[0] for line in lines(store)] == ["promote", "promote"]
    assert promote.main([*runs[2], "--announced"]) == 0
    assert lines(store)[-1] == ("pass", "2", "3")
    assert promote.main(runs[1]) == 0
    assert lines(store)[-1] == ("promote", "2", "2")


def test_a_late_announcement_undoes_no_rollback(store: Path) -> None:
    runs = copy_registered(store, (1.0, 0.1), 2)
    assert rollback.main(["--store", str(store), "--to", "1"]) == 0
    assert promote.main([*runs[1], "--announced"]) == 0
    assert lines(store)[-1] == ("rollback", "1", "1")
    assert open_registry(Runtime(), str(store)).holder("champion") == "1"
    # A person may.
    assert promote.main(runs[1]) == 0
    assert lines(store)[-1] == ("promote", "2", "2")
