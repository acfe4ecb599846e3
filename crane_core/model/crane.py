"""The recommenders: LightGCN, and CRANE, which adds a semantic view to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crane_core.config import Loss, Train
from crane_core.model.content import Content, JointContent
from crane_core.model.propagation import SymmetricGraph, propagate
from crane_core.model.sharding import Shards

Rows = tuple[Tensor, Tensor]
"""Users float32 [num_users, d] and items float32 [num_items, d]; scores are their dot products."""


class Batch(NamedTuple):
    """Training rows: users and items they met, int64 [n] each, and items they did not.

    `negatives` is int64 [n], one for each row, or int64 [m] shared by all rows; then `met`, bool [n, m], says which of
    them the row's user has met after all, and `weights`, float32 [n], how much each row counts.

    For a contrast between users and items, `known`, bool [distinct users, distinct positives], both ascending, says
    which of these items each of these users has met in training.

    Of `world_size` ranks that hold the same batch, rank `rank` answers for every `world_size`-th row.
    """

    users: Tensor
    positives: Tensor
    negatives: Tensor
    rank: int = 0
    world_size: int = 1
    met: Tensor | None = None
    weights: Tensor | None = None
    known: Tensor | None = None

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

    def collect(self, shards: Shards) -> Views:
        """The rows of all ranks, without a gradient."""
        final = shards.collect(self.final.detach())
        behaviour = final if self.behaviour is self.final else shards.collect(self.behaviour.detach())
        return Views(final, behaviour, None if self.semantic is None else shards.collect(self.semantic.detach()))


class Picked:
    """Rows to pick from, whose gradients add up here: plain indexing makes one of the size of all rows at every pick.

    Args:
        rows: float32 [n, d].

    Attributes:
        gradient: float32 [n, d], what all backward passes have brought.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows.detach()
        self.gradient = torch.zeros_like(self.rows)
        # Autograd records only what an input with a gradient goes into.
        self._anchor = rows.new_zeros((), requires_grad=True)

    def __getitem__(self, nodes: Tensor) -> Tensor:
        """float32 [m, d], the rows of int64 [m] nodes."""
        return _Pick.apply(self._anchor, self, nodes)

    def new_zeros(self, shape: tuple[int, ...]) -> Tensor:
        """As of a tensor."""
        return self.rows.new_zeros(shape)


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, source: Picked, nodes: Tensor) -> Tensor:
        ctx.source, ctx.nodes = source, nodes
        return source.rows[nodes]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.source.gradient.index_add_(0, ctx.nodes, gradients[0])
        return None, None, None


@dataclass(frozen=True)
class PickedViews:
    """What the losses of a step read: views of all ranks and this rank's ID embeddings, each made once for a step.

    Attributes:
        final, behaviour, semantic: as in `Views`.
        ids: the embeddings this rank keeps.
    """

    final: Picked
    behaviour: Picked
    semantic: Picked | None
    ids: Picked

    @classmethod
    def of(cls, views: Views, ids: nn.Parameter, shards: Shards) -> PickedViews:
        """Gather the rows of all ranks."""
        rows = views.collect(shards)
        final = Picked(rows.final)
        behaviour = final if rows.behaviour is rows.final else Picked(rows.behaviour)
        return cls(final, behaviour, None if rows.semantic is None else Picked(rows.semantic), Picked(ids))

    def backward(self, views: Views, ids: nn.Parameter, shards: Shards) -> None:
        """Add up what has reached the rows on all ranks, and send it on through this rank's part of `views`."""
        pairs = ((self.final, views.final), (self.behaviour, views.behaviour), (self.semantic, views.semantic))
        reached = {rows: picked for picked, rows in pairs if picked is not None and rows is not None}
        gradients = [shards.add_up(picked.gradient) for picked in reached.values()]
        torch.autograd.backward([*reached, ids], [*gradients, self.ids.gradient])


POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How far the length of an item's row may count when it is ranked; validation chooses."""


class LightGCN(nn.Module):
    """Propagated ID embeddings (He et al., arXiv 2002.02126).

    The paper learns with BPR and ranks by dot products. With a sampled softmax over cosines the length of a row stays
    free, and propagation gives it the item's popularity: an item is then ranked by cosine times length to a power that
    validation chooses.

    Args:
        num_users, num_items: sizes of the id maps.
        config: sizes and loss weights.
        loss: of the ranking; LightGCN's own is BPR.

    Attributes:
        edge_dropout: share of the edges a training epoch goes without; LightGCN keeps them all.
        shares_negatives: whether the rows of a batch share their negatives, or have one each.
        contrasts_kinds: whether users are contrasted with items, which needs `Batch.known`.
        num_views: how many of the views differ.
        content_width: numbers of a node's refined row that its view reads.
    """

    def __init__(self, num_users: int, num_items: int, config: Train, loss: Loss = "bpr") -> None:
        super().__init__()
        self.edge_dropout = 0.0
        self.shares_negatives = loss == "softmax"
        self.contrasts_kinds = False
        self.num_views = 1
        self.content_width = 0
        self.num_users = num_users
        self.num_items = num_items
        self.config = config
        self.shards = Shards((num_users, num_items))
        generator = torch.Generator().manual_seed(config.seed)
        self.ids = nn.Parameter(
            torch.cat([_xavier(size, config.embedding_dim, generator) for size in (num_users, num_items)])
        )

    def shard(self, shards: Shards) -> None:
        """Keep the embeddings of one rank only; from then on `forward` gives its rows of all nodes, from its graph."""
        self.shards = shards
        self.ids = nn.Parameter(shards.local(self.ids.detach()).clone())

    def start_epoch(self, epoch: int) -> None:
        """Called before the first step of every epoch, the same on every rank.

        Whatever it changes must be in the state dict: a training resumed within the epoch does not call it again.
        """

    def forward(self, graph: SymmetricGraph) -> Views:
        """Rows of all nodes from the user-item graph."""
        behaviour = propagate(graph, self.ids, self.config.num_layers)
        return Views(behaviour, behaviour, None)

    def losses(self, views: Views | PickedViews, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss, weighted: means over the batch, of which this rank adds up its own rows.

        Summed over ranks, values and gradients are those of the whole batch.
        `ranking`: BPR or the sampled softmax on `z`. `regularisation`: lambda / 2 times the squared norm of the
        batch's embeddings.
        """
        nodes = [batch.users, batch.positives + self.num_users]
        if not self.shares_negatives:
            nodes.append(batch.negatives + self.num_users)
        # A rank that keeps a shard answers for the nodes it keeps, one that keeps all of them for its rows.
        mine = self.shards.own if self.shards.world_size > 1 else batch.mine
        penalty = self.config.regularisation / 2 * self._regularised(views, torch.cat([mine(each) for each in nodes]))
        return {"ranking": self._ranking(views, batch), "regularisation": penalty / len(batch.users)}

    def rankings(self, views: Views, graph: SymmetricGraph) -> dict[str, Rows]:
        """The ways to rank by these views, by name; training goes by the one that validation prefers.

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
        """float32 [num_items, 1], what stands for the popularity of an item."""
        return items.norm(dim=1, keepdim=True)

    def _ranking(self, views: Views | PickedViews, batch: Batch) -> Tensor:
        users, positives = (views.final[batch.mine(rows)] for rows in (batch.users, batch.positives + self.num_users))
        if not self.shares_negatives:
            negatives = views.final[batch.mine(batch.negatives) + self.num_users]
            return bpr(users, positives, negatives).sum() / len(batch.users)
        assert batch.met is not None and batch.weights is not None
        negatives = views.final[batch.negatives + self.num_users]
        values = sampled_softmax(users, positives, negatives, batch.mine(batch.met), self.config.ranking_temperature)
        return (batch.mine(batch.weights) * values).sum() / len(batch.users)

    def _regularised(self, views: Views | PickedViews, nodes: Tensor) -> Tensor:
        """Squared norm of the nodes' ID embeddings, as the LightGCN paper has it."""
        ids = views.ids if isinstance(views, PickedViews) else self.ids
        return ids[nodes].square().sum()


def bpr(users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """`-log sigmoid` of score differences (Rendle et al., UAI 2009): float32 [n, d] each -> [n]."""
    return F.softplus(-(users * (positives - negatives)).sum(1))


def sampled_softmax(users: Tensor, positives: Tensor, negatives: Tensor, met: Tensor, temperature: float) -> Tensor:
    """Negative log probability of the positive among itself and the negatives, by cosine (Wu et al., arXiv 2201.02327).

    Args:
        users, positives: float32 [n, d].
        negatives: float32 [m, d], shared by all rows.
        met: bool [n, m], negatives the row's user has met: they are left out of its softmax.
        temperature: what the cosines are divided by.

    Returns:
        float32 [n].
    """
    users, positives, negatives = (F.normalize(rows, dim=1) for rows in (users, positives, negatives))
    users = users / temperature
    return F.softplus(log_sum_exp(users, negatives, met) - (users * positives).sum(1))


def log_sum_exp(left: Tensor, right: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Logarithm of the sum over j of `exp(left_i . right_j)`, in one block of n x m numbers from score to gradient.

    Args:
        left: float32 [n, d].
        right: float32 [m, d].
        left_out: bool [n, m], the pairs that are not in the sum.

    Returns:
        float32 [n]; -inf where all pairs are left out.
    """
    return _LogSumExp.apply(left, right, left_out)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, left_out: Tensor | None) -> Tensor:
        scores = left @ right.T
        if left_out is not None:
            scores.masked_fill_(left_out, -torch.inf)
        limits = torch.finfo(scores.dtype)
        largest = scores.max(1).values.clamp(min=limits.min)
        weights = scores.sub_(largest[:, None]).exp_()
        total = weights.sum(1)
        ctx.save_for_backward(left, right, weights, total.clamp(min=limits.tiny))
        return largest + total.log()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right, weights, total = ctx.saved_tensors
        share = (gradients[0] / total)[:, None]
        return share * (weights @ right), weights.T @ (share * left), None


def info_nce(
    anchors: Tensor | Picked,
    others: Tensor | Picked,
    nodes: Tensor,
    batch: Batch,
    temperature: float,
    false: Tensor | None = None,
) -> Tensor:
    """Agreement of two views of the same nodes (van den Oord et al., arXiv 1807.03748), cosine similarity.

    The positive of a node is itself in the other view; its negatives are the other distinct nodes given, over all
    ranks, the false ones left out.

    Args:
        anchors, others: float32 [num_nodes, d], the views.
        nodes: int64 [n], nodes of the batch, repeats allowed.
        batch: says which of the distinct nodes are this rank's.
        temperature: tau.
        false: bool [distinct nodes, distinct nodes], both ascending: which are no negatives of which.

    Returns:
        Sum over this rank's distinct nodes, divided by the number of distinct nodes of the batch.
    """
    distinct = torch.unique(nodes)
    own = batch.mine(torch.arange(len(distinct), device=nodes.device))
    left = F.normalize(anchors[distinct[own]], dim=1) / temperature
    right = F.normalize(others[distinct], dim=1)
    all_scores = log_sum_exp(left, right, None if false is None else false[own])
    return (all_scores - (left * right[own]).sum(1)).sum() / len(distinct)


class Crane(LightGCN):
    """A semantic view `h` from refined content beside the behavioural view `e` (arXiv 2601.11151, section 3.4).

    Departures from the paper, chosen by validation recall; each is a field of `Train`, and the preset `paper` has the
    paper's choice:

    - `h` spreads ID embeddings gated by content over the item graph instead of content itself (the gate of MGCN,
      arXiv 2308.03588), so both views live in one space, and `h_u` sums the user's items; a projection of a node's
      own refined row is added, so that a user is also what the refined profile says;
    - every dimension of `h` enters `z` as far as a gate driven by `e` trusts it;
    - ranking is learned by a sampled softmax with warm negatives, in which a user's weight grows slower than the
      user's history. An item nobody has met is ranked by the mean length of its neighbours in the item graph.

    Args:
        num_users, num_items: sizes of the id maps.
        content: refined rows and the item graph, frozen or learned with the rest.
        config: sizes and loss weights.
    """

    def __init__(self, num_users: int, num_items: int, content: Content | JointContent, config: Train) -> None:
        super().__init__(num_users, num_items, config, config.loss)
        self.content = content
        self.user_shards, self.item_shards = Shards((num_users,)), Shards((num_items,))
        self._cut: tuple[SymmetricGraph, SymmetricGraph] | None = None
        self.edge_dropout = config.edge_dropout
        self.contrasts_kinds = config.contrast_negatives == "both_kinds"
        self.num_views = 3
        self.content_width = content.width if config.own_content else 0
        generator = torch.Generator().manual_seed(config.seed + 1)
        dim, width = config.embedding_dim, content.width
        self.fusion = nn.Parameter(_xavier(width, dim, generator))
        self.fusion_bias = nn.Parameter(torch.zeros(dim))
        if config.own_content:
            self.own = nn.Parameter(_xavier(width, dim, generator))
        if config.trust == "gate":
            self.trust = nn.Parameter(_xavier(dim, dim, generator))
            self.trust_bias = nn.Parameter(torch.zeros(dim))
        elif config.trust == "scale":
            self.trust = nn.Parameter(torch.full((1,), 0.1))

    def shard(self, shards: Shards) -> None:
        """Content stays whole on every rank, and each computes the semantic view of its own rows."""
        super().shard(shards)
        self.user_shards, self.item_shards = (Shards((size,), shards.rank, shards.world_size) for size in shards.sizes)

    def start_epoch(self, epoch: int) -> None:
        """Let the content build its graph anew."""
        self.content.start_epoch(epoch)

    def forward(self, graph: SymmetricGraph) -> Views:
        """`z = e + t h`, `t = sigmoid(e W_t + b_t)`.

        With `X = [X_1 ; ... ; X_M]`, the refined rows: `F = X W_F + b_F`, `h_i = G_II^L (id_i sigmoid(F_i)) + X_i W_O`,
        and `h_u` is the normalised sum of the spread IDs over the user's training items, plus `X_u W_O`. For the other
        forms see `Train`.
        """
        behaviour = propagate(graph, self.ids, self.config.num_layers)
        semantic = self._semantic(graph)
        if self.config.trust == "gate":
            final = behaviour + torch.sigmoid(behaviour @ self.trust + self.trust_bias) * semantic
        elif self.config.trust == "scale":
            final = behaviour + self.trust * semantic
        else:
            final = behaviour + semantic
        return Views(final, behaviour, semantic)

    def losses(self, views: Views | PickedViews, batch: Batch) -> dict[str, Tensor]:
        """LightGCN's terms and `contrast`: beta times the InfoNCE of `e` and `h`, over users and over items.

        With `contrast_negatives=both_kinds`, over both at once: then the items a user has met in training are no
        negatives of the user, nor the user one of theirs.
        """
        assert views.semantic is not None
        kinds, false = [batch.users, batch.positives + self.num_users], None
        if self.contrasts_kinds:
            assert batch.known is not None
            # Ascending, the distinct users come before the distinct items.
            users, items = (batch.known.new_zeros(size, size) for size in batch.known.shape)
            kinds, false = [torch.cat(kinds)], _beside(users, batch.known, items)
        contrast = torch.stack(
            [info_nce(views.behaviour, views.semantic, nodes, batch, self.config.temperature, false) for nodes in kinds]
        ).sum()
        return super().losses(views, batch) | {"contrast": self.config.contrast_weight * contrast}

    def _lengths(self, items: Tensor, graph: SymmetricGraph) -> Tensor:
        is_warm = graph.degrees()[self.num_users :] > 0
        return fill_cold(super()._lengths(items, graph), is_warm, self.content.graph)

    def _item_graph(self) -> SymmetricGraph:
        """This rank's rows of the content's graph, cut anew when the content has built another."""
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
        if self.config.semantic_items == "ids":
            items = self.ids[num_users:] * torch.sigmoid(items)
        for _ in range(self.config.num_item_layers):
            items = item_graph @ items
        if self.config.semantic_users == "profiles":
            assert user_rows is not None
            users = user_rows.flatten(1) @ self.fusion + self.fusion_bias
        else:
            users = (graph @ torch.cat([torch.zeros_like(self.ids[:num_users]), items]))[:num_users]
        semantic = torch.cat([users, items])
        if self.config.own_content:
            assert user_rows is not None
            semantic = semantic + torch.cat([user_rows, item_rows]).flatten(1) @ self.own
        return semantic


def fill_cold(rows: Tensor, is_warm: Tensor, graph: SymmetricGraph) -> Tensor:
    """Give the items nobody has met the mean row of their warm neighbours, weighted by the item graph.

    A cold item without a warm neighbour gets a zero row.

    Args:
        rows: float32 [num_items, d], of which only warm rows were learned.
        is_warm: bool [num_items].
        graph: the item graph.
    """
    is_warm = is_warm[:, None]
    weights = graph.multiply(is_warm.float())
    filled = graph.multiply(rows * is_warm) / weights.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(is_warm, rows, filled)


def _beside(users: Tensor, between: Tensor, items: Tensor) -> Tensor:
    """The symmetric matrix of a block among users, one among items, and the one between them."""
    return torch.cat([torch.cat([users, between], dim=1), torch.cat([between.T, items], dim=1)])


def _xavier(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * (6 / (rows + columns)) ** 0.5
