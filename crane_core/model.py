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
        semantic: `h`; None for a model without content.
    """

    final: Tensor
    behaviour: Tensor
    semantic: Tensor | None


class LightGCN(nn.Module):
    """Propagated ID embeddings (He et al., arXiv 2002.02126).

    Args:
        num_users, num_items: sizes of the id maps.
        config: sizes and loss weights.

    Attributes:
        edge_dropout: share of the edges a training epoch goes without; LightGCN keeps them all.
    """

    def __init__(self, num_users: int, num_items: int, config: Train) -> None:
        super().__init__()
        self.edge_dropout = 0.0
        self.num_users = num_users
        self.num_items = num_items
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        self.ids = nn.Parameter(
            torch.cat([_xavier(size, config.embedding_dim, generator) for size in (num_users, num_items)])
        )

    def forward(self, graph: SymmetricGraph) -> Views:
        """Rows of all nodes from the user-item graph."""
        behaviour = propagate(graph, self.ids, self.config.num_layers)
        return Views(behaviour, behaviour, None)

    def losses(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss, weighted: means over the batch, of which this rank adds up its own rows.

        Summed over ranks, values and gradients are those of the whole batch.
        `ranking`: BPR on `z`. `regularisation`: lambda / 2 times the squared norm of the triples' embeddings.
        """
        triples = [batch.mine(batch.users)]
        triples += [batch.mine(items) + self.num_users for items in (batch.positives, batch.negatives)]
        users, positives, negatives = (views.final[rows] for rows in triples)
        size = len(batch.users)
        return {
            "ranking": F.softplus(-(users * (positives - negatives)).sum(1)).sum() / size,
            "regularisation": self.config.regularisation / 2 * self._regularised(views, torch.cat(triples)) / size,
        }

    def _regularised(self, views: Views, nodes: Tensor) -> Tensor:
        """Squared norm of the nodes' ID embeddings, as the LightGCN paper has it."""
        return self.ids[nodes].square().sum()


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
    """A semantic view `h` from refined content beside the behavioural view `e` (arXiv 2601.11151, section 3.4).

    Departures from the paper, chosen by validation recall: `h` spreads ID embeddings
    gated by content over the item graph instead of content itself (the gate of MGCN, arXiv 2308.03588), so both views
    live in one space; every dimension of `h` enters `z` as far as a gate driven by `e` trusts it; and the norm of the
    final rows is regularised, not that of the ID embeddings alone. `h_u` sums the user's items; the refined user rows
    serve the fit of RCA only.

    Args:
        num_users, num_items: sizes of the id maps.
        content: frozen refined rows and the item graph.
        config: sizes and loss weights.
    """

    def __init__(self, num_users: int, num_items: int, content: Content, config: Train) -> None:
        super().__init__(num_users, num_items, config)
        self.content = content
        self.edge_dropout = config.edge_dropout
        generator = torch.Generator().manual_seed(config.seed + 1)
        dim, width = config.embedding_dim, content.items[0].numel()
        self.fusion = nn.Parameter(_xavier(width, dim, generator))
        self.fusion_bias = nn.Parameter(torch.zeros(dim))
        self.trust = nn.Parameter(_xavier(dim, dim, generator))
        self.trust_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, graph: SymmetricGraph) -> Views:
        """`z = e + sigmoid(e W_t + b_t) h`.

        `h_i = G_II^L (id_i sigmoid(F_i))` with `F = [X_1 ; ... ; X_M] W_F + b_F` from the refined rows, and `h_u` the
        normalised sum of `h_i` over the user's training items.
        """
        behaviour = propagate(graph, self.ids, self.config.num_layers)
        fused = self.content.items.flatten(1) @ self.fusion + self.fusion_bias
        items = self.ids[self.num_users :] * torch.sigmoid(fused)
        for _ in range(self.config.num_item_layers):
            items = self.content.graph @ items
        spread = graph @ torch.cat([torch.zeros_like(self.ids[: self.num_users]), items])
        semantic = torch.cat([spread[: self.num_users], items])
        trusted = torch.sigmoid(behaviour @ self.trust + self.trust_bias) * semantic
        return Views(behaviour + trusted, behaviour, semantic)

    def losses(self, views: Views, batch: Batch) -> dict[str, Tensor]:
        """LightGCN's terms and `contrast`: beta times the InfoNCE of `e` and `h`, over users and over items."""
        assert views.semantic is not None
        users, items = batch.users, batch.positives + self.num_users
        contrast = info_nce(views.behaviour, views.semantic, users, batch, self.config.temperature)
        contrast = contrast + info_nce(views.behaviour, views.semantic, items, batch, self.config.temperature)
        return super().losses(views, batch) | {"contrast": self.config.contrast_weight * contrast}

    def _regularised(self, views: Views, nodes: Tensor) -> Tensor:
        return views.final[nodes].square().sum()


def _xavier(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * (6 / (rows + columns)) ** 0.5
