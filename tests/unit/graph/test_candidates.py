"""Packed neighbours, exact dot products, and how many rows need the full comparison."""

import numpy as np
import pytest
import torch

from crane_core.graph import candidates
from crane_core.graph.candidates import pack, unit_rows, unpack
from crane_core.graph.exact import search
from tests.worlds.planted import make_rows


def test_few_rows_are_compared_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    everything = candidates.compare_all
    monkeypatch.setattr(candidates, "compare_all", lambda *given: compared.append(len(given[1])) or everything(*given))
    for kind, most in (("random", 0), ("duplicates", 0), ("some_duplicates", 0), ("zeros", 1)):
        rows = np.concatenate([make_rows(kind), 1 + np.random.default_rng(1).normal(size=(100, 8))])
        compared.clear()
        search(rows, range(len(rows)), 5)
        assert sum(compared) <= most, kind


def test_a_dot_product_of_unit_rows_is_exact_in_any_order() -> None:
    generator = np.random.default_rng(0)
    for dim in (3, 64, 1000):
        left, right = unit_rows(generator.normal(size=(2, dim)))
        products = left.astype(np.float64) * right.astype(np.float64)
        orders = {float(np.add.reduce(products[generator.permutation(dim)])) for _ in range(20)}
        assert orders == {float(left.astype(np.float64) @ right.astype(np.float64))}


def test_packed_neighbours_keep_similarity_and_row_and_sort_by_both() -> None:
    similarities = np.array([0.5, -0.25, 0.0, -0.0, 1.0, 0.5, -1.0], dtype=np.float32)
    keys = np.array([7, 1, 5, 4, 2**31 - 2, 3, 0], dtype=np.int32)
    packed = np.sort(pack(torch.from_numpy(similarities), torch.from_numpy(keys)).numpy())
    found, values = unpack(packed)
    assert found.tolist() == [2**31 - 2, 3, 7, 4, 5, 1, 0]
    assert values.tolist() == [1.0, 0.5, 0.5, 0.0, 0.0, -0.25, -1.0]
