"""Refining the catalog: chunks, ranks and restarts give the same rows as one pass."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from crane_core.config import Phi
from crane_core.dataset.interactions import ItemLists
from crane_core.dataset.modalities import Modality
from crane_core.errors import DataError
from crane_core.refine.catalog import refine_catalog, refine_to_files, refined_files
from crane_core.refine.fit import fit
from crane_core.refine.recursion import Recursion
from crane_core.refine.refiner import Refiner, profile_scales
from tests.worlds.planted import REFINE, checkerboard, halves, planted_modalities
from tests.worlds.processes import on_ranks


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_the_number_type_of_the_features_decides_nothing(aggregate: str, tmp_path: Path) -> None:
    found = []
    for dtype in ("float16", "float32"):
        modalities = halves(planted_modalities(), dtype)
        refiner, _ = fit(modalities, checkerboard().train, aggregate, REFINE)
        likeness = refine_to_files(refiner, modalities, 7, tmp_path / dtype)
        items, users, _ = refine_catalog(refiner, modalities, 7)
        found.append([likeness, *refiner.state_dict().values(), items, users, *rows_in(tmp_path / dtype).values()])
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))
    long = [dataclasses.replace(each, items=100 * each.items) for each in planted_modalities()]
    squares = profile_scales(halves(long, "float16")), profile_scales(halves(long, "float32"))
    assert squares[0] == squares[1] and min(squares[0]) > 0, "the squares of these leave half precision"


PHIS: list[Phi] = ["softmax", "tanh", "linear", "block", "landmark"]


def fresh_refiner(modalities: list[Modality], phi: Phi) -> Refiner:
    config = REFINE.model_copy(update={"phi": phi})
    return Refiner([m.items.shape[1] for m in modalities], profile_scales(modalities), config)


def rows_in(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.load(path) for name, path in refined_files(folder, REFINE.num_recursions).items()}


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
    on_ranks(refine_as_one_of_two, 2, tmp_path)
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
    """There are fewer items than lists and landmarks, and the profile of the only user is empty without the target."""
    for features in (np.ones((1, 3)), np.zeros((2, 3)), np.array([[1, 2, 3], [1, 2, 3], [0, 0, 0], [4, 5, 6]])):
        items = features.astype(np.float32)
        counts = np.ones(1, dtype=np.int32)
        modality = Modality("m", items, np.ones(len(items), dtype=bool), items[:1], counts)
        train = ItemLists.from_pairs(np.zeros(1, np.int32), np.zeros(1, np.int32), 1)
        config = REFINE.model_copy(update={"phi": phi, "num_lists": 50, "num_attention_landmarks": 50, "num_steps": 3})
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
        lambda: fit(broken, checkerboard().train, "sum", REFINE),
        lambda: refine_catalog(refiner, broken, 100),
        lambda: refine_to_files(refiner, broken, 100, tmp_path),
    ):
        with pytest.raises(DataError, match=rf"m1 has NaN or infinity in \d+ of \d+ rows of {whose}"):
            work()


@pytest.mark.parametrize("phi", PHIS)
def test_chunks_of_the_catalog_equal_the_whole(phi: str) -> None:
    modalities = planted_modalities()
    config = REFINE.model_copy(update={"phi": phi, "num_steps": 5})
    refiner, _ = fit(modalities, checkerboard().train, "sum", config)
    small = refine_catalog(refiner, modalities, 5)
    large = refine_catalog(refiner, modalities, 10_000)
    for found, expected in zip(small[:2], large[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(small[2]) == config.num_recursions + 1
