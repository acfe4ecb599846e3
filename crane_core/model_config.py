"""The configuration of models and their training: the loop, LightGCN and CRANE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from crane_core.section import Section

Loss = Literal["softmax", "bpr"]
HalfLife = Annotated[float, Field(gt=0)] | None


class Train(Section):
    """The training loop, the same for every model."""

    learning_rate: float = Field(3e-3, gt=0)
    """Adam's step size for one batch per step."""
    batch_size: int = Field(2048, ge=1)
    """Training interactions whose loss is computed at once, over all ranks."""
    batches_per_step: int = Field(1, ge=1)
    """Batches that share one propagation and one step of Adam, whose step size grows with the square root of their
    number (Malladi et al., arXiv 2205.10287). Propagation costs the same for any number of them: raise it until the
    batches cost as much as the propagation, and lower it where the validation recall suffers."""
    num_epochs: int = Field(200, ge=1)
    """Upper bound of the epochs."""
    patience: int = Field(20, ge=1)
    """Epochs without a better validation recall before training stops."""
    num_neighbours: int | None = Field(None, ge=1)
    """Edges for every node, on average, in the random part of the user-item graph that an epoch propagates over. Its
    products equal those of the whole graph on average. For graphs whose propagation costs more than the batches, or
    that a GPU cannot hold. Validation ranks by the whole graph. None: every epoch propagates over the whole graph."""
    validation_users: int = Field(20_000, ge=1)
    """Users the validation recall is measured on; a fixed sample where there are more."""
    checkpoint_steps: int = Field(200, ge=1)
    """Steps between two checkpoints; one is also written after every epoch."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the weights, the order of the interactions and the negatives."""


class LightGCNSettings(Section):
    """LightGCN: the behavioural view, and what CRANE shares with it."""

    embedding_dim: int = Field(64, ge=1)
    """Width of the ID embeddings."""
    num_layers: int = Field(2, ge=0)
    """Propagation steps on the user-item graph (L_UI)."""
    regularisation: float = Field(1e-3, ge=0)
    """lambda, weight of the squared norm of the batch's ID embeddings."""


class CraneSettings(Section):
    """Settings that CRANE adds to those of LightGCN."""

    mode: Literal["staged", "joint"] = "staged"
    """`staged`: CRANE learns on the frozen rows and the graph of the stages before. `joint` (the paper): RCA runs over
    the whole catalog in every step and its weights learn with the rest, which features and activations of the catalog
    must fit in memory for."""
    joint_start: Literal["fitted", "scratch"] = "fitted"
    """Start of the RCA weights of `joint`: as `ml.refine` has fitted them, or at random (the paper)."""
    graph_epochs: int = Field(1, ge=1)
    """`joint` builds the item graph anew from the current rows before every so many epochs; neighbours have no
    gradient."""
    num_item_layers: int = Field(1, ge=0)
    """Propagation steps on the item-item graph (L_II)."""
    loss: Loss = "softmax"
    """CRANE's ranking loss: sampled softmax over cosines, or the paper's BPR. LightGCN, the baseline, keeps BPR."""
    num_negatives: int = Field(1024, ge=1)
    """Random items that all rows of a batch share as negatives under `softmax`."""
    ranking_negatives: Literal["warm", "catalog"] = "warm"
    """Items that these are drawn from: those with training interactions, or all items. Drawing cold items as negatives
    would push every cold item to the bottom."""
    ranking_temperature: float = Field(0.2, gt=0)
    """Temperature of the softmax."""
    user_balance: float = Field(0.5, ge=0, le=1)
    """An interaction of a user with n of them weighs n^-user_balance in the softmax: 0 treats interactions alike,
    1 treats users alike."""
    semantic_items: Literal["ids", "content"] = "ids"
    """Rows that spread over the item graph: ID embeddings gated by content, or the fused content itself (the paper)."""
    semantic_users: Literal["items", "profiles"] = "items"
    """`h_u`: the normalised sum of `h_i` over the user's items, or the refined profile (the paper)."""
    own_content: bool = True
    """Add a projection of a node's own refined row to its `h`, beside what its neighbours spread."""
    semantic_weight: Literal["gate", "scale", "none"] = "gate"
    """Weight of `h` in `z`: by a gate driven by `e`, by one learned number, or as it is (the paper)."""
    contrast_weight: float = Field(1e-3, ge=0)
    """beta, weight of the InfoNCE between the behavioural and the semantic view."""
    contrast_temperature: float = Field(0.2, gt=0)
    """tau, temperature of that InfoNCE."""
    contrast_nodes: int | None = Field(256, ge=2)
    """Distinct users of a batch that are contrasted, and distinct items; more are sampled. null contrasts all, and so
    does `contrast_negatives=both_kinds`."""
    contrast_negatives: Literal["same_kind", "both_kinds"] = "same_kind"
    """Its negatives for a user: the other users of the batch, or also its items but for those the user has met in
    training; likewise for an item."""
    edge_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the user-item edges that CRANE drops in a training epoch; popular users and items lose more."""

    @property
    def reads_users(self) -> bool:
        """True where the semantic view reads refined user rows."""
        return self.own_content or self.semantic_users == "profiles"


class HeadSettings(Section):
    """Settings of the head, which puts content and, where the data have times, the moment beside a model's rows."""

    half_lives: tuple[HalfLife, ...] = Field((1, 2, 3, 5, 7, 14, 30, 90, None), min_length=1)
    """Half-lives of the popularity, days, that validation chooses from; null is no decay. For the baseline, too."""
    history_half_lives: tuple[HalfLife, ...] = (3, 14, 60, None)
    """Half-lives of a user's own history, days, that validation chooses from; null is no decay. Empty: the score knows
    no times."""
    content_axes: int = Field(256, ge=1)
    """Principal axes of the features that the content channels keep at most."""
    cold_exposure: float | None = Field(None, ge=0, le=1)
    """Share of the places in the lists that items without training interactions take; null: as validation finds most
    of its items, with at most 1.5 times the share that such items have among them."""


class HeadWeights(Section):
    """Weights of the channels of a score, by evidence: a bucket of items by their number of training interactions."""

    edges: tuple[int, ...]
    """Smallest number of training interactions in each bucket, ascending; the first bucket holds the cold items."""
    popularity: float = Field(ge=0)
    """Weight of the logarithm of the popularity."""
    channels: dict[str, tuple[float, ...]]
    """Channel to its weight in each bucket."""
    bias: tuple[float, ...]
    """Number that is added to the score in each bucket."""
    num_cold: int = Field(ge=0)
    """Cold items at the fit. Among more of them each one gets a smaller share of the lists."""


class Choices(Section):
    """Choices of the validation split of a run. A training that is given them makes no choice and needs no
    validation rows. `ml.refit` writes them; nobody sets them by hand."""

    behaviour_epochs: int = Field(ge=1)
    """Epochs that LightGCN is trained for."""
    crane_epochs: int = Field(ge=1)
    """Epochs that CRANE is trained for."""
    crane_ranking: str
    """Name of CRANE's way to rank."""
    share: float = Field(ge=0, le=1)
    """Share of CRANE's scores beside LightGCN's."""
    half_life: HalfLife = None
    """Half-life of the popularity, days; null is no decay."""
    history_half_life: HalfLife = None
    """Half-life of a user's own history, days; null is no decay."""
    head: HeadWeights | None = None
    """Weights of the score; null where the rows of the model stand alone."""


class ModelConfig(Section):
    """The sections that models and their training obey."""

    train: Train = Train()
    lightgcn: LightGCNSettings = LightGCNSettings()
    crane: CraneSettings = CraneSettings()
    head: HeadSettings = HeadSettings()
    choices: Choices | None = None
    """Given where a training makes no choice: in the refit run of a run."""

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return the same with other values of some fields, `section.field` to value."""
        sections: dict[str, Section] = {}
        for path, value in changes.items():
            name, _, field = path.partition(".")
            section = sections.get(name, getattr(self, name))
            assert field in type(section).model_fields, path
            sections[name] = section.model_copy(update={field: value})
        return self.model_copy(update=sections)
