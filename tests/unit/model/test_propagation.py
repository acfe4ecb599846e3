"""The sparse product: against dense ones, its gradient, and the shapes that break kernels."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch._dynamo  # Adam imports it at its first use: here, before the processes that are killed are forked.

from crane_core.model.propagation import DirectedGraph, SymmetricGraph, cut_rows, drop_edges, propagate

CPU = torch.device("cpu")


def symmetric(size: int, density: float, seed: int = 0) -> sp.csr_array:
    """Random symmetric float32 CSR; every seventh row and the last are empty."""
    generator = np.random.default_rng(seed)
    dense = np.where(generator.random((size, size)) < density, generator.normal(size=(size, size)), 0)
    dense[::7] = dense[-1:] = 0
    dense = np.triu(dense) + np.triu(dense, 1).T
    dense[:, ::7] = dense[:, -1:] = 0
    return sp.csr_array(np.where(dense == dense.T, dense, 0).astype(np.float32))


@pytest.mark.parametrize("dim", [1, 3, 64, 100])
@pytest.mark.parametrize("density", [0.0, 0.2])
def test_the_product_is_the_dense_one(dim: int, density: float) -> None:
    matrix = symmetric(50, density)
    rows = torch.randn(50, dim, generator=torch.Generator().manual_seed(1))
    expected = (matrix.toarray().astype(np.float64) @ rows.double().numpy()).astype(np.float32)
    found = SymmetricGraph(matrix, CPU) @ rows
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_in_any_layout_and_indices_of_any_width() -> None:
    matrix = symmetric(50, 0.2)
    rows = torch.randn(8, 50, generator=torch.Generator().manual_seed(1)).T
    expected = SymmetricGraph(matrix, CPU) @ rows.contiguous()
    wide = sp.csr_array((matrix.data, matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)), matrix.shape)
    assert torch.equal(SymmetricGraph(wide, CPU) @ rows, expected)


@pytest.mark.parametrize("density", [0.0, 0.2])
def test_a_matrix_that_stays_in_memory_gives_the_same_bits(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, rows = symmetric(50, density), torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    expected = SymmetricGraph(matrix, CPU) @ rows
    for entries in (1, 40, 100_000):
        monkeypatch.setattr("crane_core.model.propagation._BLOCK_ENTRIES", entries)
        streamed = SymmetricGraph(matrix, CPU, resident=False)
        assert torch.equal(streamed @ rows, expected)
        assert torch.equal(streamed.degrees(), torch.from_numpy(np.diff(matrix.indptr)).long())


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("resident", [True, False])
def test_rows_in_pieces_give_the_same_sums(density: float, resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crane_core.model.propagation._BLOCK_ENTRIES", 30)
    matrix = symmetric(50, density)
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for entries in (1, 3, 7, 1000):
        graph = SymmetricGraph(matrix, CPU, resident=resident, piece_entries=entries)
        np.testing.assert_allclose(graph @ rows, matrix.toarray() @ rows.numpy(), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(graph.multiply(rows, slice(9, 33)), (matrix.toarray() @ rows.numpy())[9:33], 1e-12)


def test_pieces_of_rows() -> None:
    starts, firsts = cut_rows(np.array([0, 0, 5, 6, 10], dtype=np.int32), 2)
    assert starts.tolist() == [0, 0, 2, 4, 5, 6, 8, 10] and starts.dtype == np.int32
    assert firsts.tolist() == [0, 1, 4, 5, 7]


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_the_gradient_is_that_of_the_dense_product(num_layers: int) -> None:
    matrix = symmetric(30, 0.2)
    generator = torch.Generator().manual_seed(2)
    rows, weights = (torch.randn(30, 6, generator=generator) for _ in range(2))
    dense, gradients = torch.from_numpy(matrix.toarray()), []
    ours, plain = (rows.clone().requires_grad_() for _ in range(2))
    layers = [plain]
    for _ in range(num_layers):
        layers.append(dense @ layers[-1])
    for leaf, found in ((ours, propagate(SymmetricGraph(matrix, CPU), ours, num_layers)), (plain, sum(layers))):
        scale = 1 if leaf is ours else num_layers + 1
        (found / scale * weights).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_a_directed_product_and_its_gradient() -> None:
    matrix = sp.csr_array(np.array([[0, 2, 0], [1, 0, 3]], dtype=np.float32))
    rows = torch.tensor([[1.0], [10.0], [100.0]], requires_grad=True)
    found = DirectedGraph(matrix, CPU) @ rows
    assert found.tolist() == [[20], [301]]
    (found * torch.tensor([[1.0], [10.0]])).sum().backward()
    assert rows.grad is not None and rows.grad.tolist() == [[10], [2], [30]]


def test_the_product_does_not_depend_on_the_number_of_threads() -> None:
    matrix, rows = symmetric(400, 0.1), torch.randn(400, 64, generator=torch.Generator().manual_seed(3))
    graph, threads, found = SymmetricGraph(matrix, CPU), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(graph @ rows)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


class SameKeys:
    """In place of a generator: every draw is 1."""

    def exponential(self, size: int) -> np.ndarray:
        return np.ones(size)


@pytest.mark.parametrize(("share", "expected"), [(0.5, [0, 1, 2]), (0.34, [0, 1, 2, 3]), (0.8, [0]), (0.99, [])])
def test_of_edges_with_equal_keys_the_first_are_kept(share: float, expected: list[int]) -> None:
    kept = drop_edges(np.arange(6), np.arange(6), share, SameKeys())  # type: ignore[arg-type]
    assert kept.tolist() == expected


def test_edge_dropout_keeps_the_promised_share_and_spares_rare_ends() -> None:
    users = np.repeat(np.arange(200), 10)
    items = np.where(np.arange(2000) % 2 == 0, 0, 1 + np.arange(2000) % 500)
    dropped = np.zeros(2000)
    for seed in range(30):
        kept = drop_edges(users, items, 0.3, np.random.default_rng(seed))
        assert len(kept) == 1400
        dropped += ~np.isin(np.arange(2000), kept)
    assert dropped[items == 0].mean() > 1.5 * dropped[items > 0].mean()
    assert len(drop_edges(users, items, 0.0, np.random.default_rng(0))) == 2000


def test_an_edge_is_kept_by_the_root_of_the_degrees_of_its_ends() -> None:
    # Every user has one edge; half of the edges lead to items of degree 9, which weigh a third of the others.
    users = np.arange(1800)
    items = np.concatenate([np.repeat(np.arange(100), 9), 100 + np.arange(900)])
    popular = [(drop_edges(users, items, 0.98, np.random.default_rng(seed)) < 900).mean() for seed in range(100)]
    assert np.mean(popular) == pytest.approx(1 / 4, abs=0.03)


def test_items_spread_to_users_as_in_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, of a matrix that is resident and of one that is brought over block by block."""
    half = sp.random_array((20, 30), density=0.3, rng=np.random.default_rng(3), dtype=np.float32)
    matrix = sp.csr_array(sp.block_array([[None, half], [half.T, None]]))
    generator = torch.Generator().manual_seed(4)
    items, weights = torch.randn(30, 8, generator=generator), torch.randn(20, 8, generator=generator)
    plain = items.clone().requires_grad_()
    expected = (SymmetricGraph(matrix, CPU) @ torch.cat([torch.zeros(20, 8), plain]))[:20]
    (expected * weights).sum().backward()
    for entries in (7, 100_000):
        monkeypatch.setattr("crane_core.model.propagation._BLOCK_ENTRIES", entries)
        for resident in (True, False):
            ours = items.clone().requires_grad_()
            found = SymmetricGraph(matrix, CPU, resident=resident).spread(ours)
            (found * weights).sum().backward()
            assert torch.equal(found, expected) and torch.equal(ours.grad, plain.grad)
