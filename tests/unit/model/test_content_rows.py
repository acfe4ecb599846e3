"""Rows of new items from their vectors: the very rows that a run with the item gives, through files and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.dataset.standardisation import fit_projection, fit_standardisation, projected, standardised
from crane_core.errors import DataError
from crane_core.model.content_rows import ContentMap, ContentRows, Delivered, load_content_rows, save_content_rows
from crane_core.model_config import HeadWeights
from crane_core.training.channels import Channels
from crane_core.training.head import head_content_map, head_rows, log_popularity
from tests.worlds.settings import model_config

NUM_USERS, NUM_ITEMS, NUM_COLD = 40, 50, 8
WEIGHTS = HeadWeights(
    edges=(0, 1, 4),
    popularity=0.7,
    channels={"model": (0, 1, 2), "generated": (1.5, 0.2, 0), "profile": (2, 0.5, 0.1)},
    bias=(-1.5, 0.1, 0.2),
    num_cold=NUM_COLD,
)


def world() -> tuple[dict[str, np.ndarray], Interactions, tuple[torch.Tensor, torch.Tensor]]:
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(NUM_USERS), 5)
    items = np.concatenate([generator.choice(NUM_ITEMS - NUM_COLD, 5, replace=False) for _ in range(NUM_USERS)])
    lists = ItemLists.from_pairs(users, items.astype(np.int32), NUM_USERS)
    nothing = ItemLists(np.zeros(NUM_USERS + 1, dtype=np.int64), np.empty(0, dtype=np.int32))
    vectors = {"image": generator.normal(3, 2, (NUM_ITEMS, 9)), "text": generator.normal(0, 5, (NUM_ITEMS, 6))}
    vectors["image"][[3, NUM_ITEMS - 1]] = np.nan
    vectors["text"][[4, NUM_ITEMS - 1]] = np.nan
    model = tuple(torch.from_numpy(generator.standard_normal((n, 4))).float() for n in (NUM_USERS, NUM_ITEMS))
    return vectors, Interactions(NUM_USERS, NUM_ITEMS, lists, nothing, nothing), (model[0], model[1])


def delivered(vectors: np.ndarray, is_train: np.ndarray, kind: str, width: int | None) -> tuple[Delivered, np.ndarray]:
    """Standardise and project as `etl.features` does."""
    present = np.isfinite(vectors).all(axis=1)
    raw = np.where(present[:, None], vectors, 0)
    fitted = fit_standardisation(raw, present, is_train, kind)
    rows = standardised(raw, present, kind, fitted)
    if width is not None:
        axes = fit_projection(standardised(raw, present, kind, fitted), present & is_train, width, "pca")
        rows, fitted = projected(rows, present, axes), fitted | {name: axes[name] for name in ("axes", "centre")}
    return Delivered(kind, vectors.shape[1], fitted), np.concatenate([block for _, block in rows]).astype(np.float32)


@pytest.mark.parametrize("kind", ["zscore", "l2", "none"])
@pytest.mark.parametrize("width", [None, 4])
def test_a_cold_item_has_the_row_that_its_vectors_give(kind: str, width: int | None, tmp_path: Path) -> None:
    vectors, log, model = world()
    is_train = log.item_counts() > 0
    made = {name: delivered(each, is_train, kind, width) for name, each in vectors.items()}
    features = [(rows, np.isfinite(vectors[name]).all(axis=1)) for name, (_, rows) in made.items()]
    channels = Channels(model, log, features, model_config())
    rows = channels.at(None)
    _, items = head_rows(WEIGHTS, rows, log_popularity(log, None), log)
    content = head_content_map(WEIGHTS, channels, None, rows)
    save_content_rows(ContentRows({name: each for name, (each, _) in made.items()}, content), tmp_path)
    found = load_content_rows(tmp_path)
    cold = log.cold_items()
    assert not np.isfinite(vectors["image"][cold[-1]]).any(), "one cold item has no features"
    np.testing.assert_allclose(
        found.rows({name: each[cold] for name, each in vectors.items()}), items[cold].numpy(), rtol=1e-4, atol=1e-4
    )
    alone = found.rows({"text": vectors["text"][cold[:2]]})
    missing = {"text": vectors["text"][cold[:2]], "image": np.full((2, 9), np.nan)}
    np.testing.assert_array_equal(alone, found.rows(missing))


def test_vectors_that_do_not_fit_are_refused() -> None:
    rows = ContentRows(
        {"text": Delivered("none", 3, {})}, ContentMap(None, np.zeros((0, 2)), np.zeros(2), np.array([0.0, 1.5]))
    )
    np.testing.assert_array_equal(rows.rows({"text": np.ones((2, 3))}), [[0, 1.5], [0, 1.5]])
    for wrong in ({}, {"audio": np.ones((2, 3))}, {"text": np.ones((2, 4))}, {"text": np.ones(3)}):
        with pytest.raises(DataError, match="text of width 3"):
            rows.rows(wrong)
