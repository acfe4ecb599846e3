"""The mathematics of the models: numbers by hand, a plain dense reference, finite differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.func import functional_call

from crane_core.model.content import Content
from crane_core.model.crane import Crane, fill_cold
from crane_core.model.lightgcn import POWERS
from crane_core.model.losses import info_nce, sampled_softmax
from crane_core.model.propagation import SymmetricGraph, propagate
from crane_core.model.sharding import Shards
from crane_core.model.user_item_graph import Edges, user_item_graph
from crane_core.model.views import Batch, Views
from tests.worlds.settings import changed, model_config
from tests.worlds.trainings import draw

CPU = torch.device("cpu")
NUM_USERS, NUM_ITEMS, DIM, WIDTH = 6, 8, 3, 4
# User 5 has met nothing, and nobody has met item 7.
PAIRS = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 3), (2, 4), (3, 4), (3, 5), (3, 0), (4, 6)]
EDGES = [(0, 1), (1, 2), (2, 3), (4, 5), (5, 6), (6, 7), (0, 7), (2, 5)]
FORMS = [
    dict(zip(("semantic_items", "semantic_users", "own_content", "semantic_weight"), form, strict=True))
    for form in itertools.product(("ids", "content"), ("items", "profiles"), (True, False), ("gate", "scale", "none"))
]
BATCH = Batch(torch.tensor([0, 3, 3, 1, 4]), torch.tensor([2, 4, 5, 3, 6]), torch.tensor([4, 1, 2, 6, 0]))
# Item 4 is the positive of one row and a negative of the others; user 3 has met it, and item 0.
SHARED = BATCH._replace(
    negatives=torch.tensor([0, 3, 4]),
    met=torch.tensor([[1, 0, 0], [1, 0, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool),
    weights=torch.tensor([0.5, 2.0, 2.0, 1.5, 0.25]).double(),
)


def graph() -> SymmetricGraph:
    users, items = np.array(PAIRS).T
    return SymmetricGraph(user_item_graph(Edges(users, items), Shards((NUM_USERS, NUM_ITEMS))), CPU)


def item_matrix() -> np.ndarray:
    """Not normalised: weights that differ, to show where they enter."""
    matrix = np.zeros((NUM_ITEMS, NUM_ITEMS), dtype=np.float32)
    for weight, (left, right) in enumerate(EDGES, start=2):
        matrix[left, right] = matrix[right, left] = weight / 8
    return matrix


def crane(**settings: object) -> Crane:
    """A model in double precision whose parameters are all away from their first values."""
    config = model_config(
        embedding_dim=DIM,
        num_layers=3,
        num_item_layers=2,
        regularisation=0.3,
        contrast_weight=0.7,
        contrast_temperature=0.4,
        ranking_temperature=0.25,
    )
    config = changed(config, **settings)
    content = Content(
        draw(1, NUM_ITEMS, 2, WIDTH), SymmetricGraph(sp.csr_array(item_matrix()), CPU), draw(2, NUM_USERS, 2, WIDTH)
    )
    model = Crane(NUM_USERS, NUM_ITEMS, content, config).double()
    for number, parameter in enumerate(model.parameters()):
        parameter.data += 0.5 * draw(10 + number, *parameter.shape)
    return model


def plain_views(model: Crane) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`z`, `e` and `h` from dense matrices, a user and a modality at a time."""
    config, content = model.config, model.content
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    ids, degrees = weights["ids"], np.bincount([user for user, _ in PAIRS] + [NUM_USERS + item for _, item in PAIRS])
    degrees = np.append(degrees, 0)
    adjacency = np.zeros((NUM_USERS + NUM_ITEMS,) * 2)
    for user, item in PAIRS:
        value = 1 / math.sqrt(degrees[user] * degrees[NUM_USERS + item])
        adjacency[user, NUM_USERS + item] = adjacency[NUM_USERS + item, user] = value
    behaviour = sum(np.linalg.matrix_power(adjacency, step) @ ids for step in range(config.lightgcn.num_layers + 1))
    behaviour = behaviour / (config.lightgcn.num_layers + 1)

    def fused(rows: Tensor) -> np.ndarray:
        parts = [rows[:, m].numpy() @ weights["fusion"][WIDTH * m : WIDTH * (m + 1)] for m in range(2)]
        return parts[0] + parts[1] + weights["fusion_bias"]

    items = fused(content.items)
    if config.crane.semantic_items == "ids":
        items = ids[NUM_USERS:] / (1 + np.exp(-items))
    items = np.linalg.matrix_power(item_matrix().astype(np.float64), config.crane.num_item_layers) @ items
    if config.crane.semantic_users == "profiles":
        assert content.users is not None
        users = fused(content.users)
    else:
        users = np.zeros((NUM_USERS, DIM))
        for user, item in PAIRS:
            users[user] += items[item] / math.sqrt(degrees[user] * degrees[NUM_USERS + item])
    semantic = np.concatenate([users, items])
    if config.crane.own_content:
        assert content.users is not None
        rows = np.concatenate([content.users.numpy(), content.items.numpy()])
        semantic = semantic + sum(rows[:, m] @ weights["own"][WIDTH * m : WIDTH * (m + 1)] for m in range(2))
    trusted: np.ndarray | float = 1.0
    if config.crane.semantic_weight == "gate":
        trusted = 1 / (1 + np.exp(-(behaviour @ weights["trust"] + weights["trust_bias"])))
    elif config.crane.semantic_weight == "scale":
        trusted = float(weights["trust"][0])
    return behaviour + trusted * semantic, behaviour, semantic


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(left @ right / math.sqrt((left @ left) * (right @ right)))


def plain_losses(model: Crane, batch: Batch) -> dict[str, float]:
    """The terms of the loss row by row."""
    config, ids = model.config, model.ids.detach().numpy()
    final, behaviour, semantic = plain_views(model)
    ranking = penalty = 0.0
    for row, (user, positive) in enumerate(zip(batch.users.tolist(), batch.positives.tolist(), strict=True)):
        touched = [user, NUM_USERS + positive]
        if config.crane.loss == "bpr":
            negative = NUM_USERS + int(batch.negatives[row])
            touched.append(negative)
            difference = final[user] @ final[NUM_USERS + positive] - final[user] @ final[negative]
            ranking -= math.log(1 / (1 + math.exp(-difference)))
        else:
            assert batch.weights is not None
            own = math.exp(cosine(final[user], final[NUM_USERS + positive]) / config.crane.ranking_temperature)
            others = sum(
                math.exp(cosine(final[user], final[NUM_USERS + item]) / config.crane.ranking_temperature)
                for item in batch.negatives.tolist()
                if (user, item) not in PAIRS
            )
            ranking -= float(batch.weights[row]) * math.log(own / (own + others))
        penalty += config.lightgcn.regularisation / 2 * sum(float(ids[node] @ ids[node]) for node in touched)
    contrast = 0.0
    kinds = [set(batch.users.tolist()), {NUM_USERS + item for item in batch.positives.tolist()}]
    for nodes in kinds if config.crane.contrast_negatives == "same_kind" else [set.union(*kinds)]:
        for node in nodes:
            scores = {
                other: cosine(behaviour[node], semantic[other]) / config.crane.contrast_temperature
                for other in nodes
                if (min(node, other), max(node, other) - NUM_USERS) not in PAIRS
            }
            contrast -= math.log(math.exp(scores[node]) / sum(map(math.exp, scores.values()))) / len(nodes)
    num_rows = len(batch.users)
    return {
        "ranking": ranking / num_rows,
        "regularisation": penalty / num_rows,
        "contrast": config.crane.contrast_weight * contrast,
    }


def test_propagation_by_hand() -> None:
    chain = SymmetricGraph(sp.csr_array(np.array([[0, 0.5, 0], [0.5, 0, 1], [0, 1, 0]], dtype=np.float32)), CPU)
    rows = torch.tensor([[2.0, 0.0], [4.0, 1.0], [6.0, 0.0]])
    # One step: (2, 7, 4) and (0.5, 0, 1); two: (3.5, 5, 7) and (0, 1.25, 0).
    assert torch.equal(propagate(chain, rows, 0), rows)
    assert propagate(chain, rows, 1).tolist() == [[2.0, 0.25], [5.5, 0.5], [5.0, 0.5]]
    expected = torch.tensor([[7.5, 0.5], [16.0, 2.25], [17.0, 1.0]]) / 3
    torch.testing.assert_close(propagate(chain, rows, 2), expected)


def test_gradient_of_propagation() -> None:
    rows = draw(0, NUM_USERS + NUM_ITEMS, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: propagate(graph(), rows, 3), rows)


def test_a_positive_of_one_row_is_a_negative_of_the_others_only() -> None:
    users, items = draw(0, 2, 3), draw(1, 3, 3)
    met = torch.tensor([[True, False, False], [False, True, False]])
    found = sampled_softmax(users, items[:2], items, met, 0.2)
    for row in range(2):
        scores = [cosine(users[row].numpy(), item.numpy()) / 0.2 for item in items]
        assert found[row].item() == pytest.approx(math.log(sum(map(math.exp, scores))) - scores[row])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_views_equal_the_dense_ones(form: dict[str, object]) -> None:
    model = crane(**form)
    views = model(graph())
    assert views.semantic is not None
    for found, expected in zip((views.final, views.behaviour, views.semantic), plain_views(model), strict=True):
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_losses_equal_the_plain_ones(loss: str, form: dict[str, object]) -> None:
    model = crane(loss=loss, **form)
    batch = BATCH if loss == "bpr" else SHARED
    found = {name: value.item() for name, value in model.losses(model(graph()), batch).items()}
    assert found == pytest.approx(plain_losses(model, batch), rel=1e-6)


# User 0 has met the items 0 and 1 too, which are here in rows of others; rows are the distinct users 0, 1, 3, 4.
BOTH_KINDS = SHARED._replace(
    positives=torch.tensor([2, 0, 5, 1, 6]),
    known=torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool),
)


def test_the_contrast_can_take_its_negatives_from_both_kinds() -> None:
    model = crane(contrast_negatives="both_kinds")
    found = {name: value.item() for name, value in model.losses(model(graph()), BOTH_KINDS).items()}
    assert found == pytest.approx(plain_losses(model, BOTH_KINDS), rel=1e-6)
    assert found["contrast"] != pytest.approx(plain_losses(crane(), BOTH_KINDS)["contrast"], rel=1e-3)
    parts = [model.losses(model(graph()), BOTH_KINDS._replace(rank=rank, world_size=3)) for rank in range(3)]
    assert sum(part["contrast"].item() for part in parts) == pytest.approx(found["contrast"], rel=1e-6)


def test_what_a_user_has_met_is_no_negative_of_the_user() -> None:
    # Views at right angles: the nodes 0 and 1 have one negative left each, and node 2 has two.
    angles = torch.eye(3)
    nodes = torch.tensor([2, 0, 1, 1])
    false = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    found = info_nce(angles, angles, nodes, Batch(nodes, nodes, nodes), 0.5, false)
    one, two = (math.log(1 + others * math.exp(-2)) for others in (1, 2))
    assert found.item() == pytest.approx((one + one + two) / 3)


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_gradients_reach_every_parameter(loss: str, form: dict[str, object]) -> None:
    model = crane(loss=loss, **form)
    names, values = zip(*model.named_parameters(), strict=True)
    batch = BATCH if loss == "bpr" else SHARED

    def total(*parameters: Tensor) -> Tensor:
        # `losses` reads the ID embeddings too, so both run under the parameters given.
        return functional_call(_Total(model, batch), {f"model.{n}": p for n, p in zip(names, parameters, strict=True)})

    assert torch.autograd.gradcheck(total, values, fast_mode=True)
    for gradient in torch.autograd.grad(total(*values), values):
        assert gradient.abs().max() > 1e-4


class _Total(torch.nn.Module):
    def __init__(self, model: Crane, batch: Batch) -> None:
        super().__init__()
        self.model, self.batch = model, batch

    def forward(self) -> Tensor:
        return torch.stack(list(self.model.losses(self.model(graph()), self.batch).values())).sum()


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
def test_losses_and_gradients_of_the_ranks_add_up(loss: str) -> None:
    model, batch = crane(loss=loss), BATCH if loss == "bpr" else SHARED
    values, gradients = [], []
    for part in (batch, *(batch._replace(rank=rank, world_size=3) for rank in range(3))):
        losses = model.losses(model(graph()), part)
        values.append(torch.stack(list(losses.values())))
        gradients.append(torch.autograd.grad(values[-1].sum(), list(model.parameters())))
    torch.testing.assert_close(sum(values[1:]), values[0])
    for whole, *parts in zip(*gradients, strict=True):
        torch.testing.assert_close(sum(parts), whole)


def test_a_cold_item_ranks_by_the_mean_length_of_its_warm_neighbours() -> None:
    model = crane()
    final = draw(3, NUM_USERS + NUM_ITEMS, DIM)
    items = final[NUM_USERS:].clone()
    ranked = model.rankings(Views(final, final, None), graph())
    lengths = items.norm(dim=1)
    # Item 7 has the neighbours 6 and 0, by edges of weight 7 and 8.
    lengths[7] = (7 * lengths[6] + 8 * lengths[0]) / 15
    for power, (_, found) in zip(POWERS, ranked.values(), strict=True):
        torch.testing.assert_close(found.norm(dim=1), lengths**power, rtol=1e-5, atol=0)
        torch.testing.assert_close(found / found.norm(dim=1, keepdim=True), items / items.norm(dim=1, keepdim=True))


def test_cold_items_take_the_rows_of_their_warm_neighbours() -> None:
    edges = np.array([[0, 1, 3, 0], [1, 0, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]], dtype=np.float32)
    learned = torch.tensor([[9.0, 9.0], [4.0, 0.0], [0.0, 8.0], [7.0, 7.0]])
    filled = fill_cold(learned, torch.tensor([False, True, True, False]), SymmetricGraph(sp.csr_array(edges), CPU))
    assert filled.tolist() == [[1.0, 6.0], [4.0, 0.0], [0.0, 8.0], [0.0, 0.0]]


def test_cold_neighbours_say_nothing() -> None:
    edges = np.array([[0, 1, 3], [1, 0, 0], [3, 0, 0]], dtype=np.float32)
    learned = torch.tensor([[9.0, 9.0], [4.0, 2.0], [0.0, 8.0]])
    filled = fill_cold(learned, torch.tensor([False, True, False]), SymmetricGraph(sp.csr_array(edges), CPU))
    assert filled.tolist() == [[4.0, 2.0], [4.0, 2.0], [0.0, 0.0]]
