"""What a score is made of: channels, each a user row and an item row whose dot product says one thing.

    model      the rows of the trained model, for items with training interactions
    recent     what the user met lately, through a low-pass filter of the user-item graph, for the same items
    profile    whitened content against the sum over the user's items
    generated  the model's row of the user against a row that the item's content generates

The dot products of a channel have the standard deviation 1 over all users and the items that have it. An item that has
no row in a channel has a zero row there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from crane_core.dataset.interactions import Interactions
from crane_core.model.fold_in import FoldIn, summed
from crane_core.model.graph_filter import filtered, item_axes
from crane_core.model.views import Rows
from crane_core.model.whitening import Features, Whitening, fit_whitening
from crane_core.model_config import ModelConfig
from crane_core.training.fold_in import fit_fold_in
from crane_core.training.generated import Generator, generate

MODEL, RECENT, PROFILE, GENERATED = "model", "recent", "profile", "generated"
OF_CONTENT = (PROFILE, GENERATED)
"""Channels that an item without interactions can have."""


def score_spread(users: Tensor, items: Tensor) -> float:
    """Return the standard deviation of all scores `users @ items.T`, from the d x d moments of the rows."""
    mean = float(users.double().mean(0) @ items.double().mean(0))
    second = [rows.double().T @ rows.double() / len(rows) for rows in (users, items)]
    return max(float((second[0] * second[1]).sum()) - mean**2, 0.0) ** 0.5


def inverse_spread(rows: Rows, measured: np.ndarray) -> float:
    """Return what scores are multiplied by for a standard deviation of 1 over some items; 0 where they are all equal.

    Args:
        rows: users float32 [num_users, d] and items float32 [num_items, d].
        measured: bool [num_items].
    """
    users, items = rows
    spread = score_spread(users, items[torch.from_numpy(measured)]) if measured.any() and len(users) else 0.0
    return 1 / spread if spread > 1e-12 else 0.0


def of_unit_spread(rows: Rows, measured: np.ndarray) -> Rows:
    """Scale the item rows so that the scores of some items have the standard deviation 1.

    Where these scores are all equal, the channel says nothing: all item rows become 0.

    Args:
        rows: users float32 [num_users, d] and items float32 [num_items, d].
        measured: bool [num_items].
    """
    return rows[0], rows[1] * inverse_spread(rows, measured)


@dataclass
class Channels:
    """Makes the channels of a dataset; what does not depend on the half-life of histories is made once.

    Args:
        model: rows of a trained model.
        interactions: training interactions with their weights and ages.
        features: of every modality; none where there is no content.
        config: number of axes and seed.

    Attributes:
        whitening, generator: the maps from features to the content channels' rows; None without content.
    """

    model: Rows
    interactions: Interactions
    features: Sequence[Features]
    config: ModelConfig
    whitening: Whitening | None = field(init=False, default=None)
    generator: Generator | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._is_warm = self.interactions.item_counts() > 0
        users, items = self.model
        known = torch.where(torch.from_numpy(self._is_warm)[:, None], items, 0.0)
        self._fixed = {MODEL: of_unit_spread((users, known), self._is_warm)}
        if self.features:
            self.whitening = fit_whitening(self.features, self._is_warm, self.config.head.content_axes)
        if self.whitening is not None:
            self._white = self.whitening.rows(self.features)
            self._has_content = self._white.any(dim=1).numpy()
            rows, self.generator = generate(self._white, self._fixed[MODEL][1], self._is_warm, self.config.train.seed)
            # Measured on warm items, so that a new item changes no scale.
            self._measured = self._is_warm & self._has_content
            self._generated_scale = inverse_spread((users, rows), self._measured)
            self._fixed[GENERATED] = users, rows * self._generated_scale
        self._axes: Tensor | None = None

    @property
    def names(self) -> list[str]:
        """The channels that `at` returns."""
        of_times = [RECENT] if self.interactions.ages is not None else []
        return [*self._fixed, *of_times, *([PROFILE] if self.whitening is not None else [])]

    def at(self, half_life: float | None) -> dict[str, Rows]:
        """Return all channels: name to users float32 [num_users, d] and items float32 [num_items, d].

        Args:
            half_life: days in which an interaction of a user's history loses half of its weight; None for no decay.
        """
        found = dict(self._fixed)
        if self.interactions.ages is not None:
            found[RECENT] = self.recent(half_life)
        if self.whitening is not None:
            found[PROFILE] = of_unit_spread(self._profile(half_life), self._measured)
        return found

    def recent(self, half_life: float | None) -> Rows:
        """Return the channel of that name."""
        return of_unit_spread(self._filtered(half_life), self._is_warm)

    def fold_in(self, name: str, half_life: float | None) -> FoldIn:
        """Return what makes the user rows of a channel from a history.

        Args:
            name: of the channel; `generated` has the user rows of `model`.
            half_life: as for `at`.
        """
        if name == RECENT:
            return summed(self._filtered(half_life)[1].numpy(), half_life)
        if name == PROFILE:
            return summed(self._white.numpy(), half_life, power=0.5)
        return fit_fold_in(self._fixed[MODEL], self.interactions)

    def content_map(self, name: str, half_life: float | None) -> tuple[np.ndarray, np.ndarray]:
        """Return how whitened content becomes an item row of a channel: float64 [k, d] and a constant, float64 [d].

        Args:
            name: `profile` or `generated`.
            half_life: as for `at`.
        """
        if name == PROFILE:
            scale, width = inverse_spread(self._profile(half_life), self._measured), self._white.shape[1]
            return scale * np.eye(width), np.zeros(width)
        assert self.generator is not None
        return self._generated_scale * self.generator.matrix, self._generated_scale * self.generator.constant

    def nothing(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what `content_map` would, for a channel that content has no part in."""
        return np.zeros((0 if self.whitening is None else self.whitening.axes.shape[1], width)), np.zeros(width)

    def likeness(self) -> Tensor:
        """Return rows whose cosines say how alike items are, float32 [num_items, d]: half behaviour and half content.

        In place of behaviour, an item without interactions has its generated row.
        """
        behaviour = self._fixed[MODEL][1]
        if self.whitening is None:
            return behaviour
        generated = torch.from_numpy(~self._is_warm)[:, None]
        behaviour = torch.where(generated, self._fixed[GENERATED][1], behaviour)
        return torch.cat([F.normalize(behaviour, dim=1), self._white], dim=1)

    def _profile(self, half_life: float | None) -> Rows:
        return torch.from_numpy(_history(self.interactions, half_life) @ self._white.numpy()), self._white

    def _filtered(self, half_life: float | None) -> Rows:
        if self._axes is None:
            self._axes = item_axes(self.interactions, self.config.lightgcn.embedding_dim, self.config.train.seed)
        return filtered(self._axes, self.interactions, half_life)


def _history(interactions: Interactions, half_life: float | None) -> sp.csr_array:
    """Return the weights of the users' items, each user's divided by the root of their sum."""
    train, weights = interactions.train, interactions.decayed(half_life)
    shape = train.num_users, interactions.num_items
    history = sp.csr_array((weights.astype(np.float32), train.items, train.indptr), shape=shape)
    totals = np.asarray(history.sum(axis=1), dtype=np.float32)
    return sp.csr_array(sp.diags_array(np.maximum(totals, 1e-12) ** -0.5, dtype=np.float32) @ history)
