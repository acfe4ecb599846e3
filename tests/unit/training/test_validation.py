"""Validation chooses the epoch and the ranking, and the test split decides nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # Adam imports it at its first use: here, before the processes that are killed are forked.

from crane_core.dataset.interactions import ItemLists
from crane_core.errors import TrainingError
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users
from crane_core.model.crane import Crane
from crane_core.model.views import Rows
from crane_core.training.validation import STEERING_METRIC
from tests.worlds.planted import checkerboard
from tests.worlds.settings import changed
from tests.worlds.trainings import SMALL, Kind, both_kinds, trainer


@pytest.mark.parametrize("patience", [1, 3])
def test_as_many_epochs_as_patience_follow_the_best(
    patience: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recalls = [0.1, 0.3, *[0.3] * 8]
    ours = trainer(tmp_path, config=changed(SMALL, num_epochs=10, patience=patience))
    monkeypatch.setattr(
        ours.validation, "best", lambda rankings: ("cosine", {STEERING_METRIC: recalls[ours.progress.epoch]})
    )
    result = ours.run()
    assert (result["best_epoch"], result["num_epochs"]) == (1, 2 + patience)


@both_kinds
def test_the_test_split_decides_nothing(tmp_path: Path, kind: Kind) -> None:
    interactions = checkerboard()
    # Another user's items: were they looked for, nothing would be found.
    test = dataclasses.replace(interactions.test, items=(interactions.test.items + 16) % 32)
    other = dataclasses.replace(interactions, test=test)
    config = changed(SMALL, num_epochs=3)
    curves = []
    for name, each in (("one", interactions), ("other", other)):
        ours = trainer(tmp_path / name, each, config, kind)
        ours.run()
        curves.append(ours.progress.curve)
    assert curves[0] == curves[1]


def test_the_ranking_that_validation_prefers_is_the_one_of_the_best_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rankings = Crane.rankings

    def with_a_bad_one_first(self: Crane, *arguments: object) -> dict[str, Rows]:
        users, items = rankings(self, *arguments)["length^0.5"]  # type: ignore[arg-type]
        return {"worst": (users, -items), "right": (users, items), "bad": (users, -items)}

    monkeypatch.setattr(Crane, "rankings", with_a_bad_one_first)
    for _ in range(2):  # Trained, and read back.
        ours = trainer(tmp_path, kind="crane")
        result = ours.run()
        rows = ours.best_rows()
        assert result["best_ranking"] == "right"
        assert result["best_epoch"] < result["num_epochs"] - 1, "the last weights are the best"
        fresh = trainer(tmp_path / "fresh", kind="crane")
        fresh.model.load_state_dict(ours.best_weights())
        assert all(map(torch.equal, rows, fresh.rankings()["right"]))
        held_out, users = ours.interactions.validation, np.arange(40)
        ranked = rank_users(dot_product(*rows), ours.interactions.train, users, 20)
        recall = user_metrics(ranked, held_out, users, (20,))["recall@20"].mean()
        assert (
            recall
            == pytest.approx(result["validation"]["recall@20"])
            == max(entry["recall@20"] for entry in ours.progress.curve)
        )


def test_without_validation_items_no_epoch_can_be_chosen(tmp_path: Path) -> None:
    interactions = dataclasses.replace(
        checkerboard(), validation=ItemLists(np.zeros(41, np.int64), np.empty(0, np.int32))
    )
    with pytest.raises(TrainingError, match=r"None of the 40 users has a validation item.*validation_days"):
        trainer(tmp_path, interactions).run()
