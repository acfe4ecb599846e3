"""Batches of training interactions, in the order of an epoch, with negatives drawn; the same on every rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import TypeVar

import numpy as np
import torch

from crane_core.dataset.interactions import Interactions
from crane_core.errors import DataError
from crane_core.model.lightgcn import LightGCN
from crane_core.model.user_item_graph import Edges
from crane_core.model.views import Batch, Sample
from crane_core.model_config import ModelConfig
from crane_core.ranks import ranks
from crane_core.training.negatives import NegativeSampler

_THREADS = 4
"""Threads that draw batches ahead for a GPU, which would wait for them most of the time."""
Result = TypeVar("Result")


class Purpose(IntEnum):
    """Purposes of the random numbers of a training; each purpose has generators of its own."""

    EDGE_DROPOUT = 1
    ORDER = 2
    NEGATIVES = 3
    SAMPLED_GRAPH = 4
    USERS = 5


def generator_for(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
    """Return the generator of a purpose at a place, such as an epoch and a batch.

    It depends on nothing that was drawn before, so a resumed training repeats nothing and skips nothing.
    """
    return np.random.default_rng([seed, purpose, *place])


class Batches:
    """Makes the batches of a training.

    Args:
        model: says whether the rows of a batch share their negatives.
        interactions: training interactions.
        config: sizes, seed and negatives.
        device: of the batches.

    Attributes:
        edges: the training interactions; their weights are 1 on average.
        learned: int64, numbers of the interactions that can be learned from: those of users who have an item left that
            they have not met.
        sampler: of the negatives.
        weights: float32 [num_users], how much an interaction of each user counts.

    Raises:
        DataError: no user has both a training interaction and an item left that could be a negative.
    """

    def __init__(self, model: LightGCN, interactions: Interactions, config: ModelConfig, device: torch.device) -> None:
        weights = interactions.weights
        if weights is not None:
            weights = (weights / weights.mean(dtype=np.float64)).astype(np.float32)
        self.edges = Edges(interactions.train.users(), interactions.train.items, weights)
        self.sampler = NegativeSampler(interactions.train, interactions.num_items, config.crane.ranking_negatives)
        exhausted = self.sampler.exhausted
        self.learned = np.flatnonzero(~exhausted[self.edges.users])
        if not len(self.learned):
            raise DataError(
                f"Of {interactions.num_users} users {exhausted.sum()} have met all {interactions.num_items} items and "
                "none of the others has a training interaction: there is nothing to learn from.",
                "Widen the window, or add items to the catalog.",
            )
        self.weights = user_weights(np.where(exhausted, 0, interactions.train.counts()), config.crane.user_balance)
        self._model = model
        self._config = config
        self._device = device

    @property
    def step_size(self) -> int:
        """Interactions of one step of the optimiser."""
        return self._config.train.batch_size * self._config.train.batches_per_step

    def num_steps(self) -> int:
        """Return the number of steps in an epoch."""
        return -(-len(self.learned) // self.step_size)

    def order(self, epoch: int) -> np.ndarray:
        """Return the interactions to learn from in the order of an epoch: int64."""
        return self.learned[generator_for(self._config.train.seed, Purpose.ORDER, epoch).permutation(len(self.learned))]

    def of_step(self, picked: np.ndarray, epoch: int, step: int) -> Iterator[Batch]:
        """Yield the batches of one step, made one at a time.

        Where rows share negatives, rows of a user come into the same batch: its negatives are scored once for all.

        Args:
            picked: int, the step's interactions.
            epoch, step: where it stands.
        """
        size = self._config.train.batch_size
        first = step * self._config.train.batches_per_step
        if self._model.shares_negatives and len(picked) > size:
            generator = generator_for(self._config.train.seed, Purpose.USERS, epoch, step)
            places = generator.permutation(self._model.num_users)[self.edges.users[picked]]
            # Place and position in one number: a fifth of the time of a stable argsort.
            picked = picked[np.sort((places << 32) + np.arange(len(picked))) & 0xFFFFFFFF]
        starts = range(0, len(picked), size)

        def draw(start: int) -> Batch:
            number = first + start // size
            generator = generator_for(self._config.train.seed, Purpose.NEGATIVES, epoch, number)
            return self._draw(picked[start : start + size], generator)

        for batch in in_order(draw, starts, _THREADS if self._device.type == "cuda" else 0):
            yield batch.to(self._device)

    def first(self, order: np.ndarray, epoch: int) -> Batch:
        """Return the first batch of an epoch."""
        return next(self.of_step(order[: self._config.train.batch_size], epoch, 0))

    def batch(self, picked: np.ndarray, generator: np.random.Generator) -> Batch:
        """Return the batch of some training interactions, with negatives drawn by the generator."""
        return self._draw(picked, generator).to(self._device)

    def _draw(self, picked: np.ndarray, generator: np.random.Generator) -> Batch:
        """Return the batch on the CPU."""
        edges = self.edges.where(picked)
        users = edges.users
        columns = {"users": users, "positives": edges.items}
        if self._model.shares_negatives:
            distinct, rows = np.unique(users, return_inverse=True)
            negatives, met = self.sampler.shared(distinct, self._config.crane.num_negatives, generator)
            weights = self.weights[users] if edges.weights is None else self.weights[users] * edges.weights
            columns |= {"negatives": negatives, "met": met, "weights": weights, "distinct": distinct, "rows": rows}
        else:
            columns["negatives"] = self.sampler.one_each(users, generator)
            if edges.weights is not None:
                columns["weights"] = edges.weights
        if self._model.contrasts_kinds:
            columns["known"] = self.sampler.met(np.unique(users), np.unique(columns["positives"]))
        contrasted = None
        if self._model.contrasted_nodes is not None:
            kinds = (np.unique(users), np.unique(edges.items))
            users_, items_ = (self._sample(kind, self._model.contrasted_nodes, generator) for kind in kinds)
            contrasted = users_, items_
        rank, world_size = ranks()
        tensors = {name: self._tensor(column) for name, column in columns.items()}
        return Batch(**tensors, rank=rank, world_size=world_size, contrasted=contrasted)

    def _sample(self, nodes: np.ndarray, size: int, generator: np.random.Generator) -> Sample:
        """Draw at most `size` of some distinct nodes."""
        drawn = np.sort(generator.choice(nodes, size, replace=False)) if len(nodes) > size else nodes
        return Sample(self._tensor(drawn), len(nodes))

    def _tensor(self, column: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(column.astype(np.int64) if column.dtype.kind == "i" else column)
        # From pinned memory a GPU copies while it computes.
        return tensor.pin_memory() if self._device.type == "cuda" else tensor


def in_order(compute: Callable[[int], Result], inputs: Sequence[int], num_threads: int) -> Iterator[Result]:
    """Yield the results for some inputs in their order, computed ahead by some threads, or in turn by none."""
    if num_threads == 0:
        yield from map(compute, inputs)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        ahead = deque(pool.submit(compute, each) for each in inputs[: 2 * num_threads])
        for each in inputs[2 * num_threads :]:
            yield ahead.popleft().result()
            ahead.append(pool.submit(compute, each))
        while ahead:
            yield ahead.popleft().result()


def user_weights(counts: np.ndarray, balance: float) -> np.ndarray:
    """Return `n^-balance` for a user with n training interactions, scaled to 1 on average over interactions.

    Args:
        counts: int [num_users].
        balance: `crane.user_balance`.

    Returns:
        float32 [num_users].
    """
    counts = counts.astype(np.float64)
    weights = np.zeros(len(counts))
    np.power(counts, -balance, out=weights, where=counts > 0)
    return (weights * counts.sum() / max((weights * counts).sum(), 1e-12)).astype(np.float32)
