"""Fitting the refiner: its losses equal those computed by hand, and it finds planted groups."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.multiprocessing

from crane_core.config import Refine
from crane_core.dataset.interactions import ItemLists
from crane_core.dataset.modalities import Modality
from crane_core.errors import DataError, TrainingError
from crane_core.refine.catalog import refine_catalog
from crane_core.refine.fit import Batch, fit, profiles_without
from crane_core.refine.refiner import Refiner, profile_scales
from tests.worlds.planted import REFINE, checkerboard, planted_modalities


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize(("weights", "rest"), [((1, 1), (1.0, 11.0)), ((3, 2), (3.0, 23.0))])
def test_the_target_leaves_the_profile(aggregate: str, weights: tuple[int, int], rest: tuple[float, float]) -> None:
    items = np.array([[1.0], [10.0], [100.0]], dtype=np.float32)
    profiles = np.array([[weights[0] + 10.0 * weights[1]]], dtype=np.float32)
    left = rest
    if aggregate == "mean":
        profiles, left = profiles / sum(weights), (rest[0] / weights[0], rest[1] / sum(weights))
    modality = Modality("m", items, np.array([True, True, False]), profiles, np.array([2]))
    batch = batch_of([0, 0], [1, 2], [weights[1], 7])
    totals = [np.array([float(sum(weights))])]
    rows, present = profiles_without([modality], totals, batch, aggregate, Refiner([1], [1.0], REFINE))
    assert rows[0].flatten().tolist() == pytest.approx(left)
    assert present[0].tolist() == [True, True]


def test_a_profile_of_the_target_alone_is_missing() -> None:
    modality = Modality("m", np.ones((1, 1), np.float32), np.array([True]), np.ones((1, 1), np.float32), np.array([1]))
    totals, batch = [np.ones(1)], batch_of([0], [0], [1])
    _, present = profiles_without([modality], totals, batch, "sum", Refiner([1], [1.0], REFINE))
    assert present[0].tolist() == [False]


def batch_of(users: list[int], targets: list[int], weights: list[float]) -> Batch:
    return Batch(np.array(users), np.array(targets), np.array(weights, dtype=np.float32), np.arange(1))


def test_no_item_and_a_fit_that_diverges_are_typed_errors() -> None:
    modalities = planted_modalities()
    empty = [dataclasses.replace(m, items=m.items[:0], present=m.present[:0]) for m in modalities]
    with pytest.raises(DataError, match="no item"):
        fit(empty, checkerboard().train, "sum", REFINE)
    with pytest.raises(TrainingError, match=r"Lower refine\.learning_rate"):
        fit(modalities, checkerboard().train, "sum", REFINE.model_copy(update={"learning_rate": 1e30}))


def plain_fit_losses(
    refiner: Refiner, modalities: list[Modality], train: ItemLists, config: Refine
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ranking and agreement loss of the first mini-batch without RCA, item by item and in float64."""

    def fused(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.cat(rows) @ refiner.fusion, dim=0)

    def project(items: set[int], scaled: bool) -> list[torch.Tensor]:
        rows = []
        for m, modality in enumerate(modalities):
            held = [torch.from_numpy(modality.items[item]).double() for item in items if modality.present[item]]
            scale = refiner.get_buffer("profile_scales")[m] if scaled else 1.0
            row = sum(held) / scale @ refiner.weights[m] + refiner.biases[m] if held else refiner.missing[m]
            rows.append(row)
        return rows

    generator = np.random.default_rng(config.seed)
    picked = generator.integers(len(train.items), size=config.batch_size)
    landmarks = generator.choice(len(modalities[0].items), size=config.num_landmarks, replace=False)
    targets = train.items[picked].tolist()
    candidates = {*targets, *landmarks.tolist()}
    rows = {item: project({item}, scaled=False) for item in candidates}
    ranking = []
    for user, target in zip(train.users()[picked], targets, strict=True):
        others = set(train.items[train.indptr[user] : train.indptr[user + 1]].tolist()) - {target}
        profile = fused(project(others, scaled=True))
        logits = {item: profile @ fused(rows[item]) / config.temperature for item in candidates - others}
        ranking.append(torch.stack(list(logits.values())).logsumexp(0) - logits[target])
    both = [item for item in sorted({*targets}) if all(modality.present[item] for modality in modalities)]
    left, right = (torch.nn.functional.normalize(torch.stack([rows[item][m] for item in both])) for m in (1, 0))
    similar = left @ right.T / config.temperature
    return torch.stack(ranking).mean(), (similar.logsumexp(1) - similar.diag()).mean()


def test_one_step_of_the_fit_equals_the_step_by_hand() -> None:
    modalities, train = planted_modalities(), checkerboard().train
    config = REFINE.model_copy(
        update={"num_recursions": 0, "num_steps": 1, "batch_size": 24, "num_landmarks": 12, "agreement_weight": 2.0}
    )
    before = Refiner([m.items.shape[1] for m in modalities], profile_scales(modalities), config).double()
    after, report = fit(modalities, train, "sum", config)
    ranking, agreement = plain_fit_losses(before, modalities, train, config)
    assert report["curve"][0]["ranking"] == pytest.approx(ranking.item(), rel=1e-5)
    assert report["curve"][0]["agreement"] == pytest.approx(agreement.item(), rel=1e-5)
    (ranking + 2.0 * agreement).backward()
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert old.grad is not None, name
        clear = old.grad.abs() > 1e-4
        assert clear.any(), name
        # Adam's first step is as long as its rate, against the gradient.
        moved = (new.double() - old)[clear]
        torch.testing.assert_close(moved, -config.learning_rate * old.grad[clear].sign(), rtol=1e-3, atol=1e-6)


def test_the_fit_finds_the_planted_groups_and_repeats() -> None:
    modalities, train = planted_modalities(), checkerboard().train
    refiner, report = fit(modalities, train, "sum", REFINE)
    assert report["curve"][-1]["ranking"] < 0.9 * report["curve"][0]["ranking"]
    items, users, _ = refine_catalog(refiner, modalities, 100)
    scores = torch.nn.functional.normalize(refiner.fuse(users)) @ torch.nn.functional.normalize(refiner.fuse(items)).T
    own = torch.arange(40)[:, None] // 10 == torch.arange(32) // 8
    assert scores[own].mean() > scores[~own].mean() + 0.5
    again, _ = fit(modalities, train, "sum", REFINE)
    for name, value in refiner.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
