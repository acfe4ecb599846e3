"""Rows of nodes, sharded over the ranks of a training.

A rank keeps some users and some items: their embeddings, their optimiser state and their rows of the graph. Users and
items are partitioned separately, so that every rank gets about as many edges: an item has more edges than a user. The
collectives are torch's; shards of uneven size are padded to the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from crane_core.errors import ConfigError


class Shards:
    """The rows of each kind of node that a rank keeps: consecutive, and as many on every rank up to one row.

    Args:
        sizes: number of nodes of each kind. The rows of all nodes hold one kind after the other.
        rank, world_size: of the training.

    Raises:
        ConfigError: there are more ranks than nodes of a kind.
    """

    def __init__(self, sizes: Sequence[int], rank: int = 0, world_size: int = 1) -> None:
        if world_size > max(1, min(sizes)):
            raise ConfigError(
                f"{world_size} ranks cannot share {' and '.join(map(str, sizes))} rows: each keeps one at least.",
                f"Set runtime.world_size to {max(1, min(sizes))} or less.",
            )
        self.sizes = tuple(sizes)
        self.rank = rank
        self.world_size = world_size

    @property
    def num_rows(self) -> int:
        """Number of rows of all nodes."""
        return sum(self.sizes)

    @property
    def num_local(self) -> int:
        """Number of rows that this rank keeps."""
        return sum(part.stop - part.start for part in self.parts())

    def parts(self, rank: int | None = None) -> list[slice]:
        """Return the rows that a rank keeps, this rank when None: a slice of the rows of all nodes for each kind."""
        rank = self.rank if rank is None else rank
        slices, offset = [], 0
        for size in self.sizes:
            start, stop = (offset + size * edge // self.world_size for edge in (rank, rank + 1))
            slices.append(slice(start, stop))
            offset += size
        return slices

    def local(self, rows: Tensor) -> Tensor:
        """Select the rows of this rank from those of all nodes: [num_rows, ...] -> [num_local, ...]."""
        return rows if self.world_size == 1 else torch.cat([rows[part] for part in self.parts()])

    def own(self, nodes: Tensor) -> Tensor:
        """Select the nodes that this rank keeps, and return their local row numbers: int64 [n] -> [m], m <= n."""
        if self.world_size == 1:
            return nodes
        found, offset = [], 0
        for part in self.parts():
            found.append(nodes[(nodes >= part.start) & (nodes < part.stop)] - part.start + offset)
            offset += part.stop - part.start
        return torch.cat(found)

    def collect(self, rows: Tensor) -> Tensor:
        """Gather the rows of all ranks on every rank, without a gradient: [num_local, d] -> [num_rows, d]."""
        if self.world_size == 1:
            return rows
        padded = rows.new_zeros(self._width, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(self.world_size * self._width, *rows.shape[1:])
        dist.all_gather_single(gathered, padded)
        return torch.cat([gathered[place] for place, _ in self._places()])

    def add_up(self, rows: Tensor) -> Tensor:
        """Sum over the ranks and return the rows of this rank, without a gradient: [num_rows, d] -> [num_local, d]."""
        if self.world_size == 1:
            return rows
        padded = rows.new_zeros(self.world_size * self._width, *rows.shape[1:])
        for place, part in self._places():
            padded[place] = rows[part]
        received = rows.new_empty(self._width, *rows.shape[1:])
        dist.reduce_scatter_single(received, padded)
        return received[: self.num_local]

    @property
    def _width(self) -> int:
        """Upper bound of the rows of a shard."""
        return sum(-(-size // self.world_size) for size in self.sizes)

    def _places(self) -> Iterator[tuple[slice, slice]]:
        """Yield the places of each part in the gathered rows and among all nodes, in the order of the nodes."""
        shards = [self.parts(rank) for rank in range(self.world_size)]
        for kind in range(len(self.sizes)):
            for rank, parts in enumerate(shards):
                start = rank * self._width + sum(part.stop - part.start for part in parts[:kind])
                yield slice(start, start + parts[kind].stop - parts[kind].start), parts[kind]
