"""Combine behaviour, content and the moment: one score, a dot product of rows, each part trusted by the evidence.

`v(u, i) = a log(c + popularity(i)) + sum over channels of w[channel, b(i)] z_channel(u, i) + bias[b(i)]`, where `b(i)`
is a bucket of items by their number of training interactions. The channels are those of `training.channels`, the
weights those of a conditional logit on validation interactions (`training.logit`). The preference of users then stands
beside the popularity of the moment (PDA, arXiv 2105.06067), which can be that of any other moment: it is one coordinate
of the rows.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crane_core.dataset.interactions import Interactions
from crane_core.evaluation.baselines import choose_half_life
from crane_core.evaluation.evidence import EDGES, buckets_of
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users, users_at_a_time, without
from crane_core.model.content_rows import ContentMap
from crane_core.model.fold_in import FoldIn, same_for_all, side_by_side
from crane_core.model.views import Rows
from crane_core.model.whitening import Features
from crane_core.model_config import Choices, HeadWeights, ModelConfig
from crane_core.training.channels import GENERATED, MODEL, OF_CONTENT, PROFILE, RECENT, Channels
from crane_core.training.cold_exposure import cold_offset
from crane_core.training.form import MOMENT, MOMENT_BY_EVIDENCE, TIMELESS, TIMELESS_BY_EVIDENCE, Form, Judged, best_form
from crane_core.training.logit import Sample, Weights, draw_sample, losses, most_likely

logger = logging.getLogger(__name__)

PRIOR_COUNT = 0.1
"""c, interactions added to the popularity of every item, so that its logarithm is finite."""
_LEAST_ROWS = 50
"""Validation interactions that a bucket of evidence has at least; others join the next one."""


@dataclass(frozen=True)
class ChosenHead:
    """Weights, half-lives and rows that validation has chosen.

    Attributes:
        half_life: of the popularity, days; None for no decay.
        history_half_life: of the users' histories, days; None for no decay.
        form: name of the form.
        weights: of the score.
        recall: name of each form to the validation Recall@20 with weights that were fitted on other users.
        rows: users float32 [num_users, d] and items float32 [num_items, d] to score by.
        fold_in: what makes a user's row from a history.
        likeness: float32 [num_items, d'], rows whose cosines say how alike items are.
        content: from features to the row of a cold item.
    """

    half_life: float | None
    history_half_life: float | None
    form: str
    weights: HeadWeights
    recall: Mapping[str, float]
    rows: Rows
    fold_in: FoldIn
    likeness: Tensor
    content: ContentMap

    def facts(self) -> dict[str, object]:
        """Return what was chosen as JSON values."""
        return {
            "half_life": self.half_life,
            "history_half_life": self.history_half_life,
            "form": self.form,
            "weights": self.weights.model_dump(mode="json"),
            "recall@20": dict(self.recall),
        }


def choose_head(
    model: Rows, interactions: Interactions, config: ModelConfig, features: Sequence[Features] = ()
) -> ChosenHead | None:
    """Choose how a model's rows, content, the users' recent items and the popularity of the moment are combined.

    With `config.choices` the weights and half-lives are theirs, and nothing is measured. Otherwise the simple form is
    taken whose weights, fitted on half of the validation users, rank the items of the other half best, by the mean of
    Recall@20 and NDCG@20; of equal ones the first. Where the data have no times, the simple form is the model alone. A
    form by evidence takes its place if that mean is higher by more than one standard error; where the data have no
    times, if it is no lower and the items are likelier by more than one. Cold items have the channels of content in
    every form.

    Args:
        model: the rows of a model that knows no times.
        interactions: training and validation interactions.
        config: half-lives to choose from, size and seed of the validation sample, number of axes.
        features: of every modality: float [num_items, dim] and bool [num_items], which items have them.

    Returns:
        None without validation interactions: then the model's rows stand alone.
    """
    if config.choices is not None:
        return _chosen_before(model, interactions, config, config.choices, features)
    users = interactions.validation_users(config.train.validation_users, config.train.seed)
    if len(users) == 0:
        return None
    has_times = interactions.ages is not None and len(config.head.history_half_lives) > 0
    half_life = choose_half_life(interactions, config.head.half_lives) if has_times else None
    channels = Channels(model, interactions, features, config)
    fitting = _Fitting(interactions, log_popularity(interactions, half_life), users, has_times)
    history = _choose_history(channels, fitting, config.head.history_half_lives) if has_times else None
    rows = channels.at(history)
    form, recall = _choose_form(rows, fitting)
    weights = fitting.fit(draw_sample(rows, fitting.popularity, interactions, users), form)
    offset = cold_offset(
        head_rows(weights, rows, fitting.popularity, interactions), interactions, users, config.head.cold_exposure
    )
    weights = weights.model_copy(update={"bias": (weights.bias[0] + offset, *weights.bias[1:])})
    return _made(channels, rows, (half_life, history), (form.name, weights, recall))


def _chosen_before(
    model: Rows, interactions: Interactions, config: ModelConfig, choices: Choices, features: Sequence[Features]
) -> ChosenHead | None:
    """Return the head with weights and half-lives that were chosen on other interactions."""
    if choices.head is None:
        return None
    channels = Channels(model, interactions, features, config)
    half_lives = choices.half_life, choices.history_half_life
    return _made(channels, channels.at(half_lives[1]), half_lives, ("", choices.head, {}))


def _made(
    channels: Channels,
    rows: Mapping[str, Rows],
    half_lives: tuple[float | None, float | None],
    chosen: tuple[str, HeadWeights, Mapping[str, float]],
) -> ChosenHead:
    """Make all that a head consists of from the channels, the half-lives, and form, weights and recalls."""
    interactions, (half_life, history), (form, weights, recall) = channels.interactions, half_lives, chosen
    return ChosenHead(
        half_life,
        history,
        form,
        weights,
        recall,
        head_rows(weights, rows, log_popularity(interactions, half_life), interactions),
        head_fold_in(weights, channels, history),
        channels.likeness(),
        head_content_map(weights, channels, history, rows),
    )


def log_popularity(interactions: Interactions, half_life: float | None) -> Tensor:
    """Return `log(c + popularity)` of every item at the end of the training period: float32 [num_items]."""
    return torch.from_numpy(np.log(PRIOR_COUNT + interactions.popularity(half_life))).float()


def head_rows(
    weights: HeadWeights, channels: Mapping[str, Rows], popularity: Tensor, interactions: Interactions
) -> Rows:
    """Return the rows whose dot products are the scores: float32 [num_users, d] and [num_items, d].

    The last coordinate is 1 for users, and popularity and bias for items. Generated rows lie in the model's space.

    Args:
        weights: of the score.
        channels: name to rows; those without a weight are left out.
        popularity: float32 [num_items], logarithm.
        interactions: tell the evidence of each item, and the number of cold items.
    """
    buckets = torch.from_numpy(buckets_of(interactions, weights.edges))
    users, items = [], []
    for names in _used_spaces(weights, channels):
        users.append(channels[names[0]][0])
        weighted = [_weighted(channels[name][1], weights.channels[name], buckets) for name in names]
        items.append(torch.stack(weighted).sum(dim=0))
    bias = torch.tensor([_cold_bias(weights, interactions), *weights.bias[1:]])
    users.append(torch.ones(interactions.num_users, 1))
    items.append((weights.popularity * popularity + bias[buckets])[:, None])
    return torch.cat(users, dim=1), torch.cat(items, dim=1)


def head_fold_in(weights: HeadWeights, channels: Channels, half_life: float | None) -> FoldIn:
    """Return what makes a user's row of `head_rows` from a history.

    Args:
        weights: of the score.
        channels: whose user rows are to be made.
        half_life: of the histories, days; None for no decay.
    """
    parts = [channels.fold_in(names[0], half_life) for names in _used_spaces(weights, channels.names)]
    return side_by_side([*parts, same_for_all(np.ones(1, dtype=np.float32), channels.interactions.num_items)])


def head_content_map(
    weights: HeadWeights, channels: Channels, half_life: float | None, rows: Mapping[str, Rows]
) -> ContentMap:
    """Return the map from features to the row of `head_rows` that a cold item has.

    Args:
        weights: of the score.
        channels: that the rows were made of.
        half_life: of the histories, days; None for no decay.
        rows: `channels.at(half_life)`.
    """
    parts = []
    for names in _used_spaces(weights, channels.names):
        maps = [
            [weights.channels[name][0] * each for each in channels.content_map(name, half_life)]
            for name in names
            if name in OF_CONTENT
        ]
        width = rows[names[0]][1].shape[1]
        parts.append([sum(each) for each in zip(*maps, strict=True)] if maps else channels.nothing(width))
    parts.append(channels.nothing(1))
    matrix, shift = (np.concatenate(each, axis=-1) for each in zip(*parts, strict=True))
    constant = np.zeros(len(shift))
    constant[-1] = weights.popularity * np.log(PRIOR_COUNT) + _cold_bias(weights, channels.interactions)
    return ContentMap(channels.whitening, matrix, shift, constant)


def _cold_bias(weights: HeadWeights, interactions: Interactions) -> float:
    """Return the bias of a cold item. Among more of them than at the fit, each gets a smaller share of the lists."""
    return float(weights.bias[0] - np.log(max(len(interactions.cold_items()), 1) / max(weights.num_cold, 1)))


def _used_spaces(weights: HeadWeights, present: Container[str]) -> list[list[str]]:
    """Return the channels with a weight, those with the same user rows together, in the order of the coordinates."""
    spaces = (MODEL, GENERATED), (RECENT,), (PROFILE,)
    used = [[name for name in names if name in present and any(weights.channels.get(name, ()))] for names in spaces]
    return [names for names in used if names]


def _weighted(items: Tensor, weights: Sequence[float], buckets: Tensor) -> Tensor:
    return items * torch.tensor(weights)[buckets][:, None]


@dataclass(frozen=True)
class _Fitting:
    """What every fit of a dataset shares.

    Attributes:
        interactions: training and validation interactions.
        popularity: float32 [num_items], logarithm.
        users: int [n], the validation users.
        has_times: whether popularity alone is the form that the penalty pulls to; otherwise the model alone.
    """

    interactions: Interactions
    popularity: Tensor
    users: np.ndarray
    has_times: bool

    def fit(self, sample: Sample, form: Form) -> HeadWeights:
        """Fit the weights of a form."""
        edges = self._edges() if form.by_evidence else EDGES[:2]
        is_free = torch.zeros(len(sample.names), len(edges), dtype=torch.bool)
        for index, name in enumerate(sample.names):
            is_free[index, 0] = name in OF_CONTENT
            is_free[index, 1:] = name in form.channels
        start = [float(self.has_times), *(float(name == MODEL and not self.has_times) for name in sample.names)]
        found = most_likely(sample, buckets_of(self.interactions, edges), is_free, start)
        return HeadWeights(
            edges=edges,
            popularity=float(found.popularity),
            channels={name: tuple(row.tolist()) for name, row in zip(sample.names, found.channels, strict=True)},
            bias=tuple(found.bias.tolist()),
            num_cold=len(self.interactions.cold_items()),
        )

    def losses(self, sample: Sample, weights: HeadWeights) -> np.ndarray:
        """Return the negative logarithm of the likelihood of each positive, float32 [p]."""
        channels = torch.tensor([weights.channels[name] for name in sample.names])
        tensors = Weights(torch.tensor(weights.popularity), channels, torch.tensor(weights.bias))
        return losses(sample, buckets_of(self.interactions, weights.edges), tensors).numpy()

    def _edges(self) -> tuple[int, ...]:
        """Return the edges of the buckets of evidence, each with enough validation interactions."""
        _, items = self.interactions.validation.rows(self.users)
        counts = np.bincount(buckets_of(self.interactions, EDGES)[items], minlength=len(EDGES))
        edges, rows = [0], _LEAST_ROWS
        for edge, count in zip(EDGES[1:], counts[1:], strict=True):
            if rows >= _LEAST_ROWS:
                edges.append(edge)
                rows = 0
            rows += int(count)
        if rows < _LEAST_ROWS and len(edges) > 2:
            edges.pop()
        return tuple(edges)

    def cross_fitted(self, channels: Mapping[str, Rows], forms: Sequence[Form]) -> dict[Form, Judged]:
        """Judge each form on users whose interactions had no part in the weights."""
        found: dict[Form, list[tuple[np.ndarray, ...]]] = {form: [] for form in forms}
        halves = self.users[::2], self.users[1::2]
        for fitted, judged in (halves, halves[::-1]) if len(halves[1]) else ((halves[0], halves[0]),):
            samples = [draw_sample(channels, self.popularity, self.interactions, users) for users in (fitted, judged)]
            for form in forms:
                weights = self.fit(samples[0], form)
                rows = head_rows(weights, channels, self.popularity, self.interactions)
                found[form].append((*self._metrics(rows, judged), self.losses(samples[1], weights)))
        return {
            form: Judged(*(np.concatenate(parts) for parts in zip(*values, strict=True)))
            for form, values in found.items()
        }

    def _metrics(self, rows: Rows, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return Recall@20 and NDCG@20 of the validation items of some users."""
        interactions = self.interactions
        score = without(dot_product(*rows), interactions.tombstones)
        ranked = rank_users(score, interactions.train, users, 20, users_at_a_time(interactions.num_items))
        metrics = user_metrics(ranked, interactions.validation, users, (20,))
        return metrics["recall@20"], metrics["ndcg@20"]


def _choose_history(channels: Channels, fitting: _Fitting, half_lives: Sequence[float | None]) -> float | None:
    """Return the half-life of histories by which the validation interactions are most likely."""
    means = {}
    for half_life in half_lives:
        recent = {RECENT: channels.recent(half_life)}
        sample = draw_sample(recent, fitting.popularity, fitting.interactions, fitting.users)
        weights = fitting.fit(sample, Form((RECENT,)))
        means[half_life] = float(sample.weights.numpy() @ fitting.losses(sample, weights))
    return min(means, key=means.__getitem__)


def _choose_form(channels: Mapping[str, Rows], fitting: _Fitting) -> tuple[Form, dict[str, float]]:
    """Return the form, and the cross-fitted validation Recall@20 of each by name."""
    simple, others = (MOMENT, MOMENT_BY_EVIDENCE) if fitting.has_times else (TIMELESS, TIMELESS_BY_EVIDENCE)
    by_evidence = [form for form in others if set(form.channels) <= set(channels)]
    judged = fitting.cross_fitted(channels, (*simple, *by_evidence))
    best = best_form(
        {form: judged[form] for form in simple}, {form: judged[form] for form in by_evidence}, fitting.has_times
    )
    logger.info("head form=%s", best.name)
    return best, {form.name: float(each.recall.mean()) for form, each in judged.items()}
