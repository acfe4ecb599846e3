"""A conditional logit over the catalog: weights that make the validation interactions likely (McFadden, 1974).

The score of an item is `a log popularity + sum over channels of w[channel, bucket] z + bias[bucket]`, where the bucket
is that of the item's evidence. Each validation interaction competes with a sample of the catalog.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crane_core.dataset.interactions import Interactions
from crane_core.evaluation.baselines import popular_items
from crane_core.model.views import Rows

_POPULAR, _OTHERS, _COLD = 400, 400, 300
"""Size of the sample of alternatives: the most popular items, other warm items at random, cold items at random."""
_MOST_USERS = 4096
"""Users that the weights are fitted on at most."""
_PENALTY = 50.0
"""Weight of the squared distances of the weights, against the sum over the interactions: of a channel's mean weight
from its start, and of its weights from their mean. Some hundred interactions cannot bend the weights far."""
_WEAK_PENALTY = 1.0
"""Weight of the squared biases and of the squared weights of cold items."""


@dataclass(frozen=True)
class Sample:
    """Validation interactions of some users, and their alternatives.

    Attributes:
        names: of the channels.
        users: int [n].
        among: float32 [c, n, m], the channels' scores of the alternatives of each user.
        own: float32 [c, p], those of the positives.
        base: float32 [n, m], logarithm of what each alternative stands for; -inf for none.
        positions: int64 [p], the user of each positive.
        weights: float32 [p], what each positive counts: `n^-1/2` for a user with n of them, 0 for one without any
            alternative.
        alternatives, positives: int [m] and [p], their items.
        popularity: float32 [num_items], logarithm.
    """

    names: tuple[str, ...]
    users: np.ndarray
    among: Tensor
    own: Tensor
    base: Tensor
    positions: Tensor
    weights: Tensor
    alternatives: np.ndarray
    positives: np.ndarray
    popularity: Tensor


def draw_sample(
    channels: Mapping[str, Rows], popularity: Tensor, interactions: Interactions, users: np.ndarray
) -> Sample:
    """Draw the alternatives, and score them and the validation items of some users.

    Items that a user has met, in training or validation, are no alternatives.

    Args:
        channels: name to rows.
        popularity: float32 [num_items], logarithm.
        interactions: training and validation interactions.
        users: int [n], each with a validation item.
    """
    generator = np.random.default_rng(0)
    if len(users) > _MOST_USERS:
        users = np.sort(generator.choice(users, _MOST_USERS, replace=False))
    sample, log_weights = _alternatives(popularity, interactions, generator)
    positions, positives = interactions.validation.rows(users)
    pairs = np.repeat(users, len(sample)), np.tile(sample, len(users))
    is_met = interactions.train.holds(*pairs) | interactions.validation.holds(*pairs)
    base = log_weights + torch.zeros(len(users), len(sample))
    base[torch.from_numpy(is_met.reshape(base.shape))] = -torch.inf
    # Who has met every alternative chose among nothing.
    has_choice = base.isfinite().any(dim=1)
    base[~has_choice] = 0.0
    weights = torch.from_numpy(np.bincount(positions)[positions] ** -0.5).float() * has_choice[positions]
    rows = [(of_users[users], of_items) for of_users, of_items in channels.values()]
    return Sample(
        tuple(channels),
        users,
        torch.stack([u @ i[sample].T for u, i in rows]),
        torch.stack([(u[positions] * i[positives]).sum(1) for u, i in rows]),
        base,
        torch.from_numpy(positions),
        weights,
        sample,
        positives,
        popularity,
    )


def _alternatives(
    popularity: Tensor, interactions: Interactions, generator: np.random.Generator
) -> tuple[np.ndarray, Tensor]:
    """Return the sampled items, int [m], and the logarithm of how many items each one stands for, float32 [m]."""
    order, is_warm = popular_items(interactions, popularity.numpy()), interactions.item_counts() > 0
    rest = order[_POPULAR:]
    sample, stands_for = [order[:_POPULAR]], [np.zeros(len(order[:_POPULAR]))]
    for stratum, size in ((rest[is_warm[rest]], _OTHERS), (rest[~is_warm[rest]], _COLD)):
        drawn = np.sort(generator.choice(stratum, min(size, len(stratum)), replace=False))
        sample.append(drawn)
        stands_for.append(np.full(len(drawn), np.log(max(len(stratum), 1) / max(len(drawn), 1))))
    return np.concatenate(sample), torch.from_numpy(np.concatenate(stands_for)).float()


@dataclass(frozen=True)
class Weights:
    """Weights of a score.

    Attributes:
        popularity: a, float32 scalar, at least 0.
        channels: float32 [c, b], each at least 0.
        bias: float32 [b].
    """

    popularity: Tensor
    channels: Tensor
    bias: Tensor


def most_likely(sample: Sample, buckets: np.ndarray, is_free: Tensor, start: Sequence[float]) -> Weights:
    """Return the weights, none below 0, that make the positives most likely.

    Args:
        sample: interactions and alternatives.
        buckets: int [num_items], the bucket of each item; the first is that of the cold items.
        is_free: bool [c, b]; the other weights are 0.
        start: of the popularity's weight and of each channel's, [1 + c]. The penalty pulls the warm items' weights
            towards it, and those of the cold items towards 0.
    """
    first, free = torch.tensor(start, dtype=torch.float32), is_free.float()
    warm, num_warm = free[:, 1:], free[:, 1:].sum(dim=1)
    values = [first[0].clone(), first[1:, None] * free, torch.zeros(free.shape[1])]
    for value in values:
        value.requires_grad_()
    optimiser = torch.optim.LBFGS(values, max_iter=60, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def current() -> Weights:
        return Weights(values[0].clamp(min=0), values[1].clamp(min=0) * free, values[2])

    def penalty() -> Tensor:
        means = (values[1][:, 1:] * warm).sum(dim=1) / num_warm.clamp(min=1)
        spread = ((values[1][:, 1:] - means[:, None]) * warm).square().sum()
        distance = ((means - first[1:]) * (num_warm > 0)).square().sum() + (values[0] - first[0]).square()
        cold = values[1][:, 0].square().sum() + values[2].square().sum()
        return _PENALTY * (spread + distance) + _WEAK_PENALTY * cold

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = ((sample.weights * losses(sample, buckets, current())).sum() + penalty()) / sample.weights.sum().clamp(
            min=1
        )
        loss.backward()
        return loss

    optimiser.step(step)
    with torch.no_grad():
        return current()


def losses(sample: Sample, buckets: np.ndarray, weights: Weights) -> Tensor:
    """Return the negative logarithm of the likelihood of each positive: float32 [p]."""
    of_sample, of_positives = (torch.from_numpy(buckets[items]) for items in (sample.alternatives, sample.positives))
    popularity = [sample.popularity[items] for items in (sample.alternatives, sample.positives)]
    rivals = sample.base + (weights.popularity * popularity[0] + weights.bias[of_sample])
    own = weights.popularity * popularity[1] + weights.bias[of_positives]
    for each, among, positives in zip(weights.channels, sample.among, sample.own, strict=True):
        rivals = torch.addcmul(rivals, among, each[of_sample])
        own = torch.addcmul(own, positives, each[of_positives])
    return torch.logaddexp(own, torch.logsumexp(rivals, dim=1)[sample.positions]) - own
