"""RCA: tiles against the dense formula, by hand, and gradients; the sparse forms against what they leave in."""

import pytest
import torch
from torch import Tensor

from crane_core.refine.attention import Correlation, ListedKeys, attend
from crane_core.refine.recursion import RecursiveCrossModalAttention

DENSE = (Correlation("softmax"), Correlation("tanh"), Correlation("linear"))
SPARSE = (Correlation("block", num_lists=5, num_probes=2, seed=3), Correlation("landmark", num_landmarks=7, seed=3))
EVERY = pytest.mark.parametrize("correlation", DENSE + SPARSE, ids=lambda correlation: correlation.phi)


def dense(queries: Tensor, keys: Tensor, correlation: Correlation) -> Tensor:
    """The formula as the paper writes it, rows x keys in memory; the sparse forms as a mask of it."""
    scores = queries @ keys.T / queries.shape[1] ** 0.5
    if correlation.phi in ("tanh", "linear"):
        return (torch.tanh(scores) if correlation.phi == "tanh" else scores) @ keys / len(keys)
    if correlation.phi == "landmark":
        picked = torch.randperm(len(keys), generator=torch.Generator().manual_seed(correlation.seed))
        seen = torch.zeros(len(keys), dtype=torch.bool)
        seen[picked[: correlation.num_landmarks]] = True
        scores = scores.masked_fill(~seen, -torch.inf)
    if correlation.phi == "block":
        scores = scores.masked_fill(~in_nearest_lists(queries, keys, correlation), -torch.inf)
    return torch.softmax(scores, dim=1) @ keys


def in_nearest_lists(queries: Tensor, keys: Tensor, correlation: Correlation) -> Tensor:
    """bool [n, m], by the mean score of every list."""
    cells = cell_of_each(correlation.prepare(keys))
    scores = (queries @ keys.T).detach()
    means = torch.stack([scores[:, cells == cell].mean(1) for cell in range(int(cells.max()) + 1)], dim=1)
    nearest = means.argsort(dim=1, descending=True)[:, : correlation.num_probes]
    return (cells == nearest[:, :, None]).any(1)


def cell_of_each(lists: ListedKeys) -> Tensor:
    """int64 [m], and every key is in one list."""
    cells = torch.full((lists.bounds[-1],), -1)
    for cell, (start, stop) in enumerate(zip(lists.bounds, lists.bounds[1:], strict=False)):
        assert start < stop
        assert (cells[lists.order[start:stop]] == -1).all()
        cells[lists.order[start:stop]] = cell
    assert (cells >= 0).all()
    return cells


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@EVERY
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_tiles_equal_the_dense_formula_and_its_gradients(correlation: Correlation, chunk_size: int) -> None:
    queries, keys = rows(0, 23, 6), rows(1, 31, 6)
    weight = rows(2, 23, 6)
    results = []
    for compute in (lambda q, k: attend(q, k, correlation, chunk_size), lambda q, k: dense(q, k, correlation)):
        q, k = queries.clone().requires_grad_(), keys.clone().requires_grad_()
        output = compute(q, k)
        (output * weight).sum().backward()
        results.append((output.detach(), q.grad, k.grad))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-12


@EVERY
def test_gradcheck(correlation: Correlation) -> None:
    inputs = (rows(3, 5, 3).requires_grad_(), rows(4, 11, 3).requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: attend(q, k, correlation, 2), inputs)


@EVERY
def test_keys_are_restored_from_their_source(correlation: Correlation) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(rows, 8, generator=generator) for rows in (60, 9))
    prepared = correlation.prepare(keys)
    assert torch.equal(correlation.restore(prepared.source).attend(queries), prepared.attend(queries))


def test_tiled_softmax_equals_the_fused_kernel() -> None:
    """Other devices take the tiles that `block` takes with one list."""
    queries, keys = rows(10, 1500, 5), rows(11, 700, 5)
    tiled = attend(queries, keys, Correlation("block", num_lists=1))
    assert relative_error(tiled, attend(queries, keys, Correlation("softmax"))) < 1e-12


@pytest.mark.parametrize("limit", [4, 10**6])
def test_all_lists_or_all_landmarks_are_softmax(limit: int) -> None:
    queries, keys = rows(12, 20, 4), rows(13, 4 if limit == 4 else 30, 4)
    expected = dense(queries, keys, Correlation("softmax"))
    block = Correlation("block", num_lists=4, num_probes=limit)
    assert relative_error(attend(queries, keys, block), expected) < 1e-12
    assert relative_error(attend(queries, keys, Correlation("landmark", num_landmarks=limit)), expected) < 1e-12


@pytest.mark.parametrize("num_keys", [1, 2, 3, 6, 7])
def test_fewer_keys_than_lists_duplicates_and_zero_rows(num_keys: int) -> None:
    """Every query sees whole lists: its output is a convex combination of the keys it is said to see."""
    keys = torch.cat([rows(14, num_keys, 3), torch.zeros(2, 3, dtype=torch.float64), rows(14, num_keys, 3)])[
        : num_keys if num_keys < 3 else None
    ]
    queries = torch.cat([rows(15, 4, 3), torch.zeros(1, 3, dtype=torch.float64), keys])
    for num_lists in (1, 4, 50):
        for num_probes in (1, 3, 50):
            correlation = Correlation("block", num_lists=num_lists, num_probes=num_probes)
            lists = correlation.prepare(keys)
            cells, nearest = cell_of_each(lists), lists.nearest(queries)
            assert len(lists.means) <= min(num_lists, len(keys))
            same = (keys[:, None] == keys).all(2)
            assert (cells[:, None] == cells)[same].all()
            seen = (cells == nearest[:, :, None]).any(1)
            scores = (queries @ keys.T / 3**0.5).masked_fill(~seen, -torch.inf)
            expected = torch.softmax(scores, dim=1) @ keys
            torch.testing.assert_close(attend(queries, keys, correlation, 2), expected, rtol=1e-12, atol=1e-14)


@EVERY
def test_no_query(correlation: Correlation) -> None:
    assert attend(torch.empty(0, 3), torch.ones(4, 3), correlation).shape == (0, 3)


def test_one_key_is_what_every_query_gets() -> None:
    for correlation in (Correlation("softmax"), Correlation("block"), Correlation("landmark")):
        assert attend(rows(16, 3, 2), rows(17, 1, 2), correlation).tolist() == rows(17, 1, 2).repeat(3, 1).tolist()


def test_lists_are_the_planted_groups_and_a_query_stays_in_its_own() -> None:
    groups = torch.eye(3, dtype=torch.float64) * 10
    keys = groups.repeat(20, 1) + 0.01 * rows(18, 60, 3)
    lists = Correlation("block", num_lists=12, num_probes=1).prepare(keys)
    cells = cell_of_each(lists)
    for cell in range(int(cells.max()) + 1):
        assert len(set((torch.nonzero(cells == cell)[:, 0] % 3).tolist())) == 1
    assert (lists.attend(groups) - groups).abs().max() < 0.1


def test_the_lists_are_tighter_than_cells_of_random_keys() -> None:
    keys = rows(23, 600, 2)

    def spread(cells: Tensor) -> float:
        return sum(float((part - part.mean(0)).square().sum()) for part in (keys[cells == c] for c in cells.unique()))

    random = keys[torch.randperm(600, generator=torch.Generator().manual_seed(4))[:12]]
    found = cell_of_each(Correlation("block", num_lists=12, seed=4).prepare(keys))
    assert spread(found) < 0.9 * spread(torch.cdist(keys, random).argmin(1))


@pytest.mark.parametrize("phi", ["block", "landmark"])
def test_the_seed_decides_and_the_defaults_grow_with_the_root_of_the_keys(phi: str) -> None:
    queries, keys = rows(19, 50, 4), rows(20, 400, 4)
    first, again, other = (attend(queries, keys, Correlation(phi, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    prepared = Correlation(phi).prepare(keys)
    assert len(prepared.means if phi == "block" else prepared.keys) == (20 if phi == "block" else 160)


@pytest.mark.parametrize("phi", ["block", "landmark"])
def test_seeing_more_keys_brings_it_closer_to_softmax(phi: str) -> None:
    queries, keys = rows(21, 200, 8), rows(22, 1000, 8)
    expected = dense(queries, keys, Correlation("softmax"))
    errors = [
        relative_error(attend(queries, keys, Correlation(phi, None, probes, landmarks)), expected)
        for probes, landmarks in ((1, 30), (16, 500), (32, 1000))
    ]
    assert errors[0] > 2 * errors[1] > errors[2]
    assert errors[2] < 1e-12


def test_numbers_worked_by_hand() -> None:
    queries, keys = torch.tensor([[1.0]]), torch.tensor([[0.0], [2.0]])
    weight = 1 / (1 + torch.exp(torch.tensor(2.0)))
    assert attend(queries, keys, Correlation("softmax")).item() == pytest.approx(2 * (1 - weight.item()))
    assert attend(queries, keys, Correlation("tanh")).item() == pytest.approx(torch.tanh(torch.tensor(2.0)).item())
    assert attend(queries, keys, Correlation("linear")).item() == pytest.approx((2 * 2) / 2)


@pytest.mark.parametrize("correlation", [Correlation("softmax"), Correlation("block", num_lists=3, num_probes=3)])
@pytest.mark.parametrize("sign", [1, -1])
def test_softmax_survives_large_scores(correlation: Correlation, sign: int) -> None:
    keys = torch.tensor([[1.0], [3.0], [2.0]])
    output = attend(torch.tensor([[sign * 1e4]]), keys, correlation, chunk_size=1)
    assert output.item() == (3.0 if sign == 1 else 1.0)


def test_tanh_is_exact_near_zero_and_saturates() -> None:
    queries = torch.tensor([[0.0], [1e-6], [-1e-3], [0.5], [-8.0], [1e4], [-1e4]])
    found = attend(queries, torch.ones(1, 1), Correlation("tanh"))
    torch.testing.assert_close(found, torch.tanh(queries.double()).float(), rtol=3e-7, atol=0)


@EVERY
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_recursions_equal_the_dense_formula_and_its_gradients(correlation: Correlation, num_modalities: int) -> None:
    dim, num_recursions = 4, 3
    generator = torch.Generator().manual_seed(5)
    rca = RecursiveCrossModalAttention(num_modalities, dim, num_recursions, correlation, generator).double()
    for parameter in rca.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    items, users = rows(6, 19, num_modalities, dim), rows(7, 8, num_modalities, dim)

    def attended(queries: Tensor, keys: Tensor) -> Tensor:
        return dense(queries, keys, correlation)

    def reference(items: Tensor, users: Tensor) -> tuple[Tensor, Tensor]:
        for weights in rca.recursions:
            joint = torch.cat([items[:, m] for m in range(num_modalities)], dim=1) @ weights.joint + weights.joint_bias
            refined = [
                torch.stack(
                    [
                        x[:, m] + torch.relu(attended(x[:, m] @ weights.correlation[m], joint) @ weights.hidden[m])
                        for m in range(num_modalities)
                    ],
                    dim=1,
                )
                for x in (items, users)
            ]
            items, users = refined
        return items, users

    results = []
    for compute in (lambda i, u: rca(i, u, chunk_size=5), reference):
        rca.zero_grad()
        outputs = compute(items, users)
        sum((output * output).sum() for output in outputs).backward()
        results.append([*(o.detach() for o in outputs), *(p.grad.clone() for p in rca.parameters())])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-10


@EVERY
def test_float32_in_tiles_stays_within_1e_5_of_float64(correlation: Correlation) -> None:
    queries, keys = rows(8, 300, 64).float(), rows(9, 500, 64).float()
    found = attend(queries, keys, correlation, chunk_size=64).double()
    if correlation.phi == "block":
        lists = correlation.prepare(keys)
        seen = (cell_of_each(lists) == lists.nearest(queries)[:, :, None]).any(1)
        scores = (queries.double() @ keys.double().T / 8).masked_fill(~seen, -torch.inf)
        expected = torch.softmax(scores, dim=1) @ keys.double()
    else:
        expected = dense(queries.double(), keys.double(), correlation)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("phi", ["softmax", "tanh", "block", "landmark"])
def test_bfloat16_rounds_the_inputs_and_sums_in_float32(phi: str) -> None:
    queries, keys = rows(24, 50, 64).float(), rows(25, 400, 64).float()
    found = attend(queries, keys, Correlation(phi, precision="bfloat16"))
    if phi == "block":
        # The lists are those of the keys as they came.
        lists = Correlation(phi).prepare(keys)
        lists.keys = lists.keys.bfloat16().float()
        expected = lists.attend(queries.bfloat16().float())
    else:
        expected = attend(queries.bfloat16().float(), keys.bfloat16().float(), Correlation(phi))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not torch.equal(found, attend(queries, keys, Correlation(phi)))


def test_no_recursion_leaves_rows_alone() -> None:
    rca = RecursiveCrossModalAttention(2, 3, 0, Correlation("softmax"), torch.Generator())
    items, users = torch.ones(4, 2, 3), torch.ones(5, 2, 3)
    refined = rca(items, users)
    assert refined[0] is items
    assert refined[1] is users
