"""LightGCN: propagated ID embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crane_core.model.losses import bpr, sampled_softmax
from crane_core.model.propagation import SymmetricGraph, propagate
from crane_core.model.sharding import Shards
from crane_core.model.views import Batch, PickedViews, Rows, Views
from crane_core.model_config import Loss, ModelConfig
from crane_core.numerics.initial import xavier_rows
from crane_core.ranks import ranks

POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Powers of the length of an item's row that scores may be multiplied by; validation chooses one."""


class LightGCN(nn.Module):
    """Propagated ID embeddings (He et al., arXiv 2002.02126).

    The paper learns with BPR and ranks by dot products. A sampled softmax over cosines leaves the length of a row free,
    and propagation gives it the item's popularity. Items are then ranked by cosine times length to a power, which
    validation chooses.

    In a distributed training it holds the embeddings of this rank, and makes no others.

    Args:
        num_users, num_items: sizes of the id maps.
        config: sizes and loss weights.
        loss: of the ranking; LightGCN's own is BPR.

    Attributes:
        edge_dropout: share of the edges that a training epoch drops; LightGCN keeps all of them.
        shares_negatives: whether the rows of a batch share their negatives; otherwise each row has one.
        contrasts_kinds: whether users are contrasted with items; this needs `Batch.known`.
        contrasted_nodes: most distinct nodes of a kind that are contrasted in a batch; None for all, or no contrast.
        num_views: number of views that differ.
        content_width: numbers that the view reads of a node's refined row.
    """

    def __init__(self, num_users: int, num_items: int, config: ModelConfig, loss: Loss = "bpr") -> None:
        super().__init__()
        self.edge_dropout = 0.0
        self.shares_negatives = loss == "softmax"
        self.contrasts_kinds = False
        self.contrasted_nodes: int | None = None
        self.num_views = 1
        self.content_width = 0
        self.num_users = num_users
        self.num_items = num_items
        self.config = config
        self.shards = Shards((num_users, num_items), *ranks())
        generator = torch.Generator().manual_seed(config.train.seed)
        dim, kinds = config.lightgcn.embedding_dim, (Shards((size,), *ranks()) for size in (num_users, num_items))
        self.ids = nn.Parameter(
            torch.cat([xavier_rows((kind.num_rows, dim), kind.parts()[0], generator) for kind in kinds])
        )

    def shard(self, shards: Shards) -> None:
        """Keep the embeddings of one rank. `forward` then returns the rows of that rank, from its rows of the graph."""
        if self.shards.world_size == 1:
            self.ids = nn.Parameter(shards.local(self.ids.detach()).clone())
        assert len(self.ids) == shards.num_local
        self.shards = shards

    def chosen(self) -> tuple[int, str] | None:
        """Return the epochs and the name of the ranking that are given; None where validation chooses them."""
        choices = self.config.choices
        return None if choices is None else (choices.behaviour_epochs, "dot")

    def start_epoch(self, epoch: int) -> None:
        """Prepare an epoch; called before its first step, the same on every rank.

        All that it changes must be in the state dict: a training resumed within the epoch does not call it again.
        """

    def forward(self, graph: SymmetricGraph) -> Views:
        """Return the rows of all nodes from the user-item graph."""
        behaviour = propagate(graph, self.ids, self.config.lightgcn.num_layers)
        return Views(behaviour, behaviour, None)

    def losses(self, views: Views | PickedViews, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted terms of the loss, this rank's part of the mean over the batch.

        Summed over ranks, values and gradients are those of the whole batch.

        Returns:
            `ranking`: BPR or the sampled softmax on `z`. `regularisation`: lambda / 2 times the squared norm of the
            batch's embeddings.
        """
        nodes = [batch.users, batch.positives + self.num_users]
        if not self.shares_negatives:
            nodes.append(batch.negatives + self.num_users)
        # A rank that keeps a shard counts the nodes that it keeps; a rank that keeps all nodes, those of its rows.
        mine = self.shards.own if self.shards.world_size > 1 else batch.mine
        penalty = (
            self.config.lightgcn.regularisation
            / 2
            * self._regularised(views, torch.cat([mine(each) for each in nodes]))
        )
        return {"ranking": self._ranking(views, batch), "regularisation": penalty / len(batch.users)}

    def rankings(self, views: Views, graph: SymmetricGraph) -> dict[str, Rows]:
        """Return the ways to rank by these views; validation chooses one.

        Returns:
            name to users float32 [num_users, d] and items float32 [num_items, d], whose dot products are the scores.
        """
        users, items = views.final[: self.num_users], views.final[self.num_users :]
        if not self.shares_negatives:
            return {"dot": (users, items)}
        lengths = self._lengths(items, graph)
        users, items = F.normalize(users, dim=1), F.normalize(items, dim=1)
        return {f"length^{power:g}": (users, items * lengths**power) for power in POWERS}

    def _lengths(self, items: Tensor, graph: SymmetricGraph) -> Tensor:
        """Return the length of every item's row, which stands for its popularity: float32 [num_items, 1]."""
        return items.norm(dim=1, keepdim=True)

    def _ranking(self, views: Views | PickedViews, batch: Batch) -> Tensor:
        positives = views.final[batch.mine(batch.positives + self.num_users)]
        if not self.shares_negatives:
            users = views.final[batch.mine(batch.users)]
            negatives = views.final[batch.mine(batch.negatives) + self.num_users]
            values = bpr(users, positives, negatives)
            if batch.weights is not None:
                values = batch.mine(batch.weights) * values
            return values.sum() / len(batch.users)
        assert batch.met is not None and batch.weights is not None
        negatives = views.final[batch.negatives + self.num_users]
        users, met, rows = _users(batch, batch.met)
        values = sampled_softmax(
            views.final[users], positives, negatives, met, self.config.crane.ranking_temperature, rows
        )
        return (batch.mine(batch.weights) * values).sum() / len(batch.users)

    def _regularised(self, views: Views | PickedViews, nodes: Tensor) -> Tensor:
        """Return the squared norm of the nodes' ID embeddings, as in the LightGCN paper."""
        return views.ids.total(nodes) if isinstance(views, PickedViews) else self.ids[nodes].square().sum()


def _users(batch: Batch, met: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the users of this rank's rows, the negatives that each has met, and each row's place among the users."""
    if batch.distinct is None or batch.rows is None:
        return batch.mine(batch.users), batch.mine(met), None
    if batch.world_size == 1:
        return batch.distinct, met, batch.rows
    wanted, rows = torch.unique(batch.mine(batch.rows), return_inverse=True)
    return batch.distinct[wanted], met[wanted], rows
