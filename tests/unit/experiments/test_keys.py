"""Trainings of LightGCN that are shared: settings that change its rows change its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from crane_core.experiments.models import behaviour, behaviour_key
from crane_core.model_config import Loss, ModelConfig
from tests.worlds.planted import checkerboard
from tests.worlds.settings import model_config

BASE = model_config(
    embedding_dim=4, batch_size=32, num_epochs=3, patience=1, learning_rate=0.05, num_negatives=8, validation_users=8
)
FIELDS = [
    f"{section}.{field}" for section in ("train", "lightgcn", "crane") for field in getattr(BASE, section).model_fields
]
WITHOUT_EFFECT_UNDER_BPR = {path for path in FIELDS if path.startswith("crane.")} | {"train.checkpoint_steps"}
SOFTMAX = {f"crane.{name}" for name in ("num_negatives", "ranking_negatives", "ranking_temperature", "user_balance")}


def other(path: str) -> Any:
    """A value that changes what it decides on this small world."""
    section, _, name = path.partition(".")
    value, field = getattr(getattr(BASE, section), name), type(getattr(BASE, section)).model_fields[name]
    given = {"num_neighbours": 2, "validation_users": 3, "num_epochs": 1, "patience": 3, "num_negatives": 3}
    if name in given:
        return given[name]
    options = [option for option in get_args(field.annotation) if option != value]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return options[0] if options else value / 2


@pytest.mark.parametrize("loss", get_args(Loss))
@pytest.mark.parametrize("path", FIELDS)
def test_configurations_with_different_rows_never_share_a_key(path: str, loss: Loss, tmp_path: Path) -> None:
    interactions = checkerboard()
    changed: ModelConfig = BASE.changed({path: other(path)})
    keys = {behaviour_key(interactions, config, loss) for config in (BASE, changed)}
    without_effect = WITHOUT_EFFECT_UNDER_BPR - (SOFTMAX if loss == "softmax" else set())
    assert len(keys) == (1 if path in without_effect else 2)
    if len(keys) == 1:
        rows = [
            behaviour(interactions, config, tmp_path / str(number) / "work", loss)[0]
            for number, config in enumerate((BASE, changed))
        ]
        assert all(torch.equal(left, right) for left, right in zip(*rows, strict=True))
