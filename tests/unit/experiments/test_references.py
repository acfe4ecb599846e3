"""FREEDOM and MGCN against dense formulas, finite differences and a planted answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crane_core.dataset.interactions import Interactions
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users
from crane_core.experiments.references import Freedom, FreedomSettings, Mgcn, MgcnSettings, modality_graph
from crane_core.model.lightgcn import LightGCN
from crane_core.model.propagation import DirectedGraph, SymmetricGraph
from crane_core.model.sharding import Shards
from crane_core.model.user_item_graph import Edges, user_item_graph
from crane_core.model.views import Batch
from crane_core.training.trainer import Trainer
from tests.worlds.planted import checkerboard, planted_modalities
from tests.worlds.settings import changed, model_config

CPU = torch.device("cpu")
TRAIN = model_config(embedding_dim=6, batch_size=64, num_epochs=3)
FREEDOM = FreedomSettings(k=4, modality_weights=(0.3, 0.7), feature_weight=0.5, learning_rate=0.02)
MGCN = MgcnSettings(k=4, contrast_weight=0.3, regularisation=0.05, learning_rate=0.02)
BATCH = Batch(torch.tensor([0, 7, 7, 31]), torch.tensor([2, 9, 10, 27]), torch.tensor([20, 1, 30, 3]))


def build(
    kind: type[Freedom] | type[Mgcn], seed: int = 0, settings: FreedomSettings | MgcnSettings | None = None
) -> Freedom | Mgcn:
    interactions, features = checkerboard(), [modality.items for modality in planted_modalities(noise=0.5)]
    settings = settings or (FREEDOM if kind is Freedom else MGCN)
    config = settings.applied(changed(TRAIN, seed=seed))
    return kind(interactions.num_users, interactions.num_items, features, config, settings)  # type: ignore[arg-type]


def adjacency(interactions: Interactions) -> SymmetricGraph:
    log = interactions.train
    shards = Shards((interactions.num_users, interactions.num_items))
    return SymmetricGraph(user_item_graph(Edges(log.users(), log.items), shards), CPU)


def dense_graph(rows: np.ndarray, k: int, weighted: bool) -> Tensor:
    """The kNN graph from the full similarity matrix, an item its own first neighbour."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, 1.0)
    graph = np.zeros_like(similarity)
    for item in range(len(rows)):
        for other in sorted(range(len(rows)), key=lambda other: (other != item, -similarity[item, other]))[:k]:
            if similarity[item, other] > 0:
                graph[item, other] = similarity[item, other] if weighted else 1.0
    degrees = graph.sum(1)
    return torch.from_numpy(graph / np.sqrt(degrees[:, None] * degrees[None, :])).double()


def test_the_item_graph_by_hand() -> None:
    # Cosines: 0.8 between items 0 and 1, 0.6 between 1 and 2, 0 between 0 and 2; item 3 has no features.
    rows = np.array([[1, 0], [0.8, 0.6], [0, 2], [0, 0]], dtype=np.float32)
    plain = modality_graph(rows, 2, weighted=False).toarray()
    assert plain == pytest.approx(np.array([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1]]))
    degrees = np.array([1.8, 1.8, 1.6, 1])
    edges = np.array([[1, 0.8, 0, 0], [0.8, 1, 0, 0], [0, 0.6, 1, 0], [0, 0, 0, 1]])
    weighted = modality_graph(rows, 2, weighted=True).toarray()
    assert weighted == pytest.approx(edges / np.sqrt(np.outer(degrees, degrees)))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_item_graph_equals_the_dense_one(weighted: bool) -> None:
    rows = planted_modalities()[1].items
    found = modality_graph(rows, 5, weighted).toarray()
    assert found == pytest.approx(dense_graph(rows, 5, weighted).numpy(), abs=1e-6)


def test_the_gradient_of_a_directed_graph_is_its_transpose() -> None:
    matrix = modality_graph(planted_modalities()[0].items, 5, weighted=True)
    rows = torch.randn(matrix.shape[0], 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.randn(matrix.shape[0], 3, generator=torch.Generator().manual_seed(1))
    ((DirectedGraph(matrix, CPU) @ rows) * weights).sum().backward()
    torch.testing.assert_close(rows.grad, torch.from_numpy(matrix.toarray()).T @ weights)


def sigmoid_bpr(users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    total = users.new_zeros(())
    for user, positive, negative in zip(users, positives, negatives, strict=True):
        total = total - torch.log(torch.sigmoid(user @ positive - user @ negative))
    return total / len(users)


def plain_freedom(model: Freedom, interactions: Interactions) -> tuple[Tensor, dict[str, Tensor]]:
    graph = torch.from_numpy(adjacency(interactions).matrix.toarray()).double()
    num_users, ids = interactions.num_users, model.ids
    light = (ids + graph @ ids + graph @ graph @ ids) / 3
    items = sum(
        weight * dense_graph(modality.items, 4, weighted=False)
        for weight, modality in zip((0.3, 0.7), planted_modalities(noise=0.5), strict=True)
    )
    final = torch.cat([light[:num_users], light[num_users:] + items @ ids[num_users:]])
    users = final[BATCH.users]
    features = sum(
        sigmoid_bpr(
            users,
            rows[BATCH.positives] @ layer.weight.T,
            rows[BATCH.negatives] @ layer.weight.T,
        )
        for rows, layer in zip(model.features, model.projections, strict=True)
    )
    ranking = sigmoid_bpr(users, final[num_users + BATCH.positives], final[num_users + BATCH.negatives])
    return final, {"ranking": ranking, "regularisation": ranking.new_zeros(()), "features": 0.5 * features}


def plain_mgcn(model: Mgcn, interactions: Interactions) -> tuple[Tensor, dict[str, Tensor]]:
    graph = torch.from_numpy(adjacency(interactions).matrix.toarray()).double()
    num_users, ids = interactions.num_users, model.ids
    e = (ids + graph @ ids + graph @ graph @ ids) / 3
    views = []
    for m, modality in enumerate(planted_modalities(noise=0.5)):
        transformed = model.features[m] @ model.projections[m].weight.T + model.projections[m].bias
        gate = torch.sigmoid(transformed @ model.purifiers[m].weight.T + model.purifiers[m].bias)
        items = dense_graph(modality.items, 4, weighted=True) @ (ids[num_users:] * gate)
        views.append(torch.cat([graph[:num_users, num_users:] @ items, items]))
    scores = [
        torch.tanh(view @ model.attention.weight.T + model.attention.bias) @ model.query.weight[0] for view in views
    ]
    total = sum(torch.exp(score) for score in scores)
    shared = sum((torch.exp(score) / total)[:, None] * view for score, view in zip(scores, views, strict=True))
    h = shared / 3
    for view, layer in zip(views, model.preferences, strict=True):
        h = h + (view - shared) * torch.sigmoid(e @ layer.weight.T + layer.bias) / 3
    final = e + h
    contrast = final.new_zeros(())
    for nodes in ({0, 7, 31}, {num_users + item for item in (2, 9, 10, 27)}):
        for node in nodes:
            cosines = {other: F.cosine_similarity(h[node], e[other], dim=0) / 0.2 for other in nodes}
            contrast = contrast - (cosines[node] - torch.logsumexp(torch.stack(list(cosines.values())), 0)) / len(nodes)
    picked = [final[BATCH.users], final[num_users + BATCH.positives], final[num_users + BATCH.negatives]]
    squares = sum((rows**2).sum() for rows in picked) / 4
    return final, {
        "ranking": sigmoid_bpr(*picked),
        "regularisation": 0.05 / 2 * squares,
        "contrast": 0.3 * contrast,
    }


@pytest.mark.parametrize(("kind", "plain"), [(Freedom, plain_freedom), (Mgcn, plain_mgcn)])
def test_rows_losses_and_gradients_equal_the_dense_formulas(kind: type, plain: object) -> None:
    model, interactions = build(kind).double(), checkerboard()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)).double()
    views = model(adjacency(interactions))
    losses = model.losses(views, BATCH)
    final, expected = plain(model, interactions)  # type: ignore[operator]
    torch.testing.assert_close(views.final, final, rtol=1e-5, atol=1e-6)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name
    parameters = list(model.parameters())
    ours = torch.autograd.grad(sum(losses.values()), parameters)  # type: ignore[arg-type]
    theirs = torch.autograd.grad(sum(expected.values()), parameters)  # type: ignore[arg-type]
    for found, wanted in zip(ours, theirs, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [Freedom, Mgcn])
def test_gradients_equal_finite_differences(kind: type) -> None:
    model, graph = build(kind).double(), adjacency(checkerboard())
    generator = torch.Generator().manual_seed(2)

    def loss() -> Tensor:
        return torch.stack(list(model.losses(model(graph), BATCH).values())).sum()

    gradients = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss(), model.parameters()), strict=True))
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator).double()
        values = []
        for step in (1e-5, -2e-5):
            parameter.data += step * direction
            values.append(loss().item())
        parameter.data += 1e-5 * direction
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx((gradients[name] * direction).sum().item(), rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize("kind", [Freedom, Mgcn])
def test_the_losses_of_the_ranks_add_up(kind: type) -> None:
    model, graph = build(kind), adjacency(checkerboard())
    views = model(graph)
    whole = model.losses(views, BATCH)
    parts = [model.losses(views, BATCH._replace(rank=rank, world_size=3)) for rank in range(3)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)


def train(model: LightGCN, work: Path, **changes: object) -> Trainer:
    work.mkdir()
    trainer = Trainer(model, checkerboard(), changed(model.config, **changes), work, CPU)
    trainer.run()
    return trainer


@pytest.mark.parametrize("kind", [Freedom, Mgcn])
def test_same_seed_same_bits_other_seed_other_bits(kind: type, tmp_path: Path) -> None:
    first, second, other = (
        train(build(kind, seed), tmp_path / name).best_weights() for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == set(first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"), [(Freedom, FreedomSettings(learning_rate=0.02)), (Mgcn, MgcnSettings(learning_rate=0.02))]
)
def test_the_planted_answer_is_found(kind: type, settings: FreedomSettings | MgcnSettings, tmp_path: Path) -> None:
    interactions = checkerboard()
    trainer = train(build(kind, settings=settings), tmp_path / "work", num_epochs=20)
    users = np.arange(interactions.num_users)
    ranked = rank_users(dot_product(*trainer.rankings()["dot"]), interactions.train, users, 2)
    assert user_metrics(ranked, interactions.test, users, (2,))["recall@2"].mean() == 1.0


def test_settings_reach_the_trainer() -> None:
    freedom, mgcn = build(Freedom), build(Mgcn)
    assert freedom.edge_dropout == 0.8 and mgcn.edge_dropout == 0
    assert freedom.config.train.learning_rate == mgcn.config.train.learning_rate == 0.02
    assert (freedom.config.lightgcn.regularisation, mgcn.config.lightgcn.regularisation) == (0, 0.05)


def test_without_weights_every_modality_counts_the_same() -> None:
    graphs = [
        build(Freedom, settings=FreedomSettings(k=4, modality_weights=weights)).item_graph.onward.matrix.toarray()  # type: ignore[union-attr]
        for weights in ((), (0.5, 0.5), (0.3, 0.7))
    ]
    assert np.array_equal(graphs[0], graphs[1]) and not np.array_equal(graphs[0], graphs[2])
