"""Trials: made once, found again, never served for other data, and made again when damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crane_core.errors import ConfigError
from crane_core.experiments import models
from crane_core.experiments.data import Dataset
from crane_core.experiments.models import Recipe, train_crane
from crane_core.experiments.plans import changed
from crane_core.experiments.trials import PeakMemory, Trials
from crane_core.model.lightgcn import LightGCN
from crane_core.training.trainer import Hooks, Trainer
from tests.worlds.experiments import RECIPE, random_scores


class TestTrials:
    def test_it_is_made_once_and_found_again(self, dataset: Dataset, tmp_path: Path, trainings: list) -> None:
        made = Trials(tmp_path).find_or_make(dataset, "crane", RECIPE, 3)
        found = Trials(tmp_path).find_or_make(dataset, "crane", RECIPE, 3)
        assert len(trainings) == 1 and trainings[0][1] == RECIPE.with_seed(3)
        assert found.key == made.key and (found.seconds, found.facts) == (1.25, {"content_seconds": 0.25})
        assert found.steering == 0.5
        assert list(found.test) == ["users", *(f"{kind}@{k}" for k in (5, 10, 20, 50) for kind in ("recall", "ndcg"))]
        assert np.array_equal(found.test["users"], np.arange(40))
        for name, values in made.test.items():
            assert np.array_equal(values, found.test[name])
        assert len(made.cold["users"]) == len(made.cold["cold_auc"]) == 0
        assert sorted(made.more) == ["head_items", "tail_items"] and made.part("alone") is None
        assert not list((tmp_path / "work").glob("[!.]*"))

    def test_cold_items_are_measured_apart(self, dataset: Dataset, tmp_path: Path, trainings: list) -> None:
        interactions = dataset.interactions
        train = interactions.train.where(~np.isin(interactions.train.items, (0, 1, 2)))
        colder = replace(dataset, interactions=replace(interactions, train=train))
        made = Trials(tmp_path).find_or_make(colder, "crane", RECIPE, 3)
        users = np.flatnonzero([np.isin(interactions.test.rows(np.array([u]))[1], (0, 1, 2)).any() for u in range(40)])
        assert np.array_equal(made.cold["users"], users) and len(users) > 0
        scores, tests = random_scores(colder, 3)(np.arange(40)), interactions.test.items
        assert (made.cold["among_cold_recall@20"] == 1).all(), "there are three"
        for user, auc, recall in zip(users, made.cold["cold_auc"], made.cold["recall@20"], strict=True):
            own = scores[user, tests[user]]
            assert auc == np.mean([float(own > scores[user, other]) for other in {0, 1, 2} - {tests[user]}])
            assert recall == made.test["recall@20"][user], "the only item of the user's test is cold"

    def test_nothing_stale_is_served(self, dataset: Dataset, tmp_path: Path, trainings: list, monkeypatch) -> None:
        trials = Trials(tmp_path)
        trials.find_or_make(dataset, "crane", RECIPE, 0)
        features = dataset.features | {"noise": dataset.features["noise"] + np.float32(1e-6)}
        interactions = dataset.interactions
        dropped = interactions.train.where(np.arange(len(interactions.train.items)) > 0)
        others: list[tuple[Dataset, str, Recipe, int]] = [
            (replace(dataset, features=features), "crane", RECIPE, 0),
            (
                replace(dataset, features={"renamed" if n == "noise" else n: m for n, m in dataset.features.items()}),
                "crane",
                RECIPE,
                0,
            ),
            (replace(dataset, interactions=replace(interactions, train=dropped)), "crane", RECIPE, 0),
            (dataset.without_test(), "crane", RECIPE, 0),
            (dataset, "crane", changed(RECIPE, {"knn.k": 11}), 0),
            (dataset, "crane", RECIPE, 1),
            (dataset, "lightgcn", RECIPE, 0),
        ]
        for other in others:
            assert trials.find(*other) is None
        assert trials.find(replace(dataset, name="moved"), "crane", RECIPE, 0), "the name is no content"
        monkeypatch.setattr(models, "VERSION", models.VERSION + 1)
        assert trials.find(dataset, "crane", RECIPE, 0) is None

    def test_a_contrast_of_both_kinds_has_a_version_of_its_own(self, dataset, tmp_path, monkeypatch) -> None:
        both, trials = changed(RECIPE, {"crane.contrast_negatives": "both_kinds"}), Trials(tmp_path)
        now = [trials.key(dataset, "crane", recipe, 0) for recipe in (RECIPE, both)]
        monkeypatch.setattr("crane_core.experiments.trials.version_of", lambda _: models.VERSION)
        before = [trials.key(dataset, "crane", recipe, 0) for recipe in (RECIPE, both)]
        assert now[0] == before[0] and now[1] != before[1]

    @pytest.mark.parametrize("name", ["users.npz", "cell.json"])
    def test_a_damaged_cell_is_named_and_made_again(
        self, dataset: Dataset, tmp_path: Path, trainings: list, caplog, name: str
    ) -> None:
        trials = Trials(tmp_path)
        trial = trials.find_or_make(dataset, "crane", RECIPE, 0)
        path = tmp_path / "cells" / trial.key / name
        whole = path.read_bytes()
        middle = len(whole) // 2
        for number, damaged in enumerate((b"", whole[:100], whole[:middle] + bytes(64) + whole[middle + 64 :], b"[]")):
            path.write_bytes(damaged)
            caplog.clear()
            assert trials.find(dataset, "crane", RECIPE, 0) is None
            assert f"damaged trial={path.parent}" in caplog.text
            again = trials.find_or_make(dataset, "crane", RECIPE, 0)
            assert len(trainings) == 2 + number and np.array_equal(again.test["recall@20"], trial.test["recall@20"])

    def test_an_unknown_model_is_refused(self, dataset: Dataset, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="crane, crane_joint, lightgcn"):
            Trials(tmp_path).find_or_make(dataset, "oracle", RECIPE, 0)

    def test_view_and_content_are_made_once(self, dataset: Dataset, tmp_path: Path, monkeypatch) -> None:
        epochs: list[str] = []

        def watched(model: LightGCN, *arguments: Any) -> Trainer:
            return Trainer(model, *arguments, hooks=Hooks(watch=lambda _: epochs.append(type(model).__name__)))

        monkeypatch.setattr(models, "Trainer", watched)
        prepared: list[Recipe] = []
        prepare = models.prepare_content
        monkeypatch.setattr(models, "prepare_content", lambda d, recipe: prepared.append(recipe) or prepare(d, recipe))
        trials = Trials(tmp_path)
        first = trials.find_or_make(dataset, "crane", RECIPE, 0)
        assert len(prepared) == 1
        trials.find_or_make(dataset, "crane", changed(RECIPE, {"crane.contrast_weight": 0.1}), 0)
        assert len(prepared) == 1, "the content does not depend on the training"
        trials.find_or_make(dataset.without_test(), "lightgcn", RECIPE, 0)
        assert epochs == ["LightGCN"] * 2 + ["Crane"] * 4
        trials.find_or_make(dataset, "crane", changed(RECIPE, {"train.learning_rate": 0.1, "knn.k": 3}), 0)
        assert len(prepared) == 2
        assert epochs[6:] == ["LightGCN"] * 2 + ["Crane"] * 2
        alone = train_crane(dataset, RECIPE.with_seed(0), tmp_path / "elsewhere" / "work")
        assert alone.validation == first.steering, "found or made, they are the same bit for bit"

    def test_memory_is_that_of_the_work(self) -> None:
        before = PeakMemory()
        held = np.ones(40_000_000, dtype=np.uint8)
        del held
        assert before.peak() >= 35_000_000
        assert PeakMemory().peak() < 20_000_000
