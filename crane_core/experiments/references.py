"""FREEDOM and MGCN, two published multimodal recommenders that CRANE is compared with.

They implement the formulas below; a comment marks each value that was chosen by a measurement. They were not checked
line by line against the papers, nor run beside the authors' code, so their figures do not reproduce published tables.
Both have the interface of `LightGCN`, so that the same trainer trains them. Neither runs in the pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from crane_core.graph.exact import search
from crane_core.graph.item_graph import normalise
from crane_core.model.lightgcn import LightGCN
from crane_core.model.losses import info_nce
from crane_core.model.propagation import DirectedGraph, SymmetricGraph, propagate
from crane_core.model.views import Batch, PickedViews, Views
from crane_core.model_config import ModelConfig
from crane_core.section import Section

CPU = torch.device("cpu")


class FreedomSettings(Section):
    """Settings of FREEDOM alone; sizes, batches and stopping are those of `Train`."""

    k: int = Field(10, ge=1)
    """Neighbours per item in each modality's graph, the item itself included."""
    num_item_layers: int = Field(1, ge=0)
    """Propagation steps on the item-item graph."""
    modality_weights: tuple[float, ...] = ()
    """Weight of each modality's graph, in the order of the modalities; all equal, untuned, when empty."""
    edge_dropout: float = Field(0.8, ge=0, lt=1)
    """Share of the user-item edges that are left out of a training epoch; popular nodes lose more."""
    feature_weight: float = Field(1e-3, ge=0)
    """lambda, weight of the BPR terms on the projected features."""
    learning_rate: float = Field(3e-3, gt=0)
    """Adam's step size; at 1e-3 validation recall was still rising after 200 epochs on Last.fm 2K."""

    def applied(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration with FREEDOM's own optimiser settings; it regularises no embedding."""
        return config.changed({"train.learning_rate": self.learning_rate, "lightgcn.regularisation": 0.0})


class MgcnSettings(Section):
    """Settings of MGCN alone; sizes, batches and stopping are those of `Train`."""

    k: int = Field(10, ge=1)
    """Neighbours per item in each modality's graph, the item itself included."""
    num_item_layers: int = Field(1, ge=0)
    """Propagation steps on the item-item graphs."""
    contrast_weight: float = Field(0.01, ge=0)
    """lambda_C, weight of the InfoNCE between the multimodal and the behavioural rows."""
    temperature: float = Field(0.2, gt=0)
    """tau of that InfoNCE."""
    regularisation: float = Field(1e-4, ge=0)
    """Weight of the squared norm of the batch's final rows."""
    learning_rate: float = Field(1e-3, gt=0)
    """Adam's step size."""

    def applied(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration with MGCN's own optimiser settings."""
        return config.changed(
            {
                "train.learning_rate": self.learning_rate,
                "lightgcn.regularisation": self.regularisation,
                "crane.contrast_weight": self.contrast_weight,
                "crane.contrast_temperature": self.temperature,
            }
        )


class Freedom(LightGCN):
    """Freezing and denoising graph structures (Zhou and Shen, arXiv 2211.06924).

    Args:
        num_users, num_items: sizes of the id maps.
        features: per modality float32 [num_items, dim], as delivered; a missing row is zero.
        config: sizes, from `FreedomSettings.applied`.
        settings: the model's own settings.
        device: device of the item graph.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        features: Sequence[NDArray[np.float32]],
        config: ModelConfig,
        settings: FreedomSettings,
        device: torch.device = CPU,
    ) -> None:
        super().__init__(num_users, num_items, config)
        self.settings = settings
        self.edge_dropout = settings.edge_dropout
        weights = settings.modality_weights or (1 / len(features),) * len(features)
        graphs = (modality_graph(rows, settings.k, weighted=False) for rows in features)
        self.item_graph = DirectedGraph(
            sum(weight * graph for weight, graph in zip(weights, graphs, strict=True)).tocsr(), device
        )
        generator = torch.Generator().manual_seed(config.train.seed + 1)
        self.features = nn.ParameterList(torch.from_numpy(rows.copy()) for rows in features)
        # There is no bias: it would cancel in the difference of two items.
        self.projections = nn.ModuleList(
            _linear(rows.shape[1], config.lightgcn.embedding_dim, generator, bias=False) for rows in features
        )

    def forward(self, graph: SymmetricGraph) -> Views:
        """Return `z_u`, LightGCN's row, and `z_i`, LightGCN's row plus ID embeddings propagated over the item graph."""
        behaviour = propagate(graph, self.ids, self.config.lightgcn.num_layers)
        items = self.ids[self.num_users :]
        for _ in range(self.settings.num_item_layers):
            items = self.item_graph @ items
        users, own = behaviour[: self.num_users], behaviour[self.num_users :]
        semantic = torch.cat([torch.zeros_like(users), items])
        return Views(torch.cat([users, own + items]), behaviour, semantic)

    def losses(self, views: Views | PickedViews, batch: Batch) -> dict[str, Tensor]:
        """Return LightGCN's terms and `features`: lambda times BPR of users with projected features, every modality."""
        users = views.final[batch.mine(batch.users)]
        total = users.new_zeros(())
        for rows, projection in zip(self.features, self.projections, strict=True):
            positives, negatives = (projection(rows[batch.mine(items)]) for items in (batch.positives, batch.negatives))
            total = total + F.softplus(-(users * (positives - negatives)).sum(1)).sum()
        return super().losses(views, batch) | {"features": self.settings.feature_weight * total / len(batch.users)}


class Mgcn(LightGCN):
    """Multi-view graph convolution (Yu et al., arXiv 2308.03588).

    Args:
        num_users, num_items: sizes of the id maps.
        features: per modality float32 [num_items, dim], as delivered; a missing row is zero. They are trained too.
        config: sizes and loss weights, from `MgcnSettings.applied`.
        settings: the model's own settings.
        device: device of the item graphs.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        features: Sequence[NDArray[np.float32]],
        config: ModelConfig,
        settings: MgcnSettings,
        device: torch.device = CPU,
    ) -> None:
        super().__init__(num_users, num_items, config)
        self.settings = settings
        self.item_graphs = [DirectedGraph(modality_graph(rows, settings.k, weighted=True), device) for rows in features]
        dim, generator = config.lightgcn.embedding_dim, torch.Generator().manual_seed(config.train.seed + 1)
        self.features = nn.ParameterList(torch.from_numpy(rows.copy()) for rows in features)
        self.projections = nn.ModuleList(_linear(rows.shape[1], dim, generator) for rows in features)
        self.purifiers = nn.ModuleList(_linear(dim, dim, generator) for _ in features)
        self.preferences = nn.ModuleList(_linear(dim, dim, generator) for _ in features)
        self.attention = _linear(dim, dim, generator)
        self.query = _linear(dim, 1, generator, bias=False)

    def forward(self, graph: SymmetricGraph) -> Views:
        """Return `z = e + h`, the sum of behavioural and multimodal rows.

        Purifier: `p_m = id * sigmoid(W_2 (W_1 x_m + b_1) + b_2)`; items propagate `p_m` over the graph of their
        modality, users aggregate it from their items over the normalised user-item graph. Fuser: attention weights
        `a_m = softmax_m(q tanh(W_3 e_m + b_3))` give the shared part `s = sum a_m e_m`, behaviour-aware gates the
        specific parts `(e_m - s) * sigmoid(W_4m e + b_4m)`, and `h` is the mean of all parts. Adding `s` to the
        mean of the specific parts gave a lower validation recall (Last.fm 2K, one seed).
        """
        behaviour = propagate(graph, self.ids, self.config.lightgcn.num_layers)
        views = self._spread(graph)
        attention = torch.softmax(torch.stack([self.query(torch.tanh(self.attention(view))) for view in views]), dim=0)
        shared = (attention * torch.stack(views)).sum(0)
        specific = [
            (view - shared) * torch.sigmoid(preference(behaviour))
            for view, preference in zip(views, self.preferences, strict=True)
        ]
        semantic = torch.stack([shared, *specific]).mean(0)
        return Views(behaviour + semantic, behaviour, semantic)

    def losses(self, views: Views | PickedViews, batch: Batch) -> dict[str, Tensor]:
        """Return LightGCN's terms and `contrast`: lambda_C times the InfoNCE of `h` and `e`, over users and over items.

        A node that is in the batch twice counts once and is not its own negative.
        """
        assert views.semantic is not None
        contrast = views.final.new_zeros(())
        for nodes in (batch.users, batch.positives + self.num_users):
            contrast = contrast + info_nce(
                views.semantic, views.behaviour, nodes, batch, self.config.crane.contrast_temperature
            )
        return super().losses(views, batch) | {"contrast": self.config.crane.contrast_weight * contrast}

    def _spread(self, graph: SymmetricGraph) -> list[Tensor]:
        """Return purified rows of all nodes, per modality float32 [num_users + num_items, d]."""
        ids, spread = self.ids[self.num_users :], []
        for m, projection in enumerate(self.projections):
            items = ids * torch.sigmoid(self.purifiers[m](projection(self.features[m])))
            for _ in range(self.settings.num_item_layers):
                items = self.item_graphs[m] @ items
            spread.append(items)
        padded = torch.cat([ids.new_zeros(self.num_users, ids.shape[1] * len(spread)), torch.cat(spread, dim=1)])
        users = (graph @ padded)[: self.num_users].chunk(len(spread), dim=1)
        return [torch.cat(pair) for pair in zip(users, spread, strict=True)]

    def _regularised(self, views: Views | PickedViews, nodes: Tensor) -> Tensor:
        return views.final[nodes].square().sum()


def modality_graph(features: NDArray[np.float32], k: int, weighted: bool) -> sp.csr_array:
    """Return `D^-1/2 S D^-1/2` with an edge from every item to its k most similar items, itself included.

    The graph is directed. Edges of zero or negative similarity are left out; an item without features has an edge to
    itself alone.

    Args:
        features: float32 [num_items, dim].
        k: neighbours, >= 1.
        weighted: whether the weight of an edge is the cosine (MGCN) or 1 (FREEDOM).

    Returns:
        float32 CSR [num_items, num_items], not symmetric.
    """
    num_items = len(features)
    found, similarities = search(features, range(num_items), k - 1)
    rows = np.repeat(np.arange(num_items), found.shape[1])
    kept = similarities.ravel() > 0
    values = similarities.ravel()[kept] if weighted else np.ones(int(kept.sum()), dtype=np.float32)
    others = sp.csr_array((values, (rows[kept], found.ravel()[kept])), shape=(num_items, num_items))
    return normalise((others + sp.eye_array(num_items, dtype=np.float32)).tocsr())


def _linear(width: int, height: int, generator: torch.Generator, bias: bool = True) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, width, height, bias=bias)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
