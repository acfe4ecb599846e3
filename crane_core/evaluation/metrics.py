"""Full-catalog ranking, ranking metrics per user, and bootstrap intervals."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.numerics.top_k import top_k
from crane_core.progress import track
from crane_core.refine.recursion import cluster

logger = logging.getLogger(__name__)

CONFIDENCE = 0.95
SCORE_BYTES = 256 * 1024 * 1024
"""Scores in memory at a time, where nothing else is said: for a catalog of 300,000 items still 223 users at once."""
_NUM_CLUSTERS = 20
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


@dataclass(frozen=True)
class Interval:
    """A mean over users and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def users_at_a_time(num_items: int) -> int:
    """As many users as have their scores of the catalog in `SCORE_BYTES`, 1024 at most."""
    return max(1, min(1024, SCORE_BYTES // (4 * num_items)))


Scorer = Callable[[np.ndarray], Tensor]
"""Users int [b] to their scores of the whole catalog, float32 [b, num_items]; the caller may overwrite them, and the
scorer may at the next call."""


def without(score: Scorer, items: np.ndarray) -> Scorer:
    """The same scores, -inf for some items, int [n]: they are recommended to nobody."""
    if len(items) == 0:
        return score
    return lambda users: (scores := score(users)).index_fill_(1, torch.from_numpy(items).to(scores.device), -torch.inf)


def dot_product(users: Tensor, items: Tensor) -> Scorer:
    """Scores as dot products of rows: float32 [num_users, d] and [num_items, d]."""

    # Kept from call to call: a fresh block of scores costs more to page in than to compute.
    block = users.new_empty(0)

    def score(picked: np.ndarray) -> Tensor:
        nonlocal block
        rows = users[torch.from_numpy(picked.astype(np.int64)).to(users.device)]
        if len(block) < len(picked):
            block = rows.new_empty(len(picked), len(items))
        return torch.mm(rows, items.T, out=block[: len(picked)])

    return score


def rank_blocks(
    score: Scorer, seen: ItemLists, users: np.ndarray, k: int, block: int
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Rank the whole catalog for some users, a block of users at a time, on the device of the scores.

    Args:
        score: what to rank by.
        seen: items a user must not be recommended.
        users: int [n], whom to rank for.
        k: list length; the catalog's size where that is smaller.
        block: users at a time; `block * num_items` scores are in memory at once.

    Yields:
        int [b] users; float32 [b, k] scores, -inf where fewer than k items are left; int64 [b, k] items.
    """
    blocks = [users[start : start + block] for start in range(0, len(users), block)]
    for chunk in track(blocks, len(blocks), "rank", logger):
        scores = score(chunk)
        rows, items = seen.rows(chunk)
        scores[torch.from_numpy(rows), torch.from_numpy(items.astype(np.int64))] = -torch.inf
        values, indices = top_k(scores, min(k, scores.shape[1]))
        yield chunk, values.cpu(), indices.cpu()


def rank_users(score: Scorer, seen: ItemLists, users: np.ndarray, k: int, block: int = 1024) -> np.ndarray:
    """The top k items of some users, int32 [n, k]; -1 where fewer than k items are left. See `rank_blocks`."""
    ranked = np.full((len(users), k), -1, dtype=np.int32)
    start = 0
    for chunk, values, indices in rank_blocks(score, seen, users, k, block):
        indices = torch.where(values > -torch.inf, indices, -1)
        ranked[start : start + len(chunk), : indices.shape[1]] = indices.numpy()
        start += len(chunk)
    return ranked


def user_metrics(
    ranked: np.ndarray, relevant: ItemLists, users: np.ndarray, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """Recall and NDCG of each user.

    `recall@k` is the share of the user's held-out items in the top k; `ndcg@k` has gain 1, discount
    `1 / log2(rank + 1)` and the best possible list of `min(k, held-out items)` as its unit.

    Args:
        ranked: int32 [n, >= max(ks)] items by falling score, -1 for no item.
        relevant: held-out items; every user of `users` has at least one.
        users: int [n].
        ks: cut-offs.

    Returns:
        `recall@k` and `ndcg@k`, each float64 [n].
    """
    rows, items = relevant.rows(users)
    stride = int(max(ranked.max(initial=0), items.max(initial=0))) + 2
    hits = np.isin(np.arange(len(users))[:, None] * stride + ranked, rows * stride + items) & (ranked >= 0)
    counts = np.bincount(rows, minlength=len(users))
    discounts = 1.0 / np.log2(np.arange(2, ranked.shape[1] + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])
    metrics = {}
    for k in ks:
        metrics[f"recall@{k}"] = hits[:, :k].sum(1) / counts
        metrics[f"ndcg@{k}"] = (hits[:, :k] * discounts[:k]).sum(1) / ideal[np.minimum(counts, min(k, len(discounts)))]
    return metrics


def bootstrap(values: Mapping[str, np.ndarray], num_resamples: int, seed: int) -> dict[str, Interval]:
    """Percentile bootstrap intervals of means over users; all columns share the resamples, so they are paired.

    Args:
        values: name to float [n]; n may be 0, which gives NaN.
        num_resamples: bootstrap resamples.
        seed: of the resampling.
    """
    table = np.stack([np.asarray(column, dtype=np.float64) for column in values.values()], axis=1)
    num_users = len(table)
    if num_users == 0:
        return {name: Interval(np.nan, np.nan, np.nan) for name in values}
    generator = np.random.default_rng(seed)
    means = np.empty((num_resamples, table.shape[1]))
    step = max(1, 4_000_000 // num_users)
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        picks = generator.integers(num_users, size=(size, num_users))
        offsets = np.arange(size)[:, None] * num_users
        weights = np.bincount((picks + offsets).ravel(), minlength=size * num_users).reshape(size, num_users)
        means[start : start + size] = weights @ table / num_users
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    center = table.mean(axis=0)
    return {name: Interval(float(center[i]), float(low[i]), float(high[i])) for i, name in enumerate(values)}


def paired_bootstrap(
    challenger: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], num_resamples: int, seed: int
) -> dict[str, Interval]:
    """Intervals of the mean difference challenger - reference over the same users, for every shared metric."""
    differences = {name: challenger[name] - reference[name] for name in challenger if name in reference}
    return bootstrap(differences, num_resamples, seed)


def coverage(ranked: np.ndarray, num_items: int, k: int = 20) -> float:
    """Share of the catalog that appears in at least one top-k list."""
    top = ranked[:, :k]
    return len(np.unique(top[top >= 0])) / num_items


def popularity_bias(ranked: np.ndarray, users: np.ndarray, train: ItemLists, num_items: int, k: int = 20) -> float:
    """How much more popular the recommended items are than what their users chose themselves.

    Ratio of two means over users: training interactions of the items in the top k, and of the items in the
    user's own training list. Above 1 the model leans towards the head.
    """
    counts = np.bincount(train.items, minlength=num_items)
    rows, items = train.rows(users)
    lengths = np.bincount(rows, minlength=len(users))
    known = lengths > 0
    own = np.bincount(rows, weights=counts[items], minlength=len(users))[known] / lengths[known]
    top = ranked[:, :k]
    recommended = np.where(top >= 0, counts[top], 0).sum(1) / np.maximum((top >= 0).sum(1), 1)
    return float(recommended.mean() / own.mean()) if known.any() and own.mean() > 0 else float("nan")


def interest_entropy(rows: np.ndarray, train: ItemLists, seed: int = 0) -> np.ndarray:
    """How diverse the interests of each user are: entropy of the user's training items over clusters of the items.

    It cannot exceed the logarithm of the number of the user's items, so active users reach higher values.

    Args:
        rows: float32 [num_items, d], close where items are alike.
        train: items of each user.
        seed: of k-means, which makes at most 20 clusters, of 5 items on average where there are few.

    Returns:
        float64 [num_users], nats; NaN for users without a training item.
    """
    num_clusters = min(len(rows), max(2, min(_NUM_CLUSTERS, len(rows) // 5)))
    clusters = cluster(torch.from_numpy(np.asarray(rows, dtype=np.float32)), num_clusters, seed).numpy()
    cells = train.users().astype(np.int64) * num_clusters + clusters[train.items]
    counts = np.bincount(cells, minlength=train.num_users * num_clusters).reshape(train.num_users, num_clusters)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = counts / counts.sum(axis=1, keepdims=True)
        entropy = -np.where(shares > 0, shares * np.log(shares), 0).sum(axis=1)
    return np.where(train.counts() > 0, entropy, np.nan)


def slices(interactions: Interactions, entropy: np.ndarray | None = None) -> dict[str, ItemLists]:
    """Parts of the test split that are worth a look of their own.

    By item: `cold_items` (no training interaction), `head_items` (the most popular fifth of the warm catalog),
    `tail_items` (the rest of it). By user: `cold_users` (no training interaction), `active_users` (the most active
    quarter of the others) and `quiet_users` (the least active quarter). With `interest_entropy`, `diverse_users` and
    `focused_users`: the quarters of the highest and the lowest.

    Args:
        interactions: training and test items.
        entropy: float64 [num_users], NaN where there is no training interaction; None for no slices by it.
    """
    test, users = interactions.test, interactions.test.users()
    counts = interactions.item_counts()
    warm = np.sort(counts[counts > 0])[::-1]
    head = warm[max(0, -(-len(warm) // 5) - 1)] if len(warm) else 0
    item_counts, activity = counts[test.items], interactions.train.counts()
    known = activity[(activity > 0) & (test.counts() > 0)]
    low, high = np.quantile(known, [0.25, 0.75]) if len(known) else (0, 0)
    parts = {
        "cold_items": test.where(item_counts == 0),
        "head_items": test.where((item_counts >= head) & (item_counts > 0)),
        "tail_items": test.where((item_counts < head) & (item_counts > 0)),
        "cold_users": test.where(activity[users] == 0),
        "active_users": test.where(activity[users] >= max(high, 1)),
        "quiet_users": test.where((activity[users] <= low) & (activity[users] > 0)),
    }
    if entropy is not None:
        known = entropy[np.isfinite(entropy) & (test.counts() > 0)]
        low, high = np.quantile(known, [0.25, 0.75]) if len(known) else (0, 0)
        parts |= {
            "diverse_users": test.where(entropy[users] >= high),
            "focused_users": test.where(entropy[users] <= low),
        }
    return parts


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
    cold = slices(interactions)["cold_items"]
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
