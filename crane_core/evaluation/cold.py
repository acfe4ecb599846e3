"""Measure how cold items, those without a training interaction, are ranked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from crane_core.dataset.interactions import Interactions
from crane_core.evaluation.ranking import Scorer
from crane_core.evaluation.slices import slices_of_test
from crane_core.numerics.bootstrap import bootstrap

_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


def rank_cold(score: Scorer, interactions: Interactions, users: np.ndarray, block: int = 1024) -> dict[str, np.ndarray]:
    """How the cold items of each user's test are ranked among the cold items alone.

    Against the whole catalog a cold item competes with items whose popularity is known, and a short list shows it
    rarely. `among_cold_recall@20` is the user's Recall@20 with the cold items as the only candidates; of items that tie
    about the end of the list, each has the same part of the places left, so that a model that knows nothing of them
    all is at chance. `cold_auc` is, over the user's cold test items, the mean share of the cold items outside the
    user's test that score less, ties counting half: the area under the ROC curve, 0.5 by chance.

    Args:
        score: what to rank by.
        interactions: an item without a training interaction is cold.
        users: int [n], whom to rank for, each with a cold test item.
        block: users at a time; `block * num_items` scores are in memory at once.

    Returns:
        `among_cold_recall@20` and `cold_auc`, float64 [n] each; the latter NaN for a user whose test holds every cold
        item.
    """
    cold = interactions.cold_items()
    column = np.full(interactions.num_items, -1)
    column[cold] = np.arange(len(cold))
    found = {name: np.empty(len(users)) for name in ("among_cold_recall@20", "cold_auc")}
    for start in range(0, len(users), block):
        chunk = users[start : start + block]
        scores = score(chunk)[:, torch.from_numpy(cold)].cpu()
        rows, items = interactions.test.rows(chunk)
        rows, columns = rows[column[items] >= 0], column[items][column[items] >= 0]
        others = scores.clone()
        others[torch.from_numpy(rows), torch.from_numpy(columns)] = torch.inf
        own = np.bincount(rows, minlength=len(chunk))
        # Of the sorted, as many score less as stand left of the item, and as many tie as stand between its two places.
        (left, right), (first, last) = (
            [torch.searchsorted(ranked, scores, side=side).numpy()[rows, columns] for side in _SIDES]
            for ranked in (others.sort(dim=1).values, scores.sort(dim=1).values)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            values = {
                "among_cold_recall@20": np.clip((20 - len(cold) + last) / (last - first), 0, 1),
                "cold_auc": (left + right) / 2 / (len(cold) - own)[rows],
            }
        for name, of_items in values.items():
            found[name][start : start + len(chunk)] = np.bincount(rows, weights=of_items, minlength=len(chunk)) / own
    return found


def summarise_cold(
    interactions: Interactions, per_user: Mapping[str, Mapping[str, np.ndarray]], num_resamples: int, seed: int
) -> dict[str, Any] | None:
    """What every model makes of test items without a training interaction, beside chance.

    Args:
        interactions: of the dataset.
        per_user: model to `recall@20` of the cold test items in the full catalog and what `rank_cold` returns, float64
            [n] each, of the users with a cold test item, ascending. `among_cold_recall@20` may be absent.
        num_resamples, seed: of the bootstrap over users.

    Returns:
        JSON values: `items` that are cold; `rows` and `users` of the test that hold one; `models`, an interval of
        `recall@20` each, and `chance`, that of a random list of 20 unseen items; `among_cold`, the same of
        `among_cold_recall@20` and a random list of 20 cold items, for the models that have it; `cold_auc` with the
        `users` it could be told for, `models` and `chance`, None when there are none. None where there is no cold test
        item.
    """
    cold = slices_of_test(interactions)["cold_items"]
    users = np.flatnonzero(cold.counts() > 0)
    if not len(users):
        return None

    def intervals(metric: str, kept: np.ndarray) -> dict[str, dict[str, float]]:
        values = {name: columns[metric][kept] for name, columns in per_user.items() if metric in columns}
        if not values:
            return {}
        return {name: found.as_dict() for name, found in bootstrap(values, num_resamples, seed).items()}

    compared = np.logical_and.reduce([np.isfinite(columns["cold_auc"]) for columns in per_user.values()])
    everyone = np.ones(len(users), dtype=bool)
    unseen = interactions.num_items - len(interactions.gone) - interactions.train.counts()[users]
    num_cold = len(interactions.cold_items())
    told = {"users": int(compared.sum()), "chance": 0.5, "models": intervals("cold_auc", compared)}
    return {
        "items": num_cold,
        "rows": len(cold.items),
        "users": len(users),
        "chance": float(np.minimum(20 / unseen, 1).mean()),
        "models": intervals("recall@20", everyone),
        "among_cold": {"chance": min(20 / num_cold, 1.0), "models": intervals("among_cold_recall@20", everyone)},
        "cold_auc": told if compared.any() else None,
    }
