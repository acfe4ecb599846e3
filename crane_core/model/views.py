"""Batches, and the rows of all nodes that a model makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crane_core.model.sharding import Shards

Rows = tuple[Tensor, Tensor]
"""Users float32 [num_users, d] and items float32 [num_items, d]; scores are their dot products."""

_WAITING_ON_GPU = 1 << 18
"""Rows of gradients that wait on a GPU to be added at once: a sum with the same bits in each run takes ten launches."""


class Sample(NamedTuple):
    """Some of the distinct nodes of one kind in a batch.

    Attributes:
        nodes: int64 [n], ascending.
        num_distinct: how many there are, n or more.
    """

    nodes: Tensor
    num_distinct: int


class Batch(NamedTuple):
    """A batch of training interactions, with negatives.

    Every rank holds the same batch and computes the loss of every `world_size`-th row of it.

    Attributes:
        users, positives: int64 [n], the interactions.
        negatives: int64 [n], one for each row; or int64 [m], shared by all rows.
        rank, world_size: of the training.
        met: bool [u, m], shared negatives that each distinct user has met in training; bool [n, m], by row, where
            `distinct` is None.
        weights: float32 [n], how much each row counts; None where all count 1, which shared negatives never have.
        known: bool [distinct users, distinct positives], both ascending: which of these items each of these users has
            met in training. Only for a contrast between users and items.
        distinct: int64 [u], the distinct users, ascending. Only with shared negatives.
        rows: int64 [n], place of each row's user in `distinct`.
        contrasted: users and items that are contrasted; None for all.
    """

    users: Tensor
    positives: Tensor
    negatives: Tensor
    rank: int = 0
    world_size: int = 1
    met: Tensor | None = None
    weights: Tensor | None = None
    known: Tensor | None = None
    distinct: Tensor | None = None
    rows: Tensor | None = None
    contrasted: tuple[Sample, Sample] | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, copied from pinned memory while the device computes."""

        def moved(value: Any) -> Any:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        batch = Batch(*map(moved, self))
        if self.contrasted is None:
            return batch
        users, items = (Sample(*map(moved, each)) for each in self.contrasted)
        return batch._replace(contrasted=(users, items))

    def mine(self, rows: Tensor) -> Tensor:
        """Select the rows whose loss this rank computes."""
        return rows[self.rank :: self.world_size]


@dataclass(frozen=True)
class Views:
    """Rows of all nodes, users first.

    Attributes:
        final: `z`, float32 [num_users + num_items, d]; scores are dot products of its rows.
        behaviour: `e`, the LightGCN rows.
        semantic: `h`; None for a model without content.
    """

    final: Tensor
    behaviour: Tensor
    semantic: Tensor | None

    def collect(self, shards: Shards) -> Views:
        """Gather the rows of all ranks, without a gradient."""
        final = shards.collect(self.final.detach())
        behaviour = final if self.behaviour is self.final else shards.collect(self.behaviour.detach())
        return Views(final, behaviour, None if self.semantic is None else shards.collect(self.semantic.detach()))


class Picked:
    """Rows to select from, whose gradients are summed here.

    Plain indexing would make a gradient of the size of all rows at every selection.

    Args:
        rows: float32 [n, d].
        most_waiting: rows of gradients that wait to be added at once; by the device when None.
    """

    def __init__(self, rows: Tensor, most_waiting: int | None = None) -> None:
        self.rows = rows.detach()
        self._most_waiting = (_WAITING_ON_GPU if rows.is_cuda else 0) if most_waiting is None else most_waiting
        self._gradient = torch.zeros_like(self.rows)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        # Autograd records only what an input with a gradient goes into.
        self._anchor = rows.new_zeros((), requires_grad=True)

    def __getitem__(self, nodes: Tensor) -> Tensor:
        """Select the rows of some nodes: int64 [m] -> float32 [m, d]."""
        return _Pick.apply(self._anchor, self, nodes)

    def add(self, nodes: Tensor, gradient: Tensor) -> None:
        """Add a gradient of some nodes: int64 [m], float32 [m, d]."""
        self._waiting.append((nodes, gradient))
        if sum(len(each) for each, _ in self._waiting) >= self._most_waiting:
            self._add_waiting()

    def gradient(self) -> Tensor:
        """Return the sum over all backward passes, float32 [n, d]."""
        if self._waiting:
            self._add_waiting()
        return self._gradient

    def _add_waiting(self) -> None:
        # To join a single one would copy it.
        nodes, gradients = (each[0] if len(each) == 1 else torch.cat(each) for each in zip(*self._waiting, strict=True))
        self._gradient.index_add_(0, nodes, gradients)
        self._waiting.clear()

    def new_zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Return zeros, as the method of a tensor."""
        return self.rows.new_zeros(shape)


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, source: Picked, nodes: Tensor) -> Tensor:
        ctx.source, ctx.nodes = source, nodes
        # Indexing would take four times as long on a CPU.
        return source.rows.index_select(0, nodes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.source.add(ctx.nodes, gradients[0])
        return None, None, None


class SquaredNorms:
    """Squared norms of rows, whose gradients are summed here: one number for a node instead of its row.

    Args:
        rows: float32 [n, d].
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows.detach()
        self.norms = self.rows.square().sum(1)
        self.counts = torch.zeros_like(self.norms)
        self._anchor = rows.new_zeros((), requires_grad=True)

    def total(self, nodes: Tensor) -> Tensor:
        """Return the sum of the squared norms of some nodes, repeats allowed: int64 [m] -> float32 []."""
        return _AddNorms.apply(self._anchor, self, nodes)

    def gradient(self) -> Tensor:
        """Return the gradient of the rows, float32 [n, d], summed over all backward passes."""
        return 2 * self.counts[:, None] * self.rows


class _AddNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, source: SquaredNorms, nodes: Tensor) -> Tensor:
        ctx.source, ctx.nodes = source, nodes
        return source.norms.index_select(0, nodes).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.source.counts.index_add_(0, ctx.nodes, gradients[0].expand(len(ctx.nodes)))
        return None, None, None


@dataclass(frozen=True)
class PickedViews:
    """Holds what the losses of a step read: the views of all ranks, and the norms of this rank's ID embeddings.

    Attributes:
        final, behaviour, semantic: as in `Views`.
        ids: of the embeddings that this rank keeps.
    """

    final: Picked
    behaviour: Picked
    semantic: Picked | None
    ids: SquaredNorms

    @classmethod
    def of(cls, views: Views, ids: nn.Parameter, shards: Shards) -> PickedViews:
        """Gather the rows of all ranks, once for a step."""
        rows = views.collect(shards)
        final = Picked(rows.final)
        behaviour = final if rows.behaviour is rows.final else Picked(rows.behaviour)
        return cls(final, behaviour, None if rows.semantic is None else Picked(rows.semantic), SquaredNorms(ids))

    def backward(self, views: Views, ids: nn.Parameter, shards: Shards) -> None:
        """Sum the gradients of the rows over the ranks, and propagate them back through this rank's part of `views`."""
        pairs = ((self.final, views.final), (self.behaviour, views.behaviour), (self.semantic, views.semantic))
        reached = {rows: picked for picked, rows in pairs if picked is not None and rows is not None}
        gradients = [shards.add_up(picked.gradient()) for picked in reached.values()]
        torch.autograd.backward([*reached, ids], [*gradients, self.ids.gradient()])
