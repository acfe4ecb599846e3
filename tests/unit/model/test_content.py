"""Content that learns with the model: a step by hand, the staged training as its special case, kills, ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crane_core.config import Knn, Refine
from crane_core.dataset.modalities import Modality
from crane_core.graph.exact import brute_force
from crane_core.model import content as content_module
from crane_core.model.content import Content, JointContent, joint_content, neighbour_graph
from crane_core.model.crane import Crane
from crane_core.model.views import Batch
from crane_core.model_config import ModelConfig
from crane_core.refine.catalog import refine_catalog
from crane_core.refine.fit import fit
from crane_core.refine.refiner import Refiner
from crane_core.training.trainer import Trainer
from tests.worlds.planted import checkerboard, halves, planted_modalities
from tests.worlds.processes import on_ranks
from tests.worlds.settings import changed, model_config

CPU = torch.device("cpu")
REFINE = Refine(embedding_dim=8, num_steps=5, batch_size=64, num_recursions=2)
KNN = Knn(k=4)
TRAIN = model_config(embedding_dim=8, batch_size=64, num_epochs=4, learning_rate=0.02, mode="joint", num_negatives=32)
FORMS = [{}, {"semantic_users": "profiles"}, {"semantic_items": "content", "semantic_users": "profiles", "loss": "bpr"}]


def start(modalities: list[Modality], train: ModelConfig = TRAIN, refine: Refine = REFINE) -> JointContent:
    return joint_content(modalities, {}, refine, KNN, changed(train, joint_start="scratch").crane, CPU)


def fitted(modalities: list[Modality]) -> Refiner:
    return fit(modalities, checkerboard().train, "sum", REFINE)[0]


def trainer(work: Path, content: Content | JointContent, config: ModelConfig = TRAIN) -> Trainer:
    work.mkdir(exist_ok=True)
    interactions = checkerboard()
    model = Crane(interactions.num_users, interactions.num_items, content, config)
    return Trainer(model, interactions, config, work, CPU)


def batch(ours: Trainer) -> Batch:
    return ours.batches.batch(np.arange(0, 60, 3), np.random.default_rng(0))


def gradients(ours: Trainer) -> dict[str, Tensor | None]:
    drawn = batch(ours)
    torch.stack(list(ours.model.losses(ours.model(ours.graph), drawn).values())).sum().backward()
    return {name: parameter.grad for name, parameter in ours.model.named_parameters()}


def test_features_in_half_precision_are_used_in_full(tmp_path: Path) -> None:
    half, full = (start(halves(planted_modalities(), dtype)) for dtype in ("float16", "float32"))
    assert torch.equal(half.rows()[0], full.rows()[0]) and torch.equal(half.neighbours, full.neighbours)
    found = [gradients(trainer(tmp_path, content)) for content in (half, full)]
    weights = [each["content.refiner.weights.1"] for each in found]
    assert weights[0] is not None and weights[1] is not None and torch.equal(*weights)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_gradients_reach_every_weight_that_takes_part(num_modalities: int, form: dict, tmp_path: Path) -> None:
    two = planted_modalities()
    modalities = [*two, *two[1:]][:num_modalities]
    config = changed(TRAIN, **form)
    found = gradients(trainer(tmp_path, start(modalities, config), config))
    assert found.pop("content.refiner.fusion") is None, "it decides the graph alone"
    missing = found.pop("content.refiner.missing")
    reached = {name for name, gradient in found.items() if gradient is not None and gradient.abs().max() > 0}
    assert reached == set(found)
    # No item lacks the first modality.
    assert missing is not None and (missing.abs().amax(1) > 0).tolist() == [False, True, True][:num_modalities]


def reference_loss(weights: dict[str, Tensor], ours: Trainer, drawn: Batch, phi: str) -> Tensor:
    """The loss of the paper's form, dense and in float64, every matrix written out."""
    interactions, config = ours.interactions, ours.config
    modalities, scales = planted_modalities(), weights["content.refiner.profile_scales"].tolist()
    dim, num_users, num_items = 8, interactions.num_users, interactions.num_items

    def project(m: int, rows: np.ndarray, present: np.ndarray) -> Tensor:
        found = torch.from_numpy(rows).double() @ weights[f"content.refiner.weights.{m}"]
        found = found + weights["content.refiner.biases"][m]
        mask = torch.from_numpy(present).double()[:, None]
        return mask * found + (1 - mask) * weights["content.refiner.missing"][m]

    items = [project(m, each.items, each.present) for m, each in enumerate(modalities)]
    users = [project(m, each.profiles / scales[m], each.counts > 0) for m, each in enumerate(modalities)]
    for r in range(REFINE.num_recursions):
        own = {name: weights[f"content.refiner.rca.recursions.{r}.{name}"] for name in RECURSION}
        joint = torch.cat(items, dim=1) @ own["joint"] + own["joint_bias"]

        def refine(rows: Tensor, m: int, own: dict[str, Tensor], joint: Tensor) -> Tensor:
            scores = rows @ own["correlation"][m] @ joint.T / dim**0.5
            kept = {"linear": scores / num_items, "tanh": torch.tanh(scores) / num_items}.get(phi, scores.softmax(1))
            return rows + torch.relu(kept @ joint @ own["hidden"][m])

        users = [refine(rows, m, own, joint) for m, rows in enumerate(users)]
        items = [refine(rows, m, own, joint) for m, rows in enumerate(items)]
    fused = [
        torch.cat([rows / rows.norm(dim=1, keepdim=True) for rows in side], dim=1) @ weights["fusion"]
        + weights["fusion_bias"]
        for side in (users, items)
    ]
    near = torch.zeros(num_items, num_items, dtype=torch.float64)
    neighbours = weights["content.neighbours"].long()
    near[torch.arange(num_items).repeat_interleave(neighbours.shape[1]), neighbours.flatten()] = 1
    met = torch.zeros(num_users, num_items, dtype=torch.float64)
    met[torch.from_numpy(interactions.train.users()).long(), torch.from_numpy(interactions.train.items).long()] = 1
    around = torch.zeros(num_users + num_items, num_users + num_items, dtype=torch.float64)
    around[:num_users, num_users:], around[num_users:, :num_users] = met, met.T
    h = torch.cat([fused[0], symmetric(torch.maximum(near, near.T)) @ fused[1]])
    ids, step = weights["ids"], symmetric(around)
    e = (ids + step @ ids + step @ step @ ids) / 3
    z = e + h
    users_, items_, others = drawn.users, drawn.positives + num_users, drawn.negatives + num_users
    ranking = -torch.log(torch.sigmoid((z[users_] * (z[items_] - z[others])).sum(1))).mean()
    penalty = config.lightgcn.regularisation / 2 * sum((ids[nodes] ** 2).sum() for nodes in (users_, items_, others))
    contrast = torch.zeros((), dtype=torch.float64)
    for nodes in (users_, items_):
        distinct = sorted(set(nodes.tolist()))
        cosines = torch.cosine_similarity(e[distinct][:, None], h[distinct][None], dim=2)
        cosines = cosines / config.crane.contrast_temperature
        contrast = contrast - torch.diagonal(cosines.log_softmax(1)).mean()
    return ranking + penalty / len(users_) + config.crane.contrast_weight * contrast


RECURSION = ("joint", "joint_bias", "correlation", "hidden")


def symmetric(adjacency: Tensor) -> Tensor:
    degrees = adjacency.sum(1)
    inverse = torch.where(degrees > 0, degrees, 1) ** -0.5
    return inverse[:, None] * adjacency * inverse


@pytest.mark.parametrize("phi", ["linear", "softmax", "tanh"])
def test_one_step_equals_the_step_by_hand(phi: str, tmp_path: Path) -> None:
    config = changed(TRAIN, **(FORMS[-1] | {"own_content": False, "semantic_weight": "none", "contrast_weight": 0.1}))
    refine = REFINE.model_copy(update={"phi": phi})
    ours = trainer(tmp_path, start(planted_modalities(), config, refine), config)
    before = {name: value.detach().clone() for name, value in ours.model.state_dict().items()}
    drawn = batch(ours)
    ours.step(ours.graph, [drawn], len(drawn.users))
    weights = {name: value.double().requires_grad_(name != "content.neighbours") for name, value in before.items()}
    loss = reference_loss(weights, ours, drawn, phi)
    loss.backward()
    assert sum(ours.progress.sums.values()) == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in ours.model.named_parameters():
        expected = weights[name].grad
        if name == "content.refiner.fusion":
            assert torch.equal(parameter, before[name])
            continue
        assert expected is not None and parameter.grad is not None, name
        largest = float(expected.abs().max())
        torch.testing.assert_close(
            parameter.grad.double(), expected, rtol=1e-3, atol=1e-4 * largest + 1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
        # Adam's first step: every entry moves by the learning rate against the sign of its gradient.
        clear = expected.abs() > 1e-2 * largest + 1e-6
        moved = (parameter.detach() - before[name]).double()[clear]
        torch.testing.assert_close(moved, -config.train.learning_rate * expected[clear].sign(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_with_frozen_weights_joint_is_staged_bit_for_bit(form: dict, tmp_path: Path) -> None:
    modalities = planted_modalities()
    refiner = fitted(modalities)
    items, users, _ = refine_catalog(refiner, modalities, REFINE.chunk_size)
    fused = refiner.fuse(items).detach().numpy()
    graph = neighbour_graph(torch.from_numpy(brute_force(fused, np.arange(len(fused)), KNN.k)))
    frozen = Content(torch.nn.functional.normalize(items, dim=2), graph, torch.nn.functional.normalize(users, dim=2))
    ended = []
    config = changed(TRAIN, **form)
    for name, learns in (("staged", None), ("still", False), ("joint", True)):
        content: Content | JointContent = frozen
        if learns is not None:
            content = joint_content(modalities, refiner.state_dict(), REFINE, KNN, config.crane, CPU)
            for parameter in content.refiner.parameters():
                parameter.requires_grad_(learns)
        ours = trainer(tmp_path / name, content, config)
        ours.run()
        ended.append((ours.progress.curve, *ours.best_rows()))
    staged, still, joint = ended
    assert still[0] == staged[0] != joint[0]
    assert torch.equal(still[1], staged[1]) and torch.equal(still[2], staged[2])


def finish(work: Path) -> tuple[dict, list, dict[str, Tensor]]:
    config = changed(TRAIN, checkpoint_steps=2)
    ours = trainer(work, start(planted_modalities(), config), config)
    result = ours.run()
    result.pop("seconds")
    return result, ours.progress.curve, dict(ours.model.state_dict())


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("moment", [3, 5, 7, 8])
def test_a_training_killed_at_any_moment_ends_with_the_same_bits(
    tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = finish(tmp_path / "undisturbed")
    assert not torch.equal(expected[2]["content.neighbours"], start(planted_modalities()).neighbours), "it moves"
    step, taken = Trainer.step, 0

    def dying_step(self: Trainer, *arguments: object) -> None:
        nonlocal taken
        taken += 1
        if taken == moment:
            raise Killed
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dying_step)
        with pytest.raises(Killed):
            finish(tmp_path / "killed")
    found = finish(tmp_path / "killed")
    assert found[:2] == expected[:2]
    assert set(found[2]) == set(expected[2])
    for name, value in expected[2].items():
        assert torch.equal(found[2][name], value), name


def test_the_graph_is_that_of_the_rows_and_moves_when_it_is_due(tmp_path: Path) -> None:
    modalities = planted_modalities()
    content = start(modalities, changed(TRAIN, graph_epochs=2))

    def expected() -> Tensor:
        items, _, _ = refine_catalog(content.refiner, modalities, REFINE.chunk_size)
        with torch.no_grad():
            fused = content.refiner.fuse(items).numpy()
        return torch.from_numpy(brute_force(fused, np.arange(len(fused)), KNN.k))

    first = expected()
    assert torch.equal(content.neighbours, first)
    for parameter in content.refiner.weights:
        torch.nn.init.normal_(parameter)
    second = expected()
    assert not torch.equal(second, first)
    for epoch, due in ((0, first), (1, first), (2, second), (3, second)):
        content.start_epoch(epoch)
        assert torch.equal(content.neighbours, due), epoch
        assert np.array_equal(content.graph.matrix.toarray(), neighbour_graph(due).matrix.toarray()), epoch


def test_the_best_rows_rank_with_the_graph_of_their_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trainer(tmp_path, start(planted_modalities()), TRAIN)
    graphs = []
    best = ours.validation.best

    def falling(rankings: dict) -> tuple[str, dict[str, float]]:
        ranking, metrics = best(rankings)
        graphs.append(ours.model.content.neighbours.clone())
        return ranking, metrics | {"recall@20": 1.0 if len(graphs) == 2 else 0.1}

    monkeypatch.setattr(ours.validation, "best", falling)
    assert ours.run()["best_epoch"] == 1
    assert not torch.equal(graphs[1], graphs[-1])
    ours.best_rows()
    assert np.array_equal(ours.model.content.graph.matrix.toarray(), neighbour_graph(graphs[1]).matrix.toarray())


RANKED = changed(TRAIN, num_epochs=3, batch_size=61, semantic_users="profiles")


def _rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    if rank:
        content_module.search = None  # type: ignore[assignment]  # one rank searches for all
    ours = trainer(Path(folder) / "ranks", start(planted_modalities(), RANKED), RANKED)
    ours.run()
    torch.save((ours.progress.curve, ours.model.content.neighbours), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree_with_one_process(tmp_path: Path) -> None:
    alone = trainer(tmp_path / "alone", start(planted_modalities(), RANKED), RANKED)
    alone.run()
    on_ranks(_rank, 2, 2, str(tmp_path))
    (curve, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    # Until the graph of the second epoch: of nearly equal neighbours a later graph may take the other one.
    for one, two in zip(alone.progress.curve[:2], curve[:2], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert len(curve) == 3
    assert torch.equal(first, second)
