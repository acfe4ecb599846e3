"""Shared by the tests of the experiments: a small dataset, and a model that costs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from crane_core.experiments.data import Dataset
from crane_core.experiments.models import MODELS, Recipe, Trained
from tests.worlds.experiments import board, random_scores, write_folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def dataset() -> Dataset:
    return board()


@pytest.fixture
def folder(tmp_path: Path, dataset: Dataset) -> Path:
    """The dataset as a folder in MMRec layout."""
    return write_folder(dataset, tmp_path / "board")


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are composed and not drawn, which takes most of the time of a page."""

    def close(figure: Figure) -> Markup:
        plt.close(figure)
        return Markup("<svg></svg>")

    monkeypatch.setattr("crane_core.experiments.report.svg", close)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Dataset, Recipe]]:
    """The trainings that were done, by a model that ranks at random by its seed and learns nothing."""
    done: list[tuple[Dataset, Recipe]] = []

    def train(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
        done.append((dataset, recipe))
        return Trained(random_scores(dataset, recipe.train.seed), 0.5, 1.25, {"content_seconds": 0.25})

    monkeypatch.setitem(MODELS, "crane", train)
    return done
