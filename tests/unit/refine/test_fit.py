"""Refining: projection by hand, chunks, ranks and restarts equal the whole, and a fit that finds planted groups."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from crane_core.config import Phi, Refine
from crane_core.dataset.interactions import ItemLists
from crane_core.dataset.modalities import Modality
from crane_core.errors import DataError, TrainingError
from crane_core.refine.catalog import refine_catalog, refine_to_files, refined_files
from crane_core.refine.fit import _profiles_without, fit
from crane_core.refine.recursion import Recursion
from crane_core.refine.refiner import Refiner, profile_scales
from tests.worlds.planted import checkerboard

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


def test_profiles_are_brought_to_the_length_of_an_item_row() -> None:
    items = np.array([[3.0, 4.0], [0.0, 1.0], [9.0, 9.0]], dtype=np.float32)
    profiles = np.array([[6.0, 8.0], [0.0, 8.0], [7.0, 7.0]], dtype=np.float32)
    modality = Modality("m", items, np.array([True, True, False]), profiles, np.array([2, 8, 0]))
    assert profile_scales([modality]) == [pytest.approx(9.0 / 3.0)]


def halves(modalities: list[Modality], dtype: str) -> list[Modality]:
    """The modalities with items that half precision holds, in a number type."""
    rounded = [each.items.astype(np.float16).astype(dtype) for each in modalities]
    return [dataclasses.replace(each, items=items) for each, items in zip(modalities, rounded, strict=True)]


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_the_number_type_of_the_features_decides_nothing(aggregate: str, tmp_path: Path) -> None:
    found = []
    for dtype in ("float16", "float32"):
        modalities = halves(planted_modalities(), dtype)
        refiner, _ = fit(modalities, checkerboard().train, aggregate, CONFIG)
        likeness = refine_to_files(refiner, modalities, 7, tmp_path / dtype)
        items, users, _ = refine_catalog(refiner, modalities, 7)
        found.append([likeness, *refiner.state_dict().values(), items, users, *rows_in(tmp_path / dtype).values()])
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))
    long = [dataclasses.replace(each, items=100 * each.items) for each in planted_modalities()]
    squares = profile_scales(halves(long, "float16")), profile_scales(halves(long, "float32"))
    assert squares[0] == squares[1] and min(squares[0]) > 0, "the squares of these leave half precision"


PHIS: list[Phi] = ["softmax", "tanh", "linear", "block", "landmark"]


def fresh_refiner(modalities: list[Modality], phi: Phi) -> Refiner:
    config = CONFIG.model_copy(update={"phi": phi})
    return Refiner([m.items.shape[1] for m in modalities], profile_scales(modalities), config)


def rows_in(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.load(path) for name, path in refined_files(folder, CONFIG.num_recursions).items()}


def refine_as_one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    modalities = planted_modalities()
    for phi in PHIS:
        likeness = refine_to_files(fresh_refiner(modalities, phi), modalities, 5, folder / phi)
        np.save(folder / f"{phi}-{rank}.npy", likeness)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_leave_the_rows_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(refine_as_one_of_two, (tmp_path,), nprocs=2)
    modalities = planted_modalities()
    for phi in PHIS:
        items, users, likeness = refine_catalog(fresh_refiner(modalities, phi), modalities, 1000)
        found = rows_in(tmp_path / phi)
        for name, expected in (("items", items.numpy()), ("users", users.numpy())):
            # Other blocks are summed in another order: without fused multiply-add that is worth 2.4e-6 here.
            assert np.abs(found[name] - expected).max() < 1e-5 * np.abs(expected).max()
        for rank in (0, 1):
            np.testing.assert_allclose(np.load(tmp_path / f"{phi}-{rank}.npy"), likeness, atol=1e-6)


class Killed(BaseException):
    pass


def test_a_pass_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modalities = planted_modalities()
    refiner = fresh_refiner(modalities, "softmax")
    likeness = refine_to_files(refiner, modalities, 5, tmp_path / "undisturbed")
    refine, refined = Recursion.refine, []

    def killed_at(last: int):
        def counted(self, rows, keys, chunk_size):
            if len(refined) == last:
                raise Killed
            refined.append(len(rows))
            return refine(self, rows, keys, chunk_size)

        return counted

    # 40 users and 32 items are 15 chunks a recursion.
    for attempt in (20, 22, 30, 1000):
        monkeypatch.setattr(Recursion, "refine", killed_at(attempt))
        if attempt < 1000:
            with pytest.raises(Killed):
                refine_to_files(refiner, modalities, 5, tmp_path / "killed")
        else:
            assert refine_to_files(refiner, modalities, 5, tmp_path / "killed") == likeness
    assert len(refined) == 45, "no chunk was refined twice"
    for name, rows in rows_in(tmp_path / "undisturbed").items():
        assert np.array_equal(rows, rows_in(tmp_path / "killed")[name])


@pytest.mark.parametrize("phi", PHIS)
def test_one_item_duplicates_and_zero_rows_are_refined(phi: Phi) -> None:
    """Fewer items than lists and landmarks, too; the one user loses the target and has nothing left."""
    for features in (np.ones((1, 3)), np.zeros((2, 3)), np.array([[1, 2, 3], [1, 2, 3], [0, 0, 0], [4, 5, 6]])):
        items = features.astype(np.float32)
        counts = np.ones(1, dtype=np.int32)
        modality = Modality("m", items, np.ones(len(items), dtype=bool), items[:1], counts)
        train = ItemLists.from_pairs(np.zeros(1, np.int32), np.zeros(1, np.int32), 1)
        config = CONFIG.model_copy(update={"phi": phi, "num_lists": 50, "num_attention_landmarks": 50, "num_steps": 3})
        refiner, report = fit([modality], train, "sum", config)
        rows, users, likeness = refine_catalog(refiner, [modality], 2)
        assert np.isfinite(report["curve"][-1]["ranking"])
        assert torch.isfinite(rows).all()
        assert torch.isfinite(users).all()
        assert np.isfinite(likeness).all()
        same = (items[:, None] == items).all(2)
        assert ((rows[:, None] - rows).abs().amax((2, 3)) < 1e-6)[same].all(), "equal items have equal rows"


@pytest.mark.parametrize("field", ["items", "profiles"])
def test_a_feature_that_is_not_finite_is_named(field: str, tmp_path: Path) -> None:
    modalities = planted_modalities()
    damaged = getattr(modalities[1], field).copy()
    damaged[3, 2] = np.nan
    broken = [modalities[0], dataclasses.replace(modalities[1], **{field: damaged})]
    refiner = fresh_refiner(modalities, "linear")
    whose = "items" if field == "items" else "users"
    for work in (
        lambda: fit(broken, checkerboard().train, "sum", CONFIG),
        lambda: refine_catalog(refiner, broken, 100),
        lambda: refine_to_files(refiner, broken, 100, tmp_path),
    ):
        with pytest.raises(DataError, match=rf"m1 has NaN or infinity in \d+ of \d+ rows of {whose}"):
            work()


def test_no_item_and_a_fit_that_diverges_are_typed_errors() -> None:
    modalities = planted_modalities()
    empty = [dataclasses.replace(m, items=m.items[:0], present=m.present[:0]) for m in modalities]
    with pytest.raises(DataError, match="no item"):
        fit(empty, checkerboard().train, "sum", CONFIG)
    with pytest.raises(TrainingError, match=r"Lower refine\.learning_rate"):
        fit(modalities, checkerboard().train, "sum", CONFIG.model_copy(update={"learning_rate": 1e30}))


@pytest.mark.parametrize("phi", PHIS)
def test_chunks_of_the_catalog_equal_the_whole(phi: str) -> None:
    modalities = planted_modalities()
    config = CONFIG.model_copy(update={"phi": phi, "num_steps": 5})
    refiner, _ = fit(modalities, checkerboard().train, "sum", config)
    small = refine_catalog(refiner, modalities, 5)
    large = refine_catalog(refiner, modalities, 10_000)
    for found, expected in zip(small[:2], large[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(small[2]) == config.num_recursions + 1


def plain_fit_losses(
    refiner: Refiner, modalities: list[Modality], train: ItemLists, config: Refine
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranking and agreement of the first mini-batch without RCA, item by item and in float64."""

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
    config = CONFIG.model_copy(
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
    refiner, report = fit(modalities, train, "sum", CONFIG)
    assert report["curve"][-1]["ranking"] < 0.9 * report["curve"][0]["ranking"]
    items, users, _ = refine_catalog(refiner, modalities, 100)
    scores = torch.nn.functional.normalize(refiner.fuse(users)) @ torch.nn.functional.normalize(refiner.fuse(items)).T
    own = torch.arange(40)[:, None] // 10 == torch.arange(32) // 8
    assert scores[own].mean() > scores[~own].mean() + 0.5
    again, _ = fit(modalities, train, "sum", CONFIG)
    for name, value in refiner.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
