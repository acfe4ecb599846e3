"""Train one model on one dataset: the same data, masks, stopping rule and measure for every model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crane_core.config import Features, Knn, Profiles, Refine, Section, Train
from crane_core.content import Content
from crane_core.dataset import Interactions
from crane_core.evaluation import Scorer, dot_product
from crane_core.experiments.data import Dataset
from crane_core.fusion import Rows, choose_trust, fuse
from crane_core.graph import build_graph
from crane_core.knn import search, unit_rows
from crane_core.model import Crane, LightGCN
from crane_core.propagation import SymmetricGraph
from crane_core.refine import fit, refine_catalog
from crane_core.training import Trainer

CPU = torch.device("cpu")


class Recipe(Section):
    """The parts of a run's configuration that decide a model."""

    features: Features = Features()
    profiles: Profiles = Profiles()
    refine: Refine = Refine()
    knn: Knn = Knn()
    train: Train = Train()

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
