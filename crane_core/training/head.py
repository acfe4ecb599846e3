"""Combine what a model knows of a user with what is popular at the moment: one score, a dot product of rows.

`v(u, i) = a log(c + popularity(i)) + sum over channels of w z_channel(u, i)`. A channel is a model's rows, whose scores
are divided by their spread. The weights are those of a conditional logit: they make the validation interactions likely
among a sample of the catalog (McFadden, 1974). The preference of users then stands beside the popularity of the moment
(PDA, arXiv 2105.06067), and the popularity can be that of any other moment: it is one coordinate of the rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crane_core.dataset.interactions import Interactions
from crane_core.evaluation.baselines import choose_half_life, first_unseen, popular_items
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users, users_at_a_time, without
from crane_core.model.fold_in import FoldIn, same_for_all, side_by_side, summed
from crane_core.model.graph_filter import filtered, item_axes
from crane_core.model.views import Rows
from crane_core.model_config import Choices, ModelConfig
from crane_core.training.fold_in import fit_fold_in

logger = logging.getLogger(__name__)

PRIOR_COUNT = 0.1
"""c, interactions added to the popularity of every item, so that its logarithm is finite."""
_POPULAR, _OTHERS = 400, 600
"""Size of the sample of alternatives: the most popular items, and others at random."""
_MOST_USERS = 4096
"""Validation users that the weights are fitted on at most."""
_PENALTY = 50.0
"""Weight of the squared distance of the weights from popularity alone, against the sum over the interactions: some
hundred of them cannot bend the weights far."""


@dataclass(frozen=True)
class Head:
    """The weights of a score.

    Attributes:
        popularity: a, at least 0.
        channels: name to w, at least 0.
        loss: mean negative logarithm of the likelihood, with the penalty.
    """

    popularity: float
    channels: Mapping[str, float]
    loss: float = 0.0

    def rows(self, channels: Mapping[str, Rows], log_popularity: Tensor, num_users: int) -> Rows:
        """Return the rows whose dot products are the scores: float32 [num_users, d] and [num_items, d].

        The last coordinate is 1 for users and the weighted logarithm of the popularity for items.

        Args:
            channels: name to rows.
            log_popularity: float32 [num_items].
            num_users: number of users.
        """
        factors = {name: weight**0.5 for name, weight in self.channels.items() if weight > 0}
        items = [factor * channels[name][1] for name, factor in factors.items()]
        users = [factor * channels[name][0] for name, factor in factors.items()]
        return (
            torch.cat([*users, torch.ones(num_users, 1)], dim=1),
            torch.cat([*items, self.popularity * log_popularity[:, None]], dim=1),
        )

    def fold_in(self, channels: Mapping[str, Rows], exact: Mapping[str, FoldIn], interactions: Interactions) -> FoldIn:
        """Return what makes a user's row of `rows` from a history.

        Args:
            channels: name to rows, as for `rows`.
            exact: name to the fold-in of channels that are sums over the history; the others get one that is fitted.
            interactions: training interactions.
        """
        parts = [
            (exact[name] if name in exact else fit_fold_in(channels[name], interactions)).times(weight**0.5)
            for name, weight in self.channels.items()
            if weight > 0
        ]
        return side_by_side([*parts, same_for_all(np.ones(1, dtype=np.float32), interactions.num_items)])


def score_spread(users: Tensor, items: Tensor) -> float:
    """Return the standard deviation of all scores `users @ items.T`, from the d x d moments of the rows."""
    mean = float(users.double().mean(0) @ items.double().mean(0))
    second = [rows.double().T @ rows.double() / len(rows) for rows in (users, items)]
    return max(float((second[0] * second[1]).sum()) - mean**2, 0.0) ** 0.5


def of_unit_spread(rows: Rows) -> Rows:
    """Return rows whose scores have the standard deviation 1; rows of equal scores become 0."""
    spread = score_spread(*rows)
    factor = 1 / spread**0.5 if spread > 1e-12 else 0.0
    return rows[0] * factor, rows[1] * factor


def log_popularity(interactions: Interactions, half_life: float | None) -> Tensor:
    """Return `log(c + popularity)` of every item at the end of the training period: float32 [num_items]."""
    return torch.from_numpy(np.log(PRIOR_COUNT + interactions.popularity(half_life))).float()


def fit_head(channels: Mapping[str, Rows], popularity: Tensor, interactions: Interactions, users: np.ndarray) -> Head:
    """Fit the weights to the validation interactions of some users.

    The alternatives of an interaction are the popular items and a random sample of the others, whose weight makes up
    for the others that are not in it. Items that the user has met, in training or validation, are none. An interaction
    of a user with n of them weighs `n^-1/2`.

    Args:
        channels: name to rows of unit spread.
        popularity: `log_popularity`.
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
    rows = {name: (of_users[users], of_items) for name, (of_users, of_items) in channels.items()}
    among = [popularity[sample].expand(base.shape), *(u @ i[sample].T for u, i in rows.values())]
    own = [popularity[positives], *((u[positions] * i[positives]).sum(1) for u, i in rows.values())]
    weights = torch.from_numpy(np.bincount(positions)[positions] ** -0.5).float()
    found, loss = _most_likely(torch.stack(among), torch.stack(own), base, torch.from_numpy(positions), weights)
    return Head(found[0], dict(zip(channels, found[1:], strict=True)), loss)


def _alternatives(
    popularity: Tensor, interactions: Interactions, generator: np.random.Generator
) -> tuple[np.ndarray, Tensor]:
    """Return the sampled items, int [m], and the logarithm of how many items each one stands for, float32 [m]."""
    order = popular_items(interactions, popularity.numpy())
    popular, others = order[:_POPULAR], order[_POPULAR:]
    drawn = np.sort(generator.choice(others, min(_OTHERS, len(others)), replace=False))
    stands_for = np.repeat([0.0, np.log(max(len(others), 1) / max(len(drawn), 1))], [len(popular), len(drawn)])
    return np.concatenate([popular, drawn]), torch.from_numpy(stands_for).float()


def _most_likely(
    among: Tensor, own: Tensor, base: Tensor, positions: Tensor, weights: Tensor
) -> tuple[list[float], float]:
    """Return the weights, none below 0, that make the positives most likely, and the loss.

    Args:
        among: float32 [c, n, m], the channels' scores of the alternatives of each user.
        own: float32 [c, p], those of the positives.
        base: float32 [n, m], logarithm of the weight of each alternative; -inf for none.
        positions: int64 [p], the user of each positive.
        weights: float32 [p], what each positive counts.
    """
    start = torch.zeros(len(among), dtype=torch.float32)
    start[0] = 1.0
    active = list(range(len(among)))
    while True:
        values = start[active].clone().requires_grad_()
        optimiser = torch.optim.LBFGS([values], max_iter=50, line_search_fn="strong_wolfe")

        def loss(values: Tensor = values, active: list[int] = active) -> Tensor:
            rivals = torch.logsumexp(base + torch.tensordot(values, among[active], 1), dim=1)[positions]
            positive = values @ own[active]
            missed = torch.logaddexp(positive, rivals) - positive
            distance = (values - start[active]).square().sum()
            return ((weights * missed).sum() + _PENALTY * distance) / weights.sum()

        def step(optimiser: torch.optim.LBFGS = optimiser, loss: Callable[[], Tensor] = loss) -> Tensor:
            optimiser.zero_grad()
            value = loss()
            value.backward()
            return value

        optimiser.step(step)
        found = dict(zip(active, values.detach().tolist(), strict=True))
        # A channel that repels is noise: the fit is made again without it.
        if all(value >= 0 for value in found.values()):
            return [found.get(index, 0.0) for index in range(len(among))], float(loss().detach())
        active = [index for index in active if found[index] >= 0]


@dataclass(frozen=True)
class ChosenHead:
    """Weights, half-lives and rows that validation has chosen.

    Attributes:
        half_life: of the popularity, days; None for no decay.
        history_half_life: of the users' histories, days; None for no decay.
        head: the weights.
        recall: channels that stand beside the popularity, joined by `+`, to validation Recall@20 with weights that
            were fitted on other users; `` is popularity alone.
        rows: users float32 [num_users, d] and items float32 [num_items, d] to score by.
        fold_in: what makes a user's row from a history.
    """

    half_life: float | None
    history_half_life: float | None
    head: Head
    recall: Mapping[str, float]
    rows: Rows
    fold_in: FoldIn

    def facts(self) -> dict[str, object]:
        """Return what was chosen as JSON values."""
        return {
            "half_life": self.half_life,
            "history_half_life": self.history_half_life,
            "weights": {"popularity": self.head.popularity, **self.head.channels},
            "recall@20": dict(self.recall),
        }


MODEL, RECENT = "model", "recent"
"""Channels: the rows of the model, and what the user met lately."""
SETS: tuple[tuple[str, ...], ...] = ((), (RECENT,), (MODEL, RECENT))
"""Sets of channels that validation chooses from."""


def choose_head(model: Rows, interactions: Interactions, config: ModelConfig) -> ChosenHead | None:
    """Choose how a model's rows, the users' recent items and the popularity of the moment are combined.

    With `config.choices` the weights and half-lives are theirs, and nothing is measured. Otherwise that set of
    channels is taken whose weights, fitted on half of the validation users, find most items of the other half; of equal
    ones the smallest. So what is personal must be worth something to enter.

    Args:
        model: the rows of a model that knows no times.
        interactions: training and validation interactions.
        config: half-lives to choose from, size and seed of the validation sample, number of axes.

    Returns:
        None where the data have no times, or no half-life is given: then the model's rows stand alone.
    """
    if config.choices is not None:
        return _chosen_before(model, interactions, config, config.choices)
    users = interactions.validation_users(config.train.validation_users, config.train.seed)
    if interactions.ages is None or len(users) == 0 or not config.head.history_half_lives:
        return None
    half_life = choose_half_life(interactions, config.head.half_lives)
    popularity = log_popularity(interactions, half_life)
    axes = _axes(interactions, config)
    losses = {}
    for history in config.head.history_half_lives:
        recent = of_unit_spread(filtered(axes, interactions, history))
        losses[history] = fit_head({RECENT: recent}, popularity, interactions, users).loss
    history = min(losses, key=losses.__getitem__)
    own = _channels(model, axes, interactions, history)
    recall = {
        names: _cross_fitted({name: own[name] for name in names}, popularity, interactions, users) for names in SETS
    }
    names = max(SETS, key=recall.__getitem__)
    channels = {name: own[name] for name in names}
    head = fit_head(channels, popularity, interactions, users) if channels else Head(1.0, {})
    found = {"+".join(names): value for names, value in recall.items()}
    rows = head.rows(channels, popularity, interactions.num_users)
    fold_in = head.fold_in(channels, _exact(channels, history), interactions)
    return ChosenHead(half_life, history, head, found, rows, fold_in)


def _chosen_before(model: Rows, interactions: Interactions, config: ModelConfig, choices: Choices) -> ChosenHead | None:
    """Return the head with weights and half-lives that were chosen on other interactions."""
    if choices.weights is None:
        return None
    own = _channels(model, _axes(interactions, config), interactions, choices.history_half_life)
    weights = dict(choices.weights)
    head = Head(weights.pop("popularity"), weights)
    popularity = log_popularity(interactions, choices.half_life)
    rows = head.rows(own, popularity, interactions.num_users)
    fold_in = head.fold_in(own, _exact(own, choices.history_half_life), interactions)
    return ChosenHead(choices.half_life, choices.history_half_life, head, {}, rows, fold_in)


def _axes(interactions: Interactions, config: ModelConfig) -> Tensor:
    return item_axes(interactions, config.lightgcn.embedding_dim, config.train.seed)


def _channels(model: Rows, axes: Tensor, interactions: Interactions, half_life: float | None) -> dict[str, Rows]:
    """Return the rows of all channels, of unit spread."""
    return {MODEL: of_unit_spread(model), RECENT: of_unit_spread(filtered(axes, interactions, half_life))}


def _exact(channels: Mapping[str, Rows], half_life: float | None) -> dict[str, FoldIn]:
    """Return the fold-ins of those channels whose users' rows are sums over the history."""
    return {RECENT: summed(channels[RECENT][1].numpy(), half_life)} if RECENT in channels else {}


def _cross_fitted(
    channels: Mapping[str, Rows], popularity: Tensor, interactions: Interactions, users: np.ndarray
) -> float:
    """Return the validation Recall@20 of users whose interactions had no part in the weights."""
    halves = users[::2], users[1::2]
    order = popular_items(interactions, popularity.numpy())
    values = []
    for fitted, judged in (halves, halves[::-1]):
        if channels and len(fitted):
            head = fit_head(channels, popularity, interactions, fitted)
            rows = head.rows(channels, popularity, interactions.num_users)
            score = without(dot_product(*rows), interactions.tombstones)
            ranked = rank_users(score, interactions.train, judged, 20, users_at_a_time(interactions.num_items))
        else:
            ranked = first_unseen(order, interactions.train, judged, 20)
        values.append(user_metrics(ranked, interactions.validation, judged, (20,))["recall@20"])
    return float(np.concatenate(values).mean())
