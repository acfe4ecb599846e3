"""RCA: blocks against the dense formula, by hand, and gradients."""

import pytest
import torch
from torch import Tensor

from crane_core.rca import RecursiveCrossModalAttention, attend

PHIS = ("softmax", "tanh", "linear")


def dense(queries: Tensor, keys: Tensor, phi: str) -> Tensor:
    """The formula as the paper writes it, rows x keys in memory."""
    scores = queries @ keys.T / queries.shape[1] ** 0.5
    if phi == "softmax":
        return torch.softmax(scores, dim=1) @ keys
    return (torch.tanh(scores) if phi == "tanh" else scores) @ keys / len(keys)


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_blocks_equal_the_dense_formula_and_its_gradients(phi: str, chunk_size: int) -> None:
    queries, keys = rows(0, 23, 6), rows(1, 31, 6)
    weight = rows(2, 23, 6)
    results = []
    for compute in (lambda q, k: attend(q, k, phi, chunk_size), lambda q, k: dense(q, k, phi)):
        q, k = queries.clone().requires_grad_(), keys.clone().requires_grad_()
        output = compute(q, k)
        (output * weight).sum().backward()
        results.append((output.detach(), q.grad, k.grad))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("phi", ["softmax", "tanh"])
def test_gradcheck(phi: str) -> None:
    inputs = (rows(3, 5, 3).requires_grad_(), rows(4, 4, 3).requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: attend(q, k, phi, 2), inputs)


def test_numbers_worked_by_hand() -> None:
    queries, keys = torch.tensor([[1.0]]), torch.tensor([[0.0], [2.0]])
    weight = 1 / (1 + torch.exp(torch.tensor(2.0)))
    assert attend(queries, keys, "softmax").item() == pytest.approx(2 * (1 - weight.item()))
    assert attend(queries, keys, "tanh").item() == pytest.approx(torch.tanh(torch.tensor(2.0)).item())
    assert attend(queries, keys, "linear").item() == pytest.approx((2 * 2) / 2)


def test_softmax_survives_large_scores() -> None:
    output = attend(torch.tensor([[1e4]]), torch.tensor([[1.0], [3.0], [2.0]]), "softmax", chunk_size=1)
    assert output.item() == 3.0


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_recursions_equal_the_dense_formula_and_its_gradients(phi: str, num_modalities: int) -> None:
    dim, num_recursions = 4, 3
    generator = torch.Generator().manual_seed(5)
    rca = RecursiveCrossModalAttention(num_modalities, dim, num_recursions, phi, generator).double()
    for parameter in rca.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    items, users = rows(6, 19, num_modalities, dim), rows(7, 8, num_modalities, dim)

    def reference(items: Tensor, users: Tensor) -> tuple[Tensor, Tensor]:
        for weights in rca.recursions:
            joint = torch.cat([items[:, m] for m in range(num_modalities)], dim=1) @ weights.joint + weights.joint_bias
            refined = [
                torch.stack(
                    [
                        x[:, m] + torch.relu(dense(x[:, m] @ weights.correlation[m], joint, phi) @ weights.hidden[m])
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


@pytest.mark.parametrize("phi", PHIS)
def test_float32_in_blocks_stays_within_1e_5_of_float64(phi: str) -> None:
    queries, keys = rows(8, 300, 64), rows(9, 500, 64)
    found = attend(queries.float(), keys.float(), phi, chunk_size=64).double()
    assert relative_error(found, dense(queries, keys, phi)) < 1e-5


def test_no_recursion_leaves_rows_alone() -> None:
    rca = RecursiveCrossModalAttention(2, 3, 0, "softmax", torch.Generator())
    items, users = torch.ones(4, 2, 3), torch.ones(5, 2, 3)
    refined = rca(items, users)
    assert refined[0] is items
    assert refined[1] is users
