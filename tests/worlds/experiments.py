"""The checkerboard as a dataset of the experiments, and the small recipe its trials are trained by."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crane_core.experiments.data import Dataset
from crane_core.experiments.models import Recipe
from crane_core.experiments.plans import load_recipe
from crane_core.experiments.study import Budget, Setting, Study
from crane_core.experiments.trials import Trials
from tests.worlds.planted import checkerboard
from tests.worlds.processes import PRELOADED

FAST = ["refine.num_steps=2", "refine.embedding_dim=8", "train.num_epochs=2", "lightgcn.embedding_dim=8"]
RECIPE = load_recipe(None, FAST)
NO_BOUND = Budget(None)


def board() -> Dataset:
    """Features that tell the groups apart in one modality and nothing in the other."""
    interactions = checkerboard()
    generator = np.random.default_rng(0)
    groups = np.arange(interactions.num_items) // 8
    telling = np.eye(4, 6)[groups] + 0.1 * generator.normal(size=(interactions.num_items, 6))
    features = {"telling": telling, "noise": generator.normal(size=(interactions.num_items, 5))}
    return Dataset("board", interactions, {name: matrix.astype(np.float32) for name, matrix in features.items()})


def write_folder(dataset: Dataset, folder: Path) -> Path:
    """Write a dataset as a folder in MMRec layout."""
    folder.mkdir()
    interactions = dataset.interactions
    lines = ["userID\titemID\tx_label"]
    for label, split in enumerate((interactions.train, interactions.validation, interactions.test)):
        lines += [f"{user}\t{item}\t{label}" for user, item in zip(split.users(), split.items, strict=True)]
    (folder / f"{dataset.name}.inter").write_text("\n".join(lines) + "\n")
    for name, matrix in dataset.features.items():
        np.save(folder / f"{name}_feat.npy", matrix)
    return folder


def flags(folder: Path, out: Path, *more: str) -> list[str]:
    """Arguments of `crane experiments` with the small recipe."""
    settings = [part for value in FAST for part in ("--set", value)]
    return ["experiments", "--data", str(folder), "--out", str(out), "--json", *settings, *more]


def forkserver() -> ForkServerContext:
    """Return a context whose processes are forked from one that has imported the command and has run no gradient."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "jobs.cli", "jobs.commands.experiments"])
    return context


def random_scores(dataset: Dataset, seed: int) -> Callable[[np.ndarray], torch.Tensor]:
    """Return a model that ranks at random by its seed."""
    interactions = dataset.interactions
    shape = (interactions.num_users, interactions.num_items)
    scores = torch.from_numpy(np.random.default_rng(seed).random(shape, dtype=np.float32))
    return lambda users: scores[torch.from_numpy(users.astype(np.int64))].clone()


def study(
    dataset: Dataset, folder: Path, recipe: Recipe = RECIPE, seeds: tuple[int, ...] = (0,), **changes: Any
) -> Study:
    """Return a study without a time limit that keeps its trials in a folder."""
    settings: dict[str, Any] = {"budget": NO_BOUND, "show": lambda *_: None} | changes
    return Study(Setting(dataset, recipe, seeds), Trials(folder), **settings)
