"""Keys prepared for attention: the sparse forms against softmax over the keys they keep."""

import pytest
import torch

from crane_core.refine.attention import Correlation, attend
from tests.worlds.dense_attention import (
    EVERY,
    dense,
    list_of_each,
    relative_error,
    rows,
)


@EVERY
def test_keys_are_restored_from_their_source(correlation: Correlation) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(rows, 8, generator=generator) for rows in (60, 9))
    prepared = correlation.prepare(keys)
    assert torch.equal(correlation.restore(prepared.source).attend(queries), prepared.attend(queries))


@pytest.mark.parametrize("limit", [4, 10**6])
def test_all_lists_or_all_landmarks_are_softmax(limit: int) -> None:
    queries, keys = rows(12, 20, 4), rows(13, 4 if limit == 4 else 30, 4)
    expected = dense(queries, keys, Correlation("softmax"))
    block = Correlation("block", num_lists=4, num_probes=limit)
    assert relative_error(attend(queries, keys, block), expected) < 1e-12
    assert relative_error(attend(queries, keys, Correlation("landmark", num_landmarks=limit)), expected) < 1e-12


@pytest.mark.parametrize("num_keys", [1, 2, 3, 6, 7])
def test_fewer_keys_than_lists_duplicates_and_zero_rows(num_keys: int) -> None:
    """Each query attends to complete lists: its output is the softmax over the keys of its nearest lists."""
    keys = torch.cat([rows(14, num_keys, 3), torch.zeros(2, 3, dtype=torch.float64), rows(14, num_keys, 3)])[
        : num_keys if num_keys < 3 else None
    ]
    queries = torch.cat([rows(15, 4, 3), torch.zeros(1, 3, dtype=torch.float64), keys])
    for num_lists in (1, 4, 50):
        for num_probes in (1, 3, 50):
            correlation = Correlation("block", num_lists=num_lists, num_probes=num_probes)
            lists = correlation.prepare(keys)
            numbers, nearest = list_of_each(lists), lists.nearest(queries)
            assert len(lists.means) <= min(num_lists, len(keys))
            same = (keys[:, None] == keys).all(2)
            assert (numbers[:, None] == numbers)[same].all()
            seen = (numbers == nearest[:, :, None]).any(1)
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
    numbers = list_of_each(lists)
    for number in range(int(numbers.max()) + 1):
        assert len(set((torch.nonzero(numbers == number)[:, 0] % 3).tolist())) == 1
    assert (lists.attend(groups) - groups).abs().max() < 0.1


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
