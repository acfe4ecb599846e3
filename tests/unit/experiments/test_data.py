"""Datasets of the experiments: the folder is read as the pipeline reads it, and noise is noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crane_core.config import Features
from crane_core.dataset.interactions import ItemLists
from crane_core.errors import DataError
from crane_core.experiments.data import Dataset, load_dataset


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_dataset_without_a_split_is_a_data_error(dataset: Dataset, split: str) -> None:
    empty = ItemLists.from_pairs(np.empty(0, np.int64), np.empty(0, np.int32), dataset.interactions.num_users)
    broken = replace(dataset, interactions=replace(dataset.interactions, **{split: empty}))
    with pytest.raises(DataError, match=f"has no {split} row"):
        broken.require_splits()


def test_a_pair_counts_once_in_train_before_the_rest(tmp_path: Path) -> None:
    rows = ["0\t1\t2", "0\t1\t0", "0\t1\t0", "1\t0\t1", "1\t0\t2", "1\t2\t0", "0\t2\t2"]
    (tmp_path / "x.inter").write_text("\n".join(["userID\titemID\tx_label", *rows]) + "\n")
    interactions = load_dataset(tmp_path).interactions
    pairs = {
        name: list(zip(lists.users().tolist(), lists.items.tolist(), strict=True))
        for name in ("train", "validation", "test")
        for lists in [getattr(interactions, name)]
    }
    assert pairs == {"train": [(0, 1), (1, 2)], "validation": [(1, 0)], "test": [(0, 2)]}


def test_an_unknown_modality_is_named(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"modalities noise, telling, not \['smell'\]"):
        dataset.modalities(Features(modalities=("noise", "smell")))


def test_cold_items_lose_their_training_rows_and_nothing_else(dataset: Dataset) -> None:
    before, cold = dataset.interactions, dataset.with_cold_items(0.25, seed=0)
    after = cold.interactions
    assert cold.fingerprint != dataset.fingerprint
    assert after.validation is before.validation and after.test is before.test
    lost = np.flatnonzero((before.item_counts() > 0) & (after.item_counts() == 0))
    assert 0 < len(lost) <= 0.25 * before.num_items
    kept = ~np.isin(before.train.items, lost)
    assert np.array_equal(after.train.items, before.train.items[kept])
    assert np.array_equal(after.train.users(), before.train.users()[kept])


def test_noise_has_the_shape_of_the_features_and_nothing_of_their_content(dataset: Dataset) -> None:
    noise = dataset.with_noise(seed=0)
    assert noise.interactions is dataset.interactions and noise.fingerprint != dataset.fingerprint
    assert {name: rows.shape for name, rows in noise.features.items()} == {
        name: rows.shape for name, rows in dataset.features.items()
    }
    for name, rows in noise.features.items():
        known = np.isfinite(dataset.features[name]).all(axis=1)
        assert abs(np.corrcoef(rows[known].ravel(), dataset.features[name][known].ravel())[0, 1]) < 0.2
    assert noise.with_noise(seed=0).fingerprint == noise.fingerprint
