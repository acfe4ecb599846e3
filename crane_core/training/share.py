"""Choose the share of CRANE's scores beside those of LightGCN.

The paper adds the semantic view to the behavioural one without fitting their scales. Where content says little, that
loses a large part of the recall. Here a score is `(1 - s) e_u e_i + s z_u z_i`, where `e` are the rows of LightGCN,
trained alone, and `z` those of CRANE, scaled to the same spread. The share `s` is chosen on the validation split: at 0
the model is LightGCN, at 1 CRANE alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from crane_core.dataset.interactions import Interactions
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users, users_at_a_time
from crane_core.model.views import Rows
from crane_core.model_config import ModelConfig
from crane_core.training.channels import score_spread

SHARES = tuple(tenth / 10 for tenth in range(11))


@dataclass(frozen=True)
class ChosenShare:
    """The chosen share.

    Attributes:
        share: `s`.
        recall: validation Recall@20 at that share.
        curve: (share, validation Recall@20) of every share tried.
        rows: users float32 [num_users, d_e + d_z] and items float32 [num_items, d_e + d_z] to score by.
    """

    share: float
    recall: float
    curve: list[tuple[float, float]]
    rows: Rows


def choose_share(behaviour: Rows, crane: Rows, interactions: Interactions, config: ModelConfig) -> ChosenShare:
    """Choose the share that ranks the validation items best.

    One split cannot distinguish shares whose Recall@20 differs by less than chance. Among the shares within one
    standard error of the best, over users, the one with the best NDCG@20 is chosen, and the smallest of equal ones.

    With `config.choices` the share is theirs, and nothing is measured: `recall` is 0 and `curve` is empty.

    Args:
        behaviour: rows of the behavioural view.
        crane: CRANE's rows.
        interactions: training items are masked, validation items are looked for.
        config: size of the validation sample.
    """
    if config.choices is not None:
        share = config.choices.share
        return ChosenShare(share, 0.0, [], rows_at(share, behaviour, crane))
    users = interactions.validation_users(config.train.validation_users, config.train.seed)
    if len(users) == 0:
        return ChosenShare(0.0, 0.0, [(0.0, 0.0)], behaviour)
    block = users_at_a_time(interactions.num_items)
    recalls, ndcgs = [], []
    for share in SHARES:
        ranked = rank_users(dot_product(*rows_at(share, behaviour, crane)), interactions.train, users, 20, block)
        metrics = user_metrics(ranked, interactions.validation, users, (20,))
        recalls.append(metrics["recall@20"])
        ndcgs.append(metrics["ndcg@20"].mean())
    best = max(recalls, key=np.mean)
    near = [index for index, recall in enumerate(recalls) if _indistinct(best - recall)]
    chosen = max(near, key=lambda index: (ndcgs[index], -index))
    share = SHARES[chosen]
    curve = [(each, float(recall.mean())) for each, recall in zip(SHARES, recalls, strict=True)]
    return ChosenShare(share, curve[chosen][1], curve, rows_at(share, behaviour, crane))


def rows_at(share: float, behaviour: Rows, crane: Rows) -> Rows:
    """Return the rows to score by at a share; see `choose_share`."""
    return fuse(behaviour, crane, share) if share else behaviour


def _indistinct(lead: np.ndarray) -> bool:
    """Return whether the mean of a lead, float64 [num_users], is within one standard error of 0."""
    return bool(lead.mean() <= lead.std() / len(lead) ** 0.5)


def fuse(behaviour: Rows, crane: Rows, share: float) -> Rows:
    """Return rows whose dot products are `(1 - share) e_u e_i + share z_u z_i`, both of the spread of the first.

    The spread of a model is the standard deviation of its scores over all users and items.
    """
    spread = score_spread(*behaviour) / max(score_spread(*crane), 1e-12)
    parts = ((behaviour, (1 - share) ** 0.5), (crane, (share * spread) ** 0.5))
    users, items = (torch.cat([factor * rows[side] for rows, factor in parts if factor], dim=1) for side in (0, 1))
    return users, items
