"""How far CRANE's rows are trusted beside the behavioural view.

The paper adds the semantic view to the behavioural one and leaves their scales to chance, which loses a large part
of the recall where content says little. Here LightGCN's rows `e`, trained alone, and CRANE's rows `z` stand beside
each other, `[e, w z]`: a score is `e_u e_i + w^2 z_u z_i` once both have the same spread. The weight `w` is chosen on
the validation split, and `w = 0` is one of the choices: then the model is LightGCN itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crane_core.config import Train
from crane_core.dataset import Interactions
from crane_core.evaluation import dot_product, rank_users, user_metrics

Rows = tuple[Tensor, Tensor]
"""Users float32 [num_users, d] and items float32 [num_items, d]."""

WEIGHTS = (0.0, 0.25, 0.35, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 2.0, 2.8, 4.0)


@dataclass(frozen=True)
class Trust:
    """The chosen weight.

    Attributes:
        weight: `w`.
        recall: validation Recall@20 at that weight.
        curve: (weight, validation Recall@20) of every weight tried.
    """

    weight: float
    recall: float
    curve: list[tuple[float, float]]


def choose_trust(behaviour: Rows, crane: Rows, interactions: Interactions, config: Train) -> Trust:
    """The weight with the best validation Recall@20, the smallest such weight when several tie.

    Args:
        behaviour: rows of the behavioural view.
        crane: CRANE's rows.
        interactions: training items are masked, validation items are looked for.
        config: size of the validation sample.
    """
    users = interactions.validation_users(config.validation_users, config.seed)
    if len(users) == 0:
        return Trust(0.0, 0.0, [(0.0, 0.0)])
    curve = []
    for weight in WEIGHTS:
        ranked = rank_users(dot_product(*fuse(behaviour, crane, weight)), interactions.train, users, 20)
        recalls = user_metrics(ranked, interactions.validation, users, (20,))["recall@20"]
        curve.append((weight, float(recalls.mean())))
    weight, recall = max(curve, key=lambda entry: (entry[1], -entry[0]))
    return Trust(weight, recall, curve)


def fuse(behaviour: Rows, crane: Rows, weight: float) -> Rows:
    """`[e, w z]` for users and items: float32 [n, d_e + d_z], or `e` alone at weight 0.

    The spread of the scores, their standard deviation over all users and items, is brought to that of `e` first.
    """
    if weight == 0:
        return behaviour
    scale = weight * (score_spread(*behaviour) / max(score_spread(*crane), 1e-12)) ** 0.5
    users, items = (torch.cat([left, scale * right], dim=1) for left, right in zip(behaviour, crane, strict=True))
    return users, items


def score_spread(users: Tensor, items: Tensor) -> float:
    """Standard deviation of all scores `users @ items.T`, from their d x d moments: no score is computed."""
    mean = float(users.double().mean(0) @ items.double().mean(0))
    second = [rows.double().T @ rows.double() / len(rows) for rows in (users, items)]
    return max(float((second[0] * second[1]).sum()) - mean**2, 0.0) ** 0.5
