"""Small trainings of both models on planted data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch._dynamo  # Adam imports it at its first use: here, before the processes that are killed are forked.
from torch import Tensor

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.model.crane import Crane
from crane_core.model.lightgcn import LightGCN
from crane_core.model_config import ModelConfig
from crane_core.training.trainer import Trainer
from tests.worlds.planted import checkerboard, checkerboard_content
from tests.worlds.settings import changed, model_config

CPU = torch.device("cpu")
SMALL = model_config(
    embedding_dim=8, batch_size=64, num_epochs=12, learning_rate=0.02, regularisation=1e-4, num_negatives=12
)
Kind = Literal["lightgcn", "crane"]
KINDS: tuple[Kind, ...] = ("lightgcn", "crane")
both_kinds = pytest.mark.parametrize("kind", KINDS)


def trainer(
    work: Path, interactions: Interactions | None = None, config: ModelConfig = SMALL, kind: Kind = "lightgcn"
) -> Trainer:
    """LightGCN with a negative per row, or CRANE with shared ones, on the checkerboard if on nothing else."""
    work.mkdir(exist_ok=True)
    interactions = interactions or checkerboard()
    sizes = interactions.num_users, interactions.num_items
    model = LightGCN(*sizes, config) if kind == "lightgcn" else Crane(*sizes, checkerboard_content(), config)
    return Trainer(model, interactions, config, work, CPU)


def finish(work: Path, kind: Kind, seed: int = 0) -> tuple[dict, list, dict[str, Tensor]]:
    """The summary, the curve, and the best weights and rows."""
    ours = trainer(work, config=changed(SMALL, checkpoint_steps=2, seed=seed), kind=kind)
    result = ours.run()
    result.pop("seconds")
    users, items = ours.best_rows()
    return result, ours.progress.curve, ours.best_weights() | {"rows.users": users, "rows.items": items}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def lists(seed: int) -> ItemLists:
    """30 users, some without items, and 50 items: every third is cold, and item 1 is met by nearly everyone."""
    is_met = np.random.default_rng(seed).random((30, 50)) < 0.15
    is_met[:, 1] = True
    is_met[:, ::3] = False
    is_met[::7] = False
    return ItemLists.from_pairs(*np.nonzero(is_met), 30)


def with_everything(num_full: int) -> Interactions:
    """The checkerboard, whose first users have met the whole catalog."""
    interactions = checkerboard()
    train = interactions.train
    full = np.arange(num_full).repeat(32), np.tile(np.arange(32, dtype=np.int32), num_full)
    kept = train.users() >= num_full
    users, items = np.append(full[0], train.users()[kept]), np.append(full[1], train.items[kept])
    return Interactions(40, 32, ItemLists.from_pairs(users, items, 40), interactions.validation, interactions.test)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
