"""Refining: projection by hand, chunks equal the whole, and a fit that finds planted groups."""

import numpy as np
import pytest
import torch

from crane_core.config import Refine
from crane_core.refine import Modality, Refiner, _profiles_without, fit, refine_catalog
from tests.unit.planted import checkerboard

CONFIG = Refine(embedding_dim=8, num_steps=60, batch_size=64, num_landmarks=64, learning_rate=0.01, chunk_size=7)


def planted_modalities(noise: float = 2.0) -> list[Modality]:
    """Two modalities that know an item's group, each through noise; every fifth item lacks the second."""
    interactions = checkerboard()
    generator = np.random.default_rng(0)
    groups = np.arange(interactions.num_items) // 8
    modalities = []
    for number, dim in enumerate((6, 5)):
        centers = generator.normal(size=(4, dim)) * 2
        items = (centers[groups] + noise * generator.normal(size=(len(groups), dim))).astype(np.float32)
        present = np.ones(len(items), dtype=bool) if number == 0 else np.arange(len(items)) % 5 > 0
        items[~present] = 0
        users = interactions.train.users()
        profiles = np.zeros((interactions.num_users, dim), dtype=np.float32)
        np.add.at(profiles, users, items[interactions.train.items])
        counts = np.bincount(users, weights=present[interactions.train.items], minlength=interactions.num_users)
        modalities.append(Modality(f"m{number}", items, present, profiles, counts.astype(np.int32)))
    return modalities


def test_projection_by_hand() -> None:
    refiner = Refiner([2], [1.0], Refine(embedding_dim=1, num_recursions=0))
    refiner.weights[0].data = torch.tensor([[2.0], [3.0]])
    refiner.biases.data = torch.tensor([[0.5]])
    refiner.missing.data = torch.tensor([[-7.0]])
    rows = refiner.project([torch.tensor([[1.0, 1.0], [0.0, 0.0]])], [torch.tensor([True, False])])
    assert rows.flatten().tolist() == [5.5, -7.0]


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_the_target_leaves_the_profile(aggregate: str) -> None:
    items = np.array([[1.0], [10.0], [100.0]], dtype=np.float32)
    total = np.array([[11.0]], dtype=np.float32)
    profiles = total / 2 if aggregate == "mean" else total
    modality = Modality("m", items, np.array([True, True, False]), profiles, np.array([2]))
    refiner = Refiner([1], [1.0], CONFIG)
    rows, present = _profiles_without([modality], np.array([0, 0]), np.array([1, 2]), aggregate, refiner)
    assert rows[0].flatten().tolist() == [1.0, 5.5 if aggregate == "mean" else 11.0]
    assert present[0].tolist() == [True, True]


def test_a_profile_of_the_target_alone_is_missing() -> None:
    modality = Modality("m", np.ones((1, 1), np.float32), np.array([True]), np.ones((1, 1), np.float32), np.array([1]))
    _, present = _profiles_without([modality], np.array([0]), np.array([0]), "sum", Refiner([1], [1.0], CONFIG))
    assert present[0].tolist() == [False]


@pytest.mark.parametrize("phi", ["softmax", "tanh", "linear", "block", "landmark"])
def test_chunks_of_the_catalog_equal_the_whole(phi: str) -> None:
    modalities = planted_modalities()
    config = CONFIG.model_copy(update={"phi": phi, "num_steps": 5})
    refiner, _ = fit(modalities, checkerboard().train, "sum", config)
    small = refine_catalog(refiner, modalities, 5)
    large = refine_catalog(refiner, modalities, 10_000)
    for found, expected in zip(small[:2], large[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(small[2]) == config.num_recursions + 1


def test_the_fit_finds_the_planted_groups_and_repeats() -> None:
    modalities, train = planted_modalities(), checkerboard().train
    refiner, report = fit(modalities, train, "sum", CONFIG)
    assert report["curve"][-1]["ranking"] < 0.9 * report["curve"][0]["ranking"]
    items, users, _ = refine_catalog(refiner, modalities, 100)
    scores = torch.nn.functional.normalize(refiner.fuse(users)) @ torch.nn.functional.normalize(refiner.fuse(items)).T
    own = torch.arange(40)[:, None] // 10 == torch.arange(32) // 8
    assert scores[own].mean() > scores[~own].mean() + 0.5
    again, _ = fit(modalities, train, "sum", CONFIG)
    for name, value in refiner.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
