"""Train one model on one dataset: the same data, masks, stopping rule and measure for every model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from crane_core.config import Features, Knn, Profiles, Refine
from crane_core.dataset.interactions import Interactions
from crane_core.dataset.modalities import profile_spreads
from crane_core.errors import ConfigError
from crane_core.evaluation.baselines import content, item_knn, popularity
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import Scorer, dot_product, rank_users
from crane_core.experiments.data import Dataset, fingerprint, held
from crane_core.experiments.references import Freedom, FreedomSettings, Mgcn, MgcnSettings
from crane_core.graph.exact import search
from crane_core.graph.item_graph import build_graph
from crane_core.model.content import Content, JointContent, joint_content
from crane_core.model.crane import Crane
from crane_core.model.lightgcn import LightGCN
from crane_core.model.propagation import SymmetricGraph
from crane_core.model.views import Rows
from crane_core.model_config import Loss, ModelConfig
from crane_core.refine.catalog import refine_catalog
from crane_core.refine.fit import fit
from crane_core.storage.local import LocalStorage
from crane_core.storage.tensors import load_tensors
from crane_core.training.head import choose_head
from crane_core.training.share import choose_share
from crane_core.training.trainer import Trainer

CPU = torch.device("cpu")

VERSION = 4
"""Raised when the same recipe trains a different model; earlier trainings are then not reused."""


class Recipe(ModelConfig):
    """Sections of a run's configuration that decide a model, and the settings of the published references."""

    features: Features = Features()
    profiles: Profiles = Profiles()
    refine: Refine = Refine()
    knn: Knn = Knn()
    freedom: FreedomSettings = FreedomSettings()
    mgcn: MgcnSettings = MgcnSettings()

    def with_seed(self, seed: int) -> Recipe:
        """Return the recipe with another seed for every random choice.

        Raises:
            ConfigError: the seed is out of range.
        """
        if not 0 <= seed < 2**31:
            raise ConfigError(f"{seed} is no seed.", f"Give whole numbers from 0 to {2**31 - 1}.")
        return self.changed({"refine.seed": seed, "train.seed": seed})


def version_of(recipe: Recipe) -> int | str:
    """Return the version of the trainings by a recipe. The meaning of `both_kinds` has changed, and only that."""
    return f"{VERSION}, false negatives masked" if recipe.crane.contrast_negatives == "both_kinds" else VERSION


@dataclass(frozen=True)
class Trained:
    """A model that can rank.

    Attributes:
        score: user rows int [b] to scores float32 [b, num_items].
        validation: Recall@20 on the validation split, which decides every choice.
        seconds: time for everything the model needs beyond the dataset.
        facts: report of the training, JSON values.
        alone: `score` of a fused model's own rows without LightGCN's.
    """

    score: Scorer
    validation: float
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    alone: Scorer | None = None


TrainModel = Callable[[Dataset, Recipe, Path], Trained]
"""Takes a dataset, a recipe and a folder. A killed training continues from its checkpoints in the folder, which is
its own; files that several trainings share lie beside it."""

View = tuple[Rows, dict[str, Any]]
"""Rows of a training's best epoch, and its summary."""

ITEM_KNN_GRID = tuple((size, shrinkage) for size in (20, 100, 1000) for shrinkage in (0.0, 100.0, 1000.0))
"""Neighbours and shrinkage. The best were 100 and 0 on Last.fm 2K, 1000 and 100 on Baby, 100 and 1000 on TikTok."""
CONTENT_GRID = ("l2", "zscore")


def train_lightgcn(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """Train LightGCN alone."""
    rows, summary = behaviour(dataset.interactions, recipe, work)
    return Trained(dot_product(*rows), summary["validation"]["recall@20"], summary["seconds"], summary)


def train_lightgcn_softmax(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """Train LightGCN with CRANE's ranking loss: the part of CRANE's gain that comes from the loss alone."""
    rows, summary = behaviour(dataset.interactions, recipe, work, "softmax")
    return Trained(dot_product(*rows), summary["validation"]["recall@20"], summary["seconds"], summary)


def train_lightgcn_fused(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """Train LightGCN and `lightgcn_softmax` and fuse them as LightGCN and CRANE: the gain by loss and fusion together.

    There is no content, so cold items have a popularity only.
    """
    interactions = dataset.interactions
    view = behaviour(interactions, recipe, work)
    own = behaviour(interactions, recipe, work, "softmax")
    return _fused(view, own, dataset, recipe, with_content=False)


def train_crane(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """Train CRANE: RCA, item graph and network, staged or joint, fused with LightGCN at the share validation chooses.

    The seconds are those of all parts, including parts that were reused.
    """
    interactions = dataset.interactions
    view = behaviour(interactions, recipe, work)
    content, prepared = content_of(dataset, recipe, work)
    model = Crane(interactions.num_users, interactions.num_items, content, recipe)
    own = train_to_best(model, interactions, recipe, work / "crane")
    fused = _fused(view, own, dataset, recipe, with_content=True)
    return replace(fused, seconds=fused.seconds + prepared["content_seconds"], facts=fused.facts | prepared)


def train_crane_joint(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """Train CRANE with RCA in every step, whatever the recipe says."""
    return train_crane(dataset, recipe.changed({"crane.mode": "joint"}), work)


_WITHOUT_EFFECT = {
    "train": {"checkpoint_steps"},
    "crane": {
        *("mode", "joint_start", "graph_epochs", "num_item_layers", "loss", "edge_dropout"),
        *("semantic_items", "semantic_users", "own_content", "semantic_weight"),
        *("contrast_weight", "contrast_temperature", "contrast_negatives", "contrast_nodes"),
    },
}
"""Fields that cannot change the rows of LightGCN, under either loss."""


def train_bpr_mf(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """Train matrix factorisation with the BPR loss (Rendle et al., UAI 2009): LightGCN without propagation."""
    return train_lightgcn(dataset, recipe.changed({"lightgcn.num_layers": 0}), work)


def train_popularity(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """Return `baselines.popularity`."""
    return _choose(iter([({}, popularity(dataset.interactions))]), dataset, recipe)


def train_item_knn(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """Return `baselines.item_knn` with the neighbours and shrinkage of `ITEM_KNN_GRID` that validation prefers."""
    candidates = (
        ({"num_neighbours": size, "shrinkage": shrinkage}, item_knn(dataset.interactions, size, shrinkage))
        for size, shrinkage in ITEM_KNN_GRID
    )
    return _choose(candidates, dataset, recipe)


def train_content(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """Return `baselines.content`, standardised as validation prefers.

    Raises:
        DataError: the dataset has no features.
    """
    candidates = (
        (
            {"standardise": kind},
            content(dataset.modalities(recipe.features.model_copy(update={"standardise": kind}))),
        )
        for kind in CONTENT_GRID
    )
    return _choose(candidates, dataset, recipe)


def train_freedom(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """Train FREEDOM on the raw features.

    Raises:
        DataError: the dataset has no features.
    """
    return _train_reference(Freedom, recipe.freedom, dataset, recipe, work)


def train_mgcn(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """Train MGCN on the raw features.

    Raises:
        DataError: the dataset has no features.
    """
    return _train_reference(Mgcn, recipe.mgcn, dataset, recipe, work)


MODELS: dict[str, TrainModel] = {
    "crane": train_crane,
    "crane_joint": train_crane_joint,
    "lightgcn": train_lightgcn,
    "lightgcn_softmax": train_lightgcn_softmax,
    "lightgcn_fused": train_lightgcn_fused,
    "bpr_mf": train_bpr_mf,
    "popularity": train_popularity,
    "item_knn": train_item_knn,
    "content": train_content,
    "freedom": train_freedom,
    "mgcn": train_mgcn,
}
"""All models by name."""
NEED_FEATURES = frozenset({"crane", "crane_joint", "content", "freedom", "mgcn"})
"""Models that read item features, and raise a `DataError` without them."""


def behaviour(interactions: Interactions, config: ModelConfig, work: Path, loss: Loss = "bpr") -> View:
    """Return the behavioural view: LightGCN's best rows and the trainer's summary.

    It is trained once for the same training and validation interactions, loss and settings, in a folder beside
    `work`; a training that has ended there is read back.
    """
    shared = work.parent / behaviour_key(interactions, config, loss)
    with held(shared):
        model = LightGCN(interactions.num_users, interactions.num_items, config, loss)
        return train_to_best(model, interactions, config, shared)


def behaviour_key(interactions: Interactions, config: ModelConfig, loss: Loss) -> str:
    """Return the name of a training of LightGCN: equal names mean equal rows."""
    train, validation = interactions.train, interactions.validation
    name, sections = "lightgcn", {"train", "lightgcn"}
    if loss == "softmax":
        name, sections = "lightgcn_softmax", sections | {"crane"}
    settings = config.model_dump(mode="json", include=sections, exclude=_WITHOUT_EFFECT)
    lists = (train.indptr, train.items, validation.indptr, validation.items)
    return f"{name}-{fingerprint(VERSION, interactions.num_items, settings, *lists)}"


def _fused(view: View, own: View, dataset: Dataset, recipe: Recipe, with_content: bool) -> Trained:
    """Fuse LightGCN's rows with a model's own, at the share that validation chooses, and put the head on them."""
    started = time.monotonic()
    (behavioural, alone), (rows, summary) = view, own
    chosen = choose_share(behavioural, rows, dataset.interactions, recipe)
    features = [(each.items, each.present) for each in dataset.modalities(recipe.features)] if with_content else []
    head = choose_head(chosen.rows, dataset.interactions, recipe, features)
    seconds = alone["seconds"] + summary["seconds"] + time.monotonic() - started
    facts = summary | {"trust": chosen.share, "curve": chosen.curve, "head": head and head.facts()}
    if head is None:
        return Trained(dot_product(*chosen.rows), chosen.recall, seconds, facts, dot_product(*rows))
    return Trained(dot_product(*head.rows), head.recall[head.form], seconds, facts, dot_product(*rows))


def content_of(dataset: Dataset, recipe: Recipe, work: Path) -> tuple[Content | JointContent, dict[str, Any]]:
    """Return the content that CRANE learns on, and its facts: `content_seconds` and `profile_spread` by modality."""
    fitted: dict[str, Tensor] = {}
    seconds = 0.0
    if recipe.crane.mode == "staged" or recipe.crane.joint_start == "fitted":
        frozen, fitted, facts = shared_content(dataset, recipe, work)
        if recipe.crane.mode == "staged":
            return frozen, facts
        seconds = facts["content_seconds"]
    started = time.monotonic()
    modalities = dataset.modalities(recipe.features, recipe.profiles.aggregate)
    content = joint_content(modalities, fitted, recipe.refine, recipe.knn, recipe.crane, CPU)
    seconds += time.monotonic() - started
    return content, {"content_seconds": seconds, "profile_spread": profile_spreads(modalities)}


def shared_content(dataset: Dataset, recipe: Recipe, work: Path) -> tuple[Content, dict[str, Tensor], dict[str, Any]]:
    """Return the result of `prepare_content` and its facts, made once for the same data and sections of the recipe.

    Its files lie beside `work`, as those of the behavioural view do.
    """
    sections = recipe.model_dump(mode="json", include={"features", "profiles", "refine", "knn"})
    shared = work.parent / f"content-{fingerprint(VERSION, dataset.without_test().fingerprint, sections)}"
    with held(shared):
        if not (shared / "prepared.json").exists():
            started = time.monotonic()
            content, fitted, spreads = prepare_content(dataset, recipe)
            seconds = time.monotonic() - started
            assert content.users is not None
            save_file({"items": content.items, "users": content.users}, shared / "rows.safetensors")
            save_file(fitted, shared / "rca.safetensors")
            sp.save_npz(shared / "graph.npz", content.graph.matrix)
            # Written last and atomically: without it the content is made again.
            LocalStorage(shared).write(
                "prepared.json", json.dumps({"seconds": seconds, "profile_spread": spreads}).encode()
            )
        rows, fitted = (load_tensors(shared / f"{name}.safetensors") for name in ("rows", "rca"))
        graph = SymmetricGraph(sp.csr_array(sp.load_npz(shared / "graph.npz")), CPU)
        known = json.loads((shared / "prepared.json").read_text())
        facts = {"content_seconds": known["seconds"], "profile_spread": known.get("profile_spread", {})}
        return Content(rows["items"], graph, rows["users"]), fitted, facts


def prepare_content(dataset: Dataset, recipe: Recipe) -> tuple[Content, dict[str, Tensor], dict[str, float]]:
    """Do what `ml.refine`, `ml.knn` and `ml.graph` do, in memory: rows and graph, fitted weights, profile spreads."""
    modalities = dataset.modalities(recipe.features, recipe.profiles.aggregate)
    refiner, _ = fit(modalities, dataset.interactions.train, recipe.profiles.aggregate, recipe.refine)
    items, users, _ = refine_catalog(refiner, modalities, recipe.refine.chunk_size)
    with torch.no_grad():
        fused = refiner.fuse(items).numpy()
    neighbours, _ = search(fused, range(len(fused)), recipe.knn.k)
    graph = SymmetricGraph(build_graph(neighbours), CPU)
    items, users = (F.normalize(rows, dim=2) for rows in (items, users))
    return Content(items, graph, users), refiner.state_dict(), profile_spreads(modalities)


def train_to_best(model: LightGCN, interactions: Interactions, config: ModelConfig, work: Path) -> View:
    """Train a model. Return its rows at the best epoch, and the trainer's summary with the curve as `epochs`."""
    work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model, interactions, config, work, CPU)
    summary = trainer.run()
    return trainer.best_rows(), summary | {"epochs": trainer.progress.curve}


def _train_reference(
    build: Any, settings: FreedomSettings | MgcnSettings, dataset: Dataset, recipe: Recipe, work: Path
) -> Trained:
    started = time.monotonic()
    interactions, config = dataset.interactions, settings.applied(recipe)
    raw = recipe.features.model_copy(update={"standardise": "none"})
    features = [modality.items for modality in dataset.modalities(raw)]
    model = build(interactions.num_users, interactions.num_items, features, config, settings)
    prepared = time.monotonic() - started
    rows, summary = train_to_best(model, interactions, config, work)
    return Trained(dot_product(*rows), summary["validation"]["recall@20"], prepared + summary["seconds"], summary)


def _choose(candidates: Iterator[tuple[dict[str, Any], Scorer]], dataset: Dataset, recipe: Recipe) -> Trained:
    """Return the candidate with the best validation Recall@20, the first of equals; `facts` are its settings."""
    started = time.monotonic()
    interactions, train = dataset.interactions, recipe.train
    users = interactions.validation_users(train.validation_users, train.seed)
    best: tuple[float, dict[str, Any], Scorer] | None = None
    for facts, score in candidates:
        ranked = rank_users(score, interactions.train, users, 20)
        recalls = user_metrics(ranked, interactions.validation, users, (20,))["recall@20"]
        recall = float(recalls.mean()) if len(users) else 0.0
        if best is None or recall > best[0]:
            best = recall, facts, score
    assert best is not None
    return Trained(best[2], best[0], time.monotonic() - started, best[1])
