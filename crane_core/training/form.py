"""The forms that the score of the head may have, and which of them is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from crane_core.training.channels import GENERATED, MODEL, PROFILE, RECENT


@dataclass(frozen=True)
class Form:
    """A form of the score.

    Attributes:
        channels: that warm items have beside the popularity.
        by_evidence: whether the weights differ by bucket; otherwise all warm items share them.
    """

    channels: tuple[str, ...]
    by_evidence: bool = False

    @property
    def name(self) -> str:
        """Its name in reports."""
        return "+".join(self.channels or ("popularity",)) + (" by evidence" if self.by_evidence else "")


MOMENT = (Form(()), Form((RECENT,)), Form((MODEL, RECENT)))
MOMENT_BY_EVIDENCE = (Form((RECENT, PROFILE), True), Form((MODEL, RECENT, PROFILE, GENERATED), True))
TIMELESS = (Form((MODEL,)),)
TIMELESS_BY_EVIDENCE = (Form((MODEL,), True), Form((MODEL, PROFILE, GENERATED), True))


@dataclass(frozen=True)
class Judged:
    """How a form did on users that its weights were not fitted on.

    Attributes:
        recall: Recall@20 of every user, float64.
        ndcg: NDCG@20 of every user, float64.
        losses: negative logarithm of the likelihood of every validation interaction of a sample of the users, float32.
    """

    recall: np.ndarray
    ndcg: np.ndarray
    losses: np.ndarray

    @property
    def quality(self) -> np.ndarray:
        """Mean of Recall@20 and NDCG@20 of every user: what is found, and how far up."""
        return (self.recall + self.ndcg) / 2

    def is_likelier_than(self, other: Judged) -> bool:
        """Return whether interactions are likelier by more than a standard error, and lists no worse.

        Likelihood tells forms apart that lists cannot: it counts every interaction, not only those in a short list.
        """
        return _exceeds_chance(other.losses - self.losses) and bool(self.quality.mean() >= other.quality.mean())

    def is_better_than(self, other: Judged) -> bool:
        """Return whether lists are better by more than a standard error."""
        return _exceeds_chance(self.quality - other.quality)


def _exceeds_chance(gain: np.ndarray) -> bool:
    """Return whether the mean of a gain is above one standard error."""
    return bool(gain.mean() > gain.std() / len(gain) ** 0.5)


def best_form(simple: Mapping[Form, Judged], by_evidence: Mapping[Form, Judged], has_times: bool) -> Form:
    """Return the form to take, by the rule of `choose_head`; the first simple form is the one of before."""
    best, held = max(simple.items(), key=lambda item: item[1].quality.mean())
    # Beside the popularity of the moment, rows have been likelier and lists worse: there the lists decide.
    gains = Judged.is_better_than if has_times else Judged.is_likelier_than
    for form, found in by_evidence.items():
        if gains(found, held):
            best, held = form, found
    return best
