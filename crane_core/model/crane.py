"""CRANE: a semantic view beside the behavioural view of LightGCN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crane_core.model.content import Content, JointContent
from crane_core.model.lightgcn import LightGCN
from crane_core.model.losses import info_nce
from crane_core.model.propagation import SymmetricGraph, propagate
from crane_core.model.sharding import Shards
from crane_core.model.views import Batch, PickedViews, Sample, Views
from crane_core.model_config import ModelConfig
from crane_core.numerics.initial import xavier
from crane_core.ranks import ranks


class Crane(LightGCN):
    """A semantic view `h` from refined content beside the behavioural view `e` (arXiv 2601.11151, section 3.4).

    Departures from the paper, chosen by validation recall. Each is a field of `CraneSettings`; the preset `paper` has
    the paper's choice:

    - `h` spreads ID embeddings gated by content over the item graph instead of content itself (the gate of MGCN,
      arXiv 2308.03588), so both views live in one space, and `h_u` sums the user's items; a projection of a node's
      own refined row is added, so that a user is also what the refined profile says;
    - a gate driven by `e` weighs every dimension of `h` before it enters `z`;
    - ranking is learned by a sampled softmax with warm negatives, in which a user's weight grows slower than the
      user's history. A cold item is ranked by the mean length of its neighbours in the item graph.

    Args:
        num_users, num_items: sizes of the id maps.
        content: refined rows and the item graph, frozen or learned with the rest.
        config: sizes and loss weights.
    """

    def __init__(self, num_users: int, num_items: int, content: Content | JointContent, config: ModelConfig) -> None:
        super().__init__(num_users, num_items, config, config.crane.loss)
        self.content = content
        self.user_shards, self.item_shards = (Shards((size,), *ranks()) for size in (num_users, num_items))
        self._cut: tuple[SymmetricGraph, SymmetricGraph] | None = None
        self.edge_dropout = config.crane.edge_dropout
        self.contrasts_kinds = config.crane.contrast_negatives == "both_kinds"
        # Between users and items every pair must be known, so no sample is drawn.
        self.contrasted_nodes = None if self.contrasts_kinds else config.crane.contrast_nodes
        self.num_views = 3
        self.content_width = content.width if config.crane.own_content else 0
        generator = torch.Generator().manual_seed(config.train.seed + 1)
        dim, width = config.lightgcn.embedding_dim, content.width
        self.fusion = nn.Parameter(xavier((width, dim), generator))
        self.fusion_bias = nn.Parameter(torch.zeros(dim))
        if config.crane.own_content:
            self.own = nn.Parameter(xavier((width, dim), generator))
        if config.crane.semantic_weight == "gate":
            self.trust = nn.Parameter(xavier((dim, dim), generator))
            self.trust_bias = nn.Parameter(torch.zeros(dim))
        elif config.crane.semantic_weight == "scale":
            self.trust = nn.Parameter(torch.full((1,), 0.1))

    def shard(self, shards: Shards) -> None:
        """Keep the embeddings of one rank. Content stays whole; every rank computes the semantic view of its rows."""
        super().shard(shards)
        self.user_shards, self.item_shards = (Shards((size,), shards.rank, shards.world_size) for size in shards.sizes)

    def chosen(self) -> tuple[int, str] | None:
        """Return the epochs and the name of the ranking that are given; None where validation chooses them."""
        choices = self.config.choices
        return None if choices is None else (choices.crane_epochs, choices.crane_ranking)

    def start_epoch(self, epoch: int) -> None:
        """Let the content build its graph anew where that is due."""
        self.content.start_epoch(epoch)

    def forward(self, graph: SymmetricGraph) -> Views:
        """`z = e + t h`, `t = sigmoid(e W_t + b_t)`.

        With `X = [X_1 ; ... ; X_M]`, the refined rows: `F = X W_F + b_F`, `h_i = G_II^L (id_i sigmoid(F_i)) + X_i W_O`,
        and `h_u` is the normalised sum of the spread IDs over the user's training items, plus `X_u W_O`. For the other
        forms see `CraneSettings`.
        """
        behaviour = propagate(graph, self.ids, self.config.lightgcn.num_layers)
        semantic = self._semantic(graph)
        if self.config.crane.semantic_weight == "gate":
            final = behaviour + torch.sigmoid(behaviour @ self.trust + self.trust_bias) * semantic
        elif self.config.crane.semantic_weight == "scale":
            final = behaviour + self.trust * semantic
        else:
            final = behaviour + semantic
        return Views(final, behaviour, semantic)

    def losses(self, views: Views | PickedViews, batch: Batch) -> dict[str, Tensor]:
        """Return LightGCN's terms and `contrast`: beta times the InfoNCE of `e` and `h`, over users and over items.

        Of a large batch a sample of the nodes is contrasted (`contrast_nodes`); the paper contrasts all.
        With `contrast_negatives=both_kinds` it is over both at once. Then a user and an item that have met in training
        are no negatives of each other.
        """
        assert views.semantic is not None
        kinds: list[Tensor | Sample] = [batch.users, batch.positives + self.num_users]
        false = None
        if batch.contrasted is not None:
            users, items = batch.contrasted
            kinds = [users, items._replace(nodes=items.nodes + self.num_users)]
        if self.contrasts_kinds:
            assert batch.known is not None
            # Ascending, the distinct users come before the distinct items.
            among_users, among_items = (batch.known.new_zeros(size, size) for size in batch.known.shape)
            kinds = [torch.cat([batch.users, batch.positives + self.num_users])]
            false = _beside(among_users, batch.known, among_items)
        contrast = torch.stack(
            [
                info_nce(views.behaviour, views.semantic, nodes, batch, self.config.crane.contrast_temperature, false)
                for nodes in kinds
            ]
        ).sum()
        return super().losses(views, batch) | {"contrast": self.config.crane.contrast_weight * contrast}

    def _lengths(self, items: Tensor, graph: SymmetricGraph) -> Tensor:
        is_warm = graph.degrees()[self.num_users :] > 0
        return fill_cold(super()._lengths(items, graph), is_warm, self.content.graph)

    def _item_graph(self) -> SymmetricGraph:
        """Return this rank's rows of the content's graph, selected anew when the content has built another graph."""
        whole = self.content.graph
        if self.item_shards.world_size == 1:
            return whole
        if self._cut is None or self._cut[0] is not whole:
            self._cut = whole, SymmetricGraph(whole.matrix[self.item_shards.parts()[0]], whole.device, self.item_shards)
        return self._cut[1]

    def _semantic(self, graph: SymmetricGraph) -> Tensor:
        item_rows, user_rows = self.content.rows()
        item_rows = self.item_shards.local(item_rows)
        user_rows = None if user_rows is None else self.user_shards.local(user_rows)
        num_users, item_graph = self.user_shards.num_local, self._item_graph()
        items = item_rows.flatten(1) @ self.fusion + self.fusion_bias
        if self.config.crane.semantic_items == "ids":
            items = self.ids[num_users:] * torch.sigmoid(items)
        for _ in range(self.config.crane.num_item_layers):
            items = item_graph @ items
        if self.config.crane.semantic_users == "profiles":
            assert user_rows is not None
            users = user_rows.flatten(1) @ self.fusion + self.fusion_bias
        else:
            users = graph.spread(items)
        semantic = torch.cat([users, items])
        if self.config.crane.own_content:
            assert user_rows is not None
            semantic = semantic + torch.cat([user_rows, item_rows]).flatten(1) @ self.own
        return semantic


def fill_cold(rows: Tensor, is_warm: Tensor, graph: SymmetricGraph) -> Tensor:
    """Give cold items the mean row of their warm neighbours, weighted by the item graph.

    A cold item without a warm neighbour gets a zero row.

    Args:
        rows: float32 [num_items, d]; only rows of warm items were learned.
        is_warm: bool [num_items].
        graph: the item graph.
    """
    is_warm = is_warm[:, None]
    weights = graph.multiply(is_warm.float())
    filled = graph.multiply(rows * is_warm) / weights.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(is_warm, rows, filled)


def _beside(users: Tensor, between: Tensor, items: Tensor) -> Tensor:
    """Return the symmetric matrix of a block among users, a block among items, and the block between them."""
    return torch.cat([torch.cat([users, between], dim=1), torch.cat([between.T, items], dim=1)])
