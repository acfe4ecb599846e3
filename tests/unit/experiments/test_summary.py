"""Tables and answers: means over seeds, paired differences, and what is called chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import rank_users
from crane_core.experiments.data import Dataset
from crane_core.experiments.models import MODELS, Recipe, Trained
from crane_core.experiments.report import render
from crane_core.experiments.summary import Measured, answer, by_diversity, finite, rows
from crane_core.experiments.trials import Trial
from tests.worlds.experiments import random_scores, study


def trial(test: np.ndarray, validation: float = 0.5) -> Trial:
    """A trial with one test metric per user."""

    def table(values: np.ndarray) -> dict[str, np.ndarray]:
        return {"users": np.arange(len(values)), "recall@20": values, "ndcg@20": values / 2}

    return Trial("", table(np.full(10, validation)), table(test), table(np.empty(0)), validation, 1.0, 1, {})


class TestSummary:
    def test_crane_alone_stands_beside_the_fused_model(
        self, dataset: Dataset, tmp_path: Path, monkeypatch, no_drawing: None
    ) -> None:
        def train(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
            seed = recipe.train.seed
            return Trained(random_scores(dataset, seed), 0.5, 1.0, {}, random_scores(dataset, 10 + seed))

        monkeypatch.setitem(MODELS, "crane", train)
        results = study(dataset, tmp_path, seeds=(0, 1)).run(["profiles"], 0)
        row = results["experiments"]["profiles"]["table"][0]
        users, expected = np.arange(40), []
        for seed in (10, 11):
            ranked = rank_users(random_scores(dataset, seed), dataset.interactions.train, users, 20)
            expected.append(user_metrics(ranked, dataset.interactions.test, users, (20,))["ndcg@20"].mean())
        assert row["test_alone"]["ndcg@20"]["mean"] == pytest.approx(np.mean(expected))
        assert f"{np.mean(expected):.4f}" in render(results | {"seconds": 1.0})
        for path in tmp_path.glob("cells/*/users.npz"):
            with np.load(path) as arrays:
                kept = {name: values for name, values in arrays.items() if not name.startswith("alone")}
            np.savez(path, **kept)
        earlier = study(dataset, tmp_path, seeds=(0, 1)).run(["profiles"], 0)
        assert earlier["experiments"]["profiles"]["table"][0] == row | {"test_alone": None}
        assert f"{np.mean(expected):.4f}" not in render(earlier | {"seconds": 1.0})

    def test_means_over_seeds_and_paired_differences(self) -> None:
        base = np.random.default_rng(0).random(200)
        default = Measured("d", True, {0: trial(base), 1: trial(base + 0.2)}, [])
        better = Measured("b", False, {0: trial(base + 0.1, 0.6), 1: trial(base + 0.3, 0.6)}, [])
        table = rows([default, better])
        assert table[0]["test"]["recall@20"]["mean"] == pytest.approx(base.mean() + 0.1)
        assert table[0]["by_seed"] == pytest.approx([base.mean(), base.mean() + 0.2])
        gain = table[1]["difference"]["recall@20"]
        assert (gain["mean"], gain["low"], gain["high"]) == pytest.approx((0.1, 0.1, 0.1))
        assert answer(table) == (
            "Validation prefers b (+0.1000 Recall@20 against the default); on test it differs by +0.1000 [+0.1000, "
            "+0.1000], better by more than chance. By more than chance in test Recall@20, better than the default: b."
        )

    def test_a_difference_is_over_shared_seeds(self) -> None:
        base = np.full(50, 0.5)
        default = Measured("d", True, {0: trial(base), 1: trial(base + 0.4)}, [])
        partial = Measured("p", False, {0: trial(base - 0.1)}, [1])
        table = rows([default, partial])
        assert table[1]["difference"]["recall@20"]["mean"] == pytest.approx(-0.1)
        assert table[1]["missing"] == [1] and "worse than the default: p" in answer(table)

    def test_chance_is_said_to_be_chance(self) -> None:
        generator = np.random.default_rng(0)
        variants = [Measured(str(i), i == 0, {0: trial(generator.random(300), 0.5)}, []) for i in range(3)]
        text = answer(rows(variants))
        assert text == (
            "Validation prefers the default, 0. No variant differs from the default by more than chance in test "
            "Recall@20. The intervals cover variation between users only. One seed cannot show variation between "
            "trainings."
        )

    def test_without_the_default_there_is_no_answer(self) -> None:
        table = rows([Measured("d", True, {}, [0]), Measured("b", False, {0: trial(np.ones(5))}, [])])
        assert answer(table) == "No answer yet: 1 of 2 variants are measured." and table[1]["difference"] is None

    def test_thirds_by_diversity(self) -> None:
        entropy = np.array([0.0, 0.1, 0.5, 0.6, 1.0, 1.1, np.nan])
        default = Measured("sum", True, {0: trial(np.zeros(7))}, [])
        mean = Measured("mean", False, {0: trial(np.array([0, 0, 0, 0, 1.0, 1.0, 1.0]))}, [])
        table = by_diversity([default, mean], entropy, np.arange(7))
        assert [third["users"] for third in table] == [2, 2, 2]
        assert [third["differences"]["mean"]["recall@20"]["mean"] for third in table] == [0, 0, 1]
        assert [third["median_items"] for third in table] == [0.5, 2.5, 4.5]

    def test_json_has_no_nan(self) -> None:
        assert finite({"a": [float("nan"), 1.0, (float("inf"),)]}) == {"a": [None, 1.0, [None]]}
