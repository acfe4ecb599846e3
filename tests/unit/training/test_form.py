"""Which form of the score is taken."""

from __future__ import annotations

import numpy as np

from crane_core.training.channels import PROFILE, RECENT
from crane_core.training.form import Form, Judged, best_form


def judged(recall: list[float], ndcg: list[float], loss: float = 1.0) -> Judged:
    return Judged(np.array(recall), np.array(ndcg), np.full(len(recall), loss))


def test_the_simple_form_with_the_best_lists_is_taken_and_of_equal_ones_the_first() -> None:
    popularity, recent = Form(()), Form((RECENT,))
    simple = {popularity: judged([0.2, 0.2], [0.1, 0.1]), recent: judged([0.2, 0.22], [0.1, 0.1])}
    assert best_form(simple, {}, has_times=True) == recent
    simple[recent] = simple[popularity]
    assert best_form(simple, {}, has_times=True) == popularity


def test_a_form_by_evidence_needs_better_lists_beside_times_and_likelier_items_without() -> None:
    simple, rich = Form((RECENT,)), Form((RECENT, PROFILE), by_evidence=True)
    before = {simple: judged([0.2, 0.2, 0.2], [0.1, 0.1, 0.1])}
    likelier = {rich: judged([0.2, 0.2, 0.2], [0.1, 0.1, 0.1], loss=0.5)}
    better = {rich: judged([0.3, 0.3, 0.3], [0.1, 0.1, 0.1])}
    assert best_form(before, likelier, has_times=True) == simple
    assert best_form(before, likelier, has_times=False) == rich
    assert best_form(before, better, has_times=True) == rich
    assert best_form(before, better, has_times=False) == simple
