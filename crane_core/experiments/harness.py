"""Train one model on one dataset: the same data, masks, stopping rule and measure for every model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crane_core.baselines import content, item_knn, popularity
from crane_core.config import Features, Knn, Profiles, Refine, Section, Train
from crane_core.content import Content
from crane_core.dataset import Interactions
from crane_core.evaluation import Scorer, dot_product, rank_users, user_metrics
from crane_core.experiments.data import Dataset
from crane_core.fusion import Rows, choose_trust, fuse
from crane_core.graph import build_graph
from crane_core.knn import search, unit_rows
from crane_core.model import Crane, LightGCN
from crane_core.propagation import SymmetricGraph
from crane_core.references import Freedom, FreedomSettings, Mgcn, MgcnSettings
from crane_core.refine import fit, refine_catalog
from crane_core.training import Trainer

CPU = torch.device("cpu")


class Recipe(Section):
    """The parts of a run's configuration that decide a model, and the settings of the published references."""

    features: Features = Features()
    profiles: Profiles = Profiles()
    refine: Refine = Refine()
    knn: Knn = Knn()
    train: Train = Train()
    freedom: FreedomSettings = FreedomSettings()
    mgcn: MgcnSettings = MgcnSettings()

    def with_seed(self, seed: int) -> Recipe:
        """The same recipe with every random choice drawn from another seed."""
        return self.model_copy(
            update={
                "refine": self.refine.model_copy(update={"seed": seed}),
                "train": self.train.model_copy(update={"seed": seed}),
            }
        )


@dataclass(frozen=True)
class Trained:
    """A model that can rank.

    Attributes:
        score: user rows int [b] to scores float32 [b, num_items].
        validation: Recall@20 on the validation split, what every choice is made by.
        seconds: of everything the model needed beyond the dataset.
        facts: what else is worth reporting, JSON values.
    """

    score: Scorer
    validation: float
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)


TrainModel = Callable[[Dataset, Recipe, Path], Trained]

ITEM_KNN_GRID = tuple((size, shrinkage) for size in (20, 100, 1000) for shrinkage in (0.0, 100.0, 1000.0))
"""Neighbours and shrinkage: the best were 100 and 0 on Last.fm 2K, 1000 and 100 on Baby, 100 and 1000 on TikTok."""
CONTENT_GRID = ("l2", "zscore")


def train_lightgcn(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """LightGCN alone."""
    started = time.monotonic()
    rows, summary = behaviour(dataset.interactions, recipe.train, work)
    validation = summary["validation"]["recall@20"]
    return Trained(dot_product(*rows), validation, time.monotonic() - started, summary)


def train_crane(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """CRANE, staged: LightGCN beside RCA, item graph and the CRANE network, trusted as validation says."""
    started = time.monotonic()
    interactions = dataset.interactions
    view, _ = behaviour(interactions, recipe.train, work / "behaviour")
    content = prepare_content(dataset, recipe)
    model = Crane(interactions.num_users, interactions.num_items, content, recipe.train)
    rows, summary = train_to_best(model, interactions, recipe.train, work / "crane")
    trust = choose_trust(view, rows, interactions, recipe.train)
    facts = summary | {"trust": trust.weight, "curve": trust.curve}
    return Trained(dot_product(*fuse(view, rows, trust.weight)), trust.recall, time.monotonic() - started, facts)


def train_bpr_mf(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """Matrix factorisation under the BPR loss (Rendle et al., UAI 2009): LightGCN without propagation."""
    train = recipe.train.model_copy(update={"num_layers": 0})
    return train_lightgcn(dataset, recipe.model_copy(update={"train": train}), work)


def train_popularity(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """`baselines.popularity`."""
    return _choose(iter([({}, popularity(dataset.interactions))]), dataset, recipe)


def train_item_knn(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """`baselines.item_knn` with the neighbours and the shrinkage of `ITEM_KNN_GRID` that validation prefers."""
    candidates = (
        ({"num_neighbours": size, "shrinkage": shrinkage}, item_knn(dataset.interactions, size, shrinkage))
        for size, shrinkage in ITEM_KNN_GRID
    )
    return _choose(candidates, dataset, recipe)


def train_content(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """`baselines.content`, standardised as validation prefers.

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
    """FREEDOM on the raw features.

    Raises:
        DataError: the dataset has no features.
    """
    return _train_reference(Freedom, recipe.freedom, dataset, recipe, work)


def train_mgcn(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
    """MGCN on the raw features.

    Raises:
        DataError: the dataset has no features.
    """
    return _train_reference(Mgcn, recipe.mgcn, dataset, recipe, work)


MODELS: dict[str, TrainModel] = {
    "crane": train_crane,
    "lightgcn": train_lightgcn,
    "bpr_mf": train_bpr_mf,
    "popularity": train_popularity,
    "item_knn": train_item_knn,
    "content": train_content,
    "freedom": train_freedom,
    "mgcn": train_mgcn,
}
"""Every model by name."""
NEED_FEATURES = frozenset({"crane", "content", "freedom", "mgcn"})
"""Those that read item features, and raise a `DataError` where there are none."""


def behaviour(interactions: Interactions, config: Train, work: Path) -> tuple[Rows, dict[str, Any]]:
    """The behavioural view: LightGCN's best rows and the trainer's summary."""
    return train_to_best(LightGCN(interactions.num_users, interactions.num_items, config), interactions, config, work)


def prepare_content(dataset: Dataset, recipe: Recipe) -> Content:
    """What `ml.refine`, `ml.knn` and `ml.graph` leave, in memory."""
    modalities = dataset.modalities(recipe.features, recipe.profiles.aggregate)
    refiner, _ = fit(modalities, dataset.interactions.train, recipe.profiles.aggregate, recipe.refine)
    items, _, _ = refine_catalog(refiner, modalities, recipe.refine.chunk_size)
    with torch.no_grad():
        unit = unit_rows(refiner.fuse(items).numpy())
    neighbours, _ = search(unit, 0, len(unit), recipe.knn.k)
    graph = SymmetricGraph(build_graph(neighbours.astype(np.int32)), CPU)
    return Content(torch.nn.functional.normalize(items, dim=2), graph)


def train_to_best(
    model: LightGCN, interactions: Interactions, config: Train, work: Path
) -> tuple[Rows, dict[str, Any]]:
    """Train a model to its best validation recall; its rows there and the trainer's summary."""
    work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model, interactions, config, work, CPU)
    summary = trainer.run()
    model.load_state_dict(trainer.best_weights())
    return trainer.embeddings(), summary


def _train_reference(
    build: Any, settings: FreedomSettings | MgcnSettings, dataset: Dataset, recipe: Recipe, work: Path
) -> Trained:
    started = time.monotonic()
    interactions, config = dataset.interactions, settings.applied(recipe.train)
    raw = recipe.features.model_copy(update={"standardise": "none"})
    features = [modality.items for modality in dataset.modalities(raw)]
    model = build(interactions.num_users, interactions.num_items, features, config, settings)
    prepared = time.monotonic() - started
    rows, summary = train_to_best(model, interactions, config, work)
    return Trained(dot_product(*rows), summary["validation"]["recall@20"], prepared + summary["seconds"], summary)


def _choose(candidates: Iterator[tuple[dict[str, Any], Scorer]], dataset: Dataset, recipe: Recipe) -> Trained:
    """The candidate with the best validation Recall@20, the first of equals; `facts` are its settings."""
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
