"""Recall, NDCG, coverage and popularity bias by hand."""

import math

import numpy as np
import pytest

from crane_core.dataset.interactions import ItemLists
from crane_core.evaluation.metrics import coverage, popularity_bias, user_metrics
from tests.worlds.planted import item_lists


def test_metrics_by_hand() -> None:
    ranked = np.array([[4, 1, 2], [0, 3, -1]], dtype=np.int32)
    metrics = user_metrics(ranked, item_lists([1, 2, 9], [3]), np.array([0, 1]), (1, 3))
    assert metrics["recall@1"].tolist() == [0, 0]
    assert metrics["recall@3"].tolist() == pytest.approx([2 / 3, 1])
    best = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert metrics["ndcg@3"].tolist() == pytest.approx([(1 / math.log2(3) + 1 / math.log2(4)) / best, 1 / math.log2(3)])


def test_the_best_list_is_no_longer_than_the_cut_off() -> None:
    relevant = ItemLists.from_pairs(np.zeros(4, dtype=np.int64), np.array([1, 2, 3, 4], dtype=np.int32), 1)
    metrics = user_metrics(np.array([[1, 9, 2, 3, 4]], dtype=np.int32), relevant, np.array([0]), (2, 5))
    assert metrics["recall@2"].tolist() == [1 / 4] and metrics["recall@5"].tolist() == [1.0]
    discounts = 1 / np.log2(np.arange(2, 7))
    assert metrics["ndcg@2"][0] == pytest.approx(discounts[0] / discounts[:2].sum())
    assert metrics["ndcg@5"][0] == pytest.approx(discounts[[0, 2, 3, 4]].sum() / discounts[:4].sum())


def test_coverage_and_popularity_bias_by_hand() -> None:
    train = item_lists([0, 1], [0])
    ranked = np.array([[0, 2], [0, -1]])
    assert coverage(ranked, 4) == 0.5
    # Item counts 2, 1, 0, 0: own means 1.5 and 2; recommended means 1 and 2.
    assert popularity_bias(ranked, np.array([0, 1]), train, 4) == pytest.approx(1.5 / 1.75)
