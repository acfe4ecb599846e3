"""The recommenders: LightGCN, and CRANE, which adds a semantic view to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crane_core.config import Train
from crane_core.content import Content
from crane_core.propagation import SymmetricGraph, propagate


class Batch(NamedTuple):
    """Training triples, int64 [n] each: users, items they met, items they did not.

    Of `world_size` ranks that hold the same batch, rank `rank` answers for every `world_size`-th row.
    """

    users: Tensor
    positives: Tensor
    negatives: Tensor
    rank: int = 0
    world_size: int = 1

    def mine(self, rows: Tensor) -> Tensor:
        """The rows this rank answers for."""
        return rows[self.rank :: self.world_size]


@dataclass(frozen=True)
class Views:
    """Rows of all nodes, users first.

    Attributes:
        final: `z`, float32 [num_users + num_items, d]; scores are dot products of its rows.
        behaviour: `e`, the LightGCN rows.
        semantic: `h`, as it enters `z`; None for a model without content.
    """

    final: Tensor
    behaviour: Tensor
    semantic: Tensor | None


class LightGCN(nn.Module):
    """Propagated ID embeddings (He et al., arXiv 2002.02126).

    Args:
        num_users, num_items: sizes of the id maps.
        config: sizes and loss weights.
    """

    def __init__(self, num_users: int, num_items: int, config: Train) -> None:
        super().__init__()
        self.num_users = num_users
        self.num_items = num_items
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        bounds = [(6 / (size + config.embedding_dim)) ** 0.5 for size in (num_users, num_items)]
        self.ids = nn.Parameter(
            torch.cat(
                [
                    (torch.rand(size, config.embedding_dim, generator=generator) * 2 - 1) * bound
                    for size, bound in zip((num_users, num_items), bounds, strict=True)
                ]
            )
        )

    def forward(self, graph: SymmetricGraph) -> Views:
        """Rows of all nodes from the user-item graph."""
        behaviour = propagate(graph, self.ids, self.config.num_layers)
        return Views(behaviour, behaviour, None)

    def losses(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss, weighted: means over the batch, of which this rank adds up its own rows.

        Summed over ranks, values and gradients are those of the whole batch.
        `ranking`: BPR on `z`. `regularisation`: lambda / 2 times the squared norm of the triples' ID embeddings.
        """
        users = batch.mine(batch.users)
        positives, negatives = (batch.mine(items) + self.num_users for items in (batch.positives, batch.negatives))
        margin = (views.final[users] * (views.final[positives] - views.final[negatives])).sum(1)
        norms = torch.stack([self.ids[rows].square().sum() for rows in (users, positives, negatives)]).sum()
        size = len(batch.users)
        return {
            "ranking": F.softplus(-margin).sum() / size,
            "regularisation": self.config.regularisation / 2 * norms / size,
        }


def info_nce(anchors: Tensor, others: Tensor, nodes: Tensor, batch: Batch, temperature: float) -> Tensor:
    """Agreement of two views of the same nodes (van den Oord et al., arXiv 1807.03748), cosine similarity.

    The positive of a node is itself in the other view; its negatives are the other distinct nodes of the batch,
    of the same kind, over all ranks.

    Args:
        anchors, others: float32 [num_nodes, d], the views.
        nodes: int64 [n], nodes of the batch, repeats allowed.
        batch: says which of the distinct nodes are this rank's.
        temperature: tau.

    Returns:
        Sum over this rank's distinct nodes, divided by the number of distinct nodes of the batch.
    """
    distinct = torch.unique(nodes)
    own = batch.mine(torch.arange(len(distinct), device=nodes.device))
    left = F.normalize(anchors[distinct[own]], dim=1)
    right = F.normalize(others[distinct], dim=1)
    return F.cross_entropy(left @ right.T / temperature, own, reduction="sum") / len(distinct)


class Crane(LightGCN):
    """LightGCN's behavioural view `e` plus a semantic view `h` from refined content (arXiv 2601.11151).

    Args:
        num_users, num_items: sizes of the id maps.
        content: frozen refined rows and the item graph.
        config: sizes and loss weights.
    """

    def __init__(self, num_users: int, num_items: int, content: Content, config: Train) -> None:
        super().__init__(num_users, num_items, config)
        self.content = content
        generator = torch.Generator().manual_seed(config.seed + 1)
        width = content.items.shape[1] * content.items.shape[2]
        bound = (6 / (width + config.embedding_dim)) ** 0.5
        self.fusion = nn.Parameter((torch.rand(width, config.embedding_dim, generator=generator) * 2 - 1) * bound)
        self.gate_bias = nn.Parameter(torch.zeros(config.embedding_dim))
        self.trust = nn.Parameter(torch.tensor(1.0))

    def forward(self, graph: SymmetricGraph) -> Views:
        """Rows of all nodes from the user-item graph, the item graph and the content."""
        behaviour = propagate(graph, self.ids, self.config.num_layers)
        gates = torch.sigmoid(self.content.items.flatten(1) @ self.fusion + self.gate_bias)
        items = self.ids[self.num_users :] * gates
        for _ in range(self.config.num_item_layers):
            items = self.content.graph @ items
        spread = graph @ torch.cat([torch.zeros_like(self.ids[: self.num_users]), items])
        semantic = self.trust * torch.cat([spread[: self.num_users], items])
        return Views(behaviour + semantic, behaviour, semantic)

    def losses(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        """LightGCN's terms and `contrast`: beta times the InfoNCE of `e` and `h`, over users and over items."""
        assert views.semantic is not None
        users, items = batch.users, batch.positives + self.num_users
        contrast = info_nce(views.behaviour, views.semantic, users, batch, self.config.temperature)
        contrast = contrast + info_nce(views.behaviour, views.semantic, items, batch, self.config.temperature)
        return super().losses(views, batch) | {"contrast": self.config.contrast_weight * contrast}
