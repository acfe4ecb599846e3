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
    """Rank the cold test items of each user among the cold items alone.

    In a ranking of the whole catalog, cold items compete with items of known popularity and rarely reach a short list.

    `among_cold_recall@20` is Recall@20 with the cold items as the only candidates. Items with equal scores at the end
    of the list share its remaining places equally, so that equal scores for all items give the recall of chance.

    `cold_auc` is the area under the ROC curve: for each cold test item, the share of the cold items outside the user's
    test items that score less, where ties count half; then the mean over the user's cold test items. Chance is 0.5.

    Args:
        score: scores to rank by.
        interactions: an item without a training interaction is cold.
        users: int [n], the users to rank for, each with a cold test item.
        block: users at a time; `block * num_items` scores are in memory at once.

    Returns:
        `among_cold_recall@20` and `cold_auc`, float64 [n] each. The latter is NaN for a user whose test items include
        every cold item.
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
        # In a sorted row, the left position of a score counts the lower scores; right minus left counts the equal ones.
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
    """Compare models on cold test items, with chance beside them.

    Args:
        interactions: interactions of the dataset.
        per_user: model to its values for the users with a cold test item, ascending, float64 [n] each: `recall@20` of
            the cold test items in the full catalog, and the values of `rank_cold`. Of those, `among_cold_recall@20`
            may be absent.
        num_resamples, seed: number of resamples and seed of the bootstrap over users.

    Returns:
        None if there is no cold test item, else JSON values:
            `items`: number of cold items;
            `rows`, `users`: test interactions with a cold item, and their users;
            `models`, `chance`: interval of `recall@20` of each model, and its value for random lists of unseen items;
            `among_cold`: `models` and `chance` of `among_cold_recall@20`, for the models that have it;
            `cold_auc`: `users` for whom every model has a value, `models` and `chance`; None without such users.
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
    unseen = interactions.num_items - len(interactions.tombstones) - interactions.train.counts()[users]
    num_cold = len(interactions.cold_items())
    auc = {"users": int(compared.sum()), "chance": 0.5, "models": intervals("cold_auc", compared)}
    return {
        "items": num_cold,
        "rows": len(cold.items),
        "users": len(users),
        "chance": float(np.minimum(20 / unseen, 1).mean()),
        "models": intervals("recall@20", everyone),
        "among_cold": {"chance": min(20 / num_cold, 1.0), "models": intervals("among_cold_recall@20", everyone)},
        "cold_auc": auc if compared.any() else None,
    }
