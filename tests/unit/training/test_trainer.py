"""Training: one step by hand, a planted answer found, kills survived, ranks that agree."""

from __future__ import annotations

import dataclasses
import logging
import math
import multiprocessing
import random
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch._dynamo  # Adam imports it at its first use: here, before the processes that are killed are forked.
from torch import Tensor

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.errors import ArtifactError, DataError, TrainingError, TrainingStopped
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users
from crane_core.graph.exact import search
from crane_core.graph.item_graph import build_graph
from crane_core.model.content import Content
from crane_core.model.crane import Crane
from crane_core.model.lightgcn import LightGCN
from crane_core.model.propagation import SymmetricGraph, drop_edges
from crane_core.model.user_item_graph import user_item_graph
from crane_core.model.views import Batch, Rows
from crane_core.model_config import ModelConfig
from crane_core.training.batches import user_weights
from crane_core.training.negatives import NegativeSampler
from crane_core.training.trainer import Trainer
from crane_core.training.validation import STEERING_METRIC
from tests.worlds.planted import checkerboard, checkerboard_content
from tests.worlds.processes import PRELOADED, on_ranks
from tests.worlds.settings import changed, model_config

CPU = torch.device("cpu")
SMALL = model_config(
    embedding_dim=8, batch_size=64, num_epochs=12, learning_rate=0.02, regularisation=1e-4, num_negatives=12
)
Kind = Literal["lightgcn", "crane"]
KINDS: tuple[Kind, ...] = ("lightgcn", "crane")
both_kinds = pytest.mark.parametrize("kind", KINDS)


def trainer(
    work: Path, interactions: Interactions | None = None, config: ModelConfig = SMALL, kind: Kind = "lightgcn"
) -> Trainer:
    """LightGCN with a negative per row, or CRANE with shared ones, on the checkerboard if on nothing else."""
    work.mkdir(exist_ok=True)
    interactions = interactions or checkerboard()
    sizes = interactions.num_users, interactions.num_items
    model = LightGCN(*sizes, config) if kind == "lightgcn" else Crane(*sizes, checkerboard_content(), config)
    return Trainer(model, interactions, config, work, CPU)


def test_one_step_equals_the_step_by_hand(tmp_path: Path) -> None:
    interactions, config = checkerboard(), SMALL
    ours = trainer(tmp_path, interactions, config)
    before = ours.model.ids.detach().clone()
    picked, negatives = np.array([0, 5, 9]), np.array([31, 20, 11])
    rows = (ours.batches.users[picked], ours.batches.items[picked], negatives)
    ours.step(ours.graph, [Batch(*(torch.from_numpy(row.astype(np.int64)) for row in rows))], 3)

    adjacency = torch.from_numpy(
        user_item_graph(interactions.train.users(), interactions.train.items, ours.shards).toarray()
    )
    ids = before.clone().requires_grad_()
    final = (ids + adjacency @ ids + adjacency @ (adjacency @ ids)) / 3
    loss = torch.zeros(())
    for row, negative in zip(picked, negatives, strict=True):
        user = int(interactions.train.users()[row])
        positive = interactions.num_users + int(interactions.train.items[row])
        other = interactions.num_users + int(negative)
        difference = (final[user] * final[positive]).sum() - (final[user] * final[other]).sum()
        squares = (ids[user] ** 2).sum() + (ids[positive] ** 2).sum() + (ids[other] ** 2).sum()
        loss = loss - torch.log(torch.sigmoid(difference)) / 3 + config.lightgcn.regularisation / 2 * squares / 3
    loss.backward()
    assert sum(ours.progress.sums.values()) == pytest.approx(loss.item(), rel=1e-5)
    # Adam's first step: every entry moves by the learning rate against the sign of its gradient.
    expected = before - config.train.learning_rate * ids.grad / (ids.grad.abs() + 1e-8)
    torch.testing.assert_close(ours.model.ids.detach(), expected, rtol=1e-4, atol=1e-6)


def test_one_softmax_step_equals_the_step_by_hand(tmp_path: Path) -> None:
    interactions = checkerboard()
    ours = trainer(tmp_path, interactions, kind="crane")
    picked = np.arange(0, len(ours.batches.users), 9)
    batch = ours.batches.batch(picked, np.random.default_rng(4))
    with torch.no_grad():
        final = ours.model(ours.graph).final.double().numpy()
    final /= np.linalg.norm(final, axis=1, keepdims=True)
    train, expected, crossed = interactions.train, 0.0, 0
    for row in picked:
        user, positive = int(train.users()[row]), int(train.items[row])
        items = [item for item in batch.negatives.tolist() if item not in train.rows(np.array([user]))[1]]
        crossed += sum(item in train.items[picked] for item in items)
        scores = [final[user] @ final[40 + item] / ours.config.crane.ranking_temperature for item in [positive, *items]]
        # Every user has met six items, so all weights are 1.
        expected += (math.log(sum(map(math.exp, scores))) - scores[0]) / len(picked)
    assert crossed > 0, "no positive was a negative of another row"
    ours.step(ours.graph, [batch], len(batch.users))
    assert ours.progress.sums["ranking"] == pytest.approx(expected, rel=1e-5)


@both_kinds
def test_batches_that_share_a_step_are_one_loss(tmp_path: Path, kind: Kind) -> None:
    """The gradient of a step is that of the mean loss over its rows, whose batches draw their own negatives."""
    config = changed(SMALL, batch_size=50, batches_per_step=3, learning_rate=0.01)
    ours, plain = trainer(tmp_path, config=config, kind=kind), trainer(tmp_path, config=config, kind=kind)
    picked = np.arange(120)
    ours.step(ours.graph, ours.batches.of_step(picked, 0, 0), 120)
    batches = list(plain.batches.of_step(picked, 0, 0))
    assert [len(batch.users) for batch in batches] == [50, 50, 20]
    losses = [sum(plain.model.losses(plain.model(plain.graph), batch).values()) for batch in batches]
    loss = torch.stack([value * share for value, share in zip(losses, (5 / 12, 5 / 12, 1 / 6), strict=True)]).sum()
    loss.backward()
    assert sum(ours.progress.sums.values()) == pytest.approx(loss.item(), rel=1e-5)
    for found, expected in zip(ours.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-7)
    assert ours.optimiser.param_groups[0]["lr"] == pytest.approx(0.01 * 3**0.5)


@pytest.mark.slow
@both_kinds
def test_the_planted_answer_is_found(tmp_path: Path, kind: Kind) -> None:
    interactions = checkerboard()
    ours = trainer(tmp_path, interactions, changed(SMALL, num_epochs=40, patience=40), kind)
    ours.run()
    users = np.arange(interactions.num_users)
    for rows in ours.rankings().values():
        ranked = rank_users(dot_product(*rows), interactions.train, users, 2)
        assert user_metrics(ranked, interactions.test, users, (2,))["recall@2"].mean() == 1.0


@pytest.mark.parametrize("patience", [1, 3])
def test_as_many_epochs_as_patience_follow_the_best(
    patience: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recalls = [0.1, 0.3, *[0.3] * 8]
    ours = trainer(tmp_path, config=changed(SMALL, num_epochs=10, patience=patience))
    monkeypatch.setattr(
        ours.validation, "best", lambda rankings: ("cosine", {STEERING_METRIC: recalls[ours.progress.epoch]})
    )
    result = ours.run()
    assert (result["best_epoch"], result["num_epochs"]) == (1, 2 + patience)


def finish(work: Path, kind: Kind, seed: int = 0) -> tuple[dict, list, dict[str, Tensor]]:
    """The summary, the curve, and the best weights and rows."""
    ours = trainer(work, config=changed(SMALL, checkpoint_steps=2, seed=seed), kind=kind)
    result = ours.run()
    result.pop("seconds")
    users, items = ours.best_rows()
    return result, ours.progress.curve, ours.best_weights() | {"rows.users": users, "rows.items": items}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@both_kinds
def test_the_test_split_decides_nothing(tmp_path: Path, kind: Kind) -> None:
    interactions = checkerboard()
    # Another user's items: were they looked for, nothing would be found.
    test = dataclasses.replace(interactions.test, items=(interactions.test.items + 16) % 32)
    other = dataclasses.replace(interactions, test=test)
    config = changed(SMALL, num_epochs=3)
    curves = []
    for name, each in (("one", interactions), ("other", other)):
        ours = trainer(tmp_path / name, each, config, kind)
        ours.run()
        curves.append(ours.progress.curve)
    assert curves[0] == curves[1]


class Killed(Exception):
    pass


@pytest.mark.slow
@both_kinds
@pytest.mark.parametrize("moment", [1, 5, 8])
def test_a_training_killed_at_any_moment_ends_with_the_same_bits(
    tmp_path: Path, moment: int, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = finish(tmp_path / "undisturbed", kind)
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
            finish(tmp_path / "killed", kind)
    found = finish(tmp_path / "killed", kind)
    assert found[:2] == expected[:2]
    assert equal(found[2], expected[2])


LONG = changed(SMALL, num_epochs=30, patience=30, checkpoint_steps=1)


def _train_long(work: Path) -> None:
    torch.set_num_threads(1)
    trainer(work, config=LONG).run()


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path: Path) -> None:
    ours = trainer(tmp_path / "undisturbed", config=LONG)
    expected = ours.run(), ours.progress.curve, ours.best_weights()
    # Processes that start with torch imported, in which no gradient has run yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    work, moments, steps = tmp_path / "killed", random.Random(0), []
    work.mkdir()
    for _ in range(20):
        before = (work / "checkpoint.json").stat().st_ino if steps else None
        process = context.Process(target=_train_long, args=(work,))
        process.start()
        while not (work / "checkpoint.json").exists() or (work / "checkpoint.json").stat().st_ino == before:
            assert process.is_alive(), "the training ended before it was killed twenty times"
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        resumed = trainer(work, config=LONG)
        resumed.resume()
        steps.append((resumed.progress.epoch, resumed.progress.step))
    assert steps == sorted(set(steps)) and steps[-1][0] < 30
    resumed = trainer(work, config=LONG)
    found = resumed.run(), resumed.progress.curve, resumed.best_weights()
    assert found[0] | {"seconds": 0} == expected[0] | {"seconds": 0}
    assert found[1] == expected[1]
    assert equal(found[2], expected[2])


@both_kinds
def test_a_training_asked_to_stop_leaves_the_step_it_finished(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = finish(tmp_path / "undisturbed", kind)
    step, taken = Trainer.step, 0

    def step_and_ask(self: Trainer, *arguments: object) -> None:
        nonlocal taken
        taken += 1
        if taken == 7:
            self.hooks.stopping.set()
        step(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_and_ask)
        with pytest.raises(TrainingStopped, match=r"after step 3 of 4 in epoch 1.*same command again"):
            finish(tmp_path / "stopped", kind)
    assert taken == 7
    ours = trainer(tmp_path / "stopped", kind=kind)
    ours.resume()
    assert (ours.progress.epoch, ours.progress.step) == (1, 3)
    found = finish(tmp_path / "stopped", kind)
    assert found[:2] == expected[:2]
    assert equal(found[2], expected[2])


@both_kinds
def test_a_training_killed_while_its_best_weights_are_written_ends_with_the_same_bits(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = finish(tmp_path / "undisturbed", kind)
    write = Trainer.write_best

    def dying_write(self: Trainer) -> None:
        write(self)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "write_best", dying_write)
        with pytest.raises(Killed):
            finish(tmp_path / "killed", kind)
    found = finish(tmp_path / "killed", kind)
    assert found[:2] == expected[:2]
    assert equal(found[2], expected[2])


@both_kinds
def test_a_finished_training_is_read_back(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = finish(tmp_path, kind)
    monkeypatch.setattr(Trainer, "step", None)
    found = finish(tmp_path, kind)
    assert found[:2] == expected[:2]
    assert equal(found[2], expected[2])


def test_the_ranking_that_validation_prefers_is_the_one_of_the_best_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rankings = Crane.rankings

    def with_a_bad_one_first(self: Crane, *arguments: object) -> dict[str, Rows]:
        users, items = rankings(self, *arguments)["length^0.5"]  # type: ignore[arg-type]
        return {"worst": (users, -items), "right": (users, items), "bad": (users, -items)}

    monkeypatch.setattr(Crane, "rankings", with_a_bad_one_first)
    for _ in range(2):  # Trained, and read back.
        ours = trainer(tmp_path, kind="crane")
        result = ours.run()
        rows = ours.best_rows()
        assert result["best_ranking"] == "right"
        assert result["best_epoch"] < result["num_epochs"] - 1, "the last weights are the best"
        fresh = trainer(tmp_path / "fresh", kind="crane")
        fresh.model.load_state_dict(ours.best_weights())
        assert all(map(torch.equal, rows, fresh.rankings()["right"]))
        held_out, users = ours.interactions.validation, np.arange(40)
        ranked = rank_users(dot_product(*rows), ours.interactions.train, users, 20)
        recall = user_metrics(ranked, held_out, users, (20,))["recall@20"].mean()
        assert (
            recall
            == pytest.approx(result["validation"]["recall@20"])
            == max(entry["recall@20"] for entry in ours.progress.curve)
        )


@both_kinds
def test_every_step_draws_negatives_of_its_own(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(
        Trainer, "step", lambda self, graph, batches, _: drawn.extend(each.negatives.tolist() for each in batches)
    )
    ours = trainer(tmp_path, config=changed(SMALL, num_epochs=3, batch_size=60), kind=kind)
    ours.run()
    assert len(drawn) == 12
    assert len(set(map(tuple, drawn))) == 12


@both_kinds
def test_same_seed_same_bits_other_seed_other_bits(tmp_path: Path, kind: Kind) -> None:
    first, second = finish(tmp_path / "a", kind), finish(tmp_path / "b", kind)
    assert first[:2] == second[:2] and equal(first[2], second[2])
    other = finish(tmp_path / "c", kind, seed=1)
    assert not any(torch.equal(value, other[2][name]) for name, value in first[2].items())


def test_the_monitors_are_in_the_curve_and_a_collapse_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ours = trainer(tmp_path / "sound")
        ours.run()
    assert not caplog.records
    # The users with interactions all have met the same items, and only these.
    same = ItemLists.from_pairs(np.repeat(np.arange(20), 3), np.tile(np.arange(3, dtype=np.int32), 20), 40)
    collapsed = Interactions(40, 32, same, checkerboard().validation, checkerboard().test)
    config = changed(SMALL, num_epochs=2, learning_rate=0.5)
    with caplog.at_level(logging.WARNING):
        alike = trainer(tmp_path / "alike", collapsed, config)
        alike.run()
    assert [line.split(" effective_rank=1.")[0] for line in caplog.messages] == ["collapse epoch=1"]
    sound, last = ours.progress.curve[-1], alike.progress.curve[-1]
    assert sound["effective_rank"] > 2 and last["effective_rank"] < 1.14
    assert sound["mean_cosine"] < 0.5 and last["mean_cosine"] > 0.9
    assert sound["cosine_variance"] > 0.1 > 10 * last["cosine_variance"]


@both_kinds
def test_the_gradient_norms_are_those_of_the_first_batch_at_the_last_weights(tmp_path: Path, kind: Kind) -> None:
    config = changed(SMALL, num_epochs=1, regularisation=0.1, contrast_weight=0.1)
    ours = trainer(tmp_path, config=config, kind=kind)
    ours.run()
    ours.progress.epoch = 0
    graph = ours.epoch_graph()
    batch = ours.batches.first(ours.batches.order(0), 0)
    losses = ours.model.losses(ours.model(graph), batch)
    for name, term in losses.items():
        ours.optimiser.zero_grad()
        term.backward(retain_graph=True)
        squares = sum(float(each.grad.square().sum()) for each in ours.parameters if each.grad is not None)
        assert ours.progress.curve[0][f"gradient_{name}"] == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert len(losses) == (2 if kind == "lightgcn" else 3)


def test_a_contrast_that_overwhelms_the_ranking_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = changed(SMALL, num_epochs=3)
    for weight in (1e-3, 100.0):
        with caplog.at_level(logging.WARNING):
            update = {"contrast_weight": weight}
            trainer(tmp_path / str(weight), config=changed(config, **update), kind="crane").run()
        said = [line.split(" gradient=")[0] for line in caplog.messages]
        assert said == ([] if weight < 1 else ["overwhelmed epoch=0 term=contrast"])


def uneven(kind: Kind, work: Path) -> Trainer:
    """33 users and 21 items, which neither two nor four ranks can share evenly, in steps of two batches.

    LightGCN learns on sampled graphs, CRANE on the whole one.
    """
    update = {"num_epochs": 3, "batch_size": 19, "batches_per_step": 2, "checkpoint_steps": 2}
    update |= {"num_neighbours": 2} if kind == "lightgcn" else {}
    interactions, config = checkerboard(3, 11, 7), changed(SMALL, **update)
    if kind == "lightgcn":
        return trainer(work, interactions, config)
    generator = torch.Generator().manual_seed(1)
    items, users = (torch.randn(size, 2, 5, generator=generator) for size in (21, 33))
    neighbours, _ = search(items.flatten(1).numpy(), range(21), 3)
    graph = SymmetricGraph(build_graph(neighbours.astype(np.int32)), CPU)
    work.mkdir(exist_ok=True)
    return Trainer(Crane(33, 21, Content(items, graph, users), config), interactions, config, work, CPU)


def _rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{world_size}", rank=rank, world_size=world_size
    )
    for kind in KINDS:
        ours = uneven(kind, Path(folder) / f"{kind}{world_size}")
        ours.run()
        ids = ours.shards.collect(ours.model.ids.detach())
        rows = ours.best_rows()
        if rank == 0:
            torch.save((ours.progress.curve, ids, *rows), Path(folder) / f"{kind}{world_size}.pt")
    # Half of a training, for another number of ranks to go on with.
    half = uneven("crane", Path(folder) / f"half{world_size}")
    half.config = changed(half.config, num_epochs=1)
    half.run()
    # What one rank is asked, all do.
    stopped = uneven("crane", Path(folder) / f"stopped{world_size}")
    if rank == world_size - 1:
        stopped.hooks.stopping.set()
    with pytest.raises(TrainingStopped, match="after step 1 of"):
        stopped.run()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree_with_one_process_and_go_on_for_each_other(tmp_path: Path) -> None:
    for world_size in (2, 4):
        on_ranks(_rank, world_size, world_size, str(tmp_path))
    for kind in KINDS:
        alone = uneven(kind, tmp_path / kind)
        alone.run()
        assert len(alone.progress.curve) == 3
        expected = (alone.model.ids.detach().clone(), *alone.best_rows())
        for world_size in (2, 4):
            curve, *found = torch.load(tmp_path / f"{kind}{world_size}.pt")
            for one, many in zip(alone.progress.curve, curve, strict=True):
                assert many == pytest.approx(one, rel=1e-5, abs=1e-5)
            torch.testing.assert_close(found, list(expected), rtol=1e-5, atol=1e-5)
    for world_size in (2, 4):
        resumed = uneven("crane", tmp_path / f"half{world_size}")
        resumed.run()
        for one, many in zip(alone.progress.curve, resumed.progress.curve, strict=True):
            assert many == pytest.approx(one, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("balance", "expected"), [(0.0, [1.0, 1.0, 0.0]), (0.5, [5 / 6, 5 / 3, 0.0]), (1.0, [0.625, 2.5, 0.0])]
)
def test_weights_of_users_by_hand(balance: float, expected: list[float]) -> None:
    # Four interactions and one: at 0.5 these weigh 1/2 and 1 before they are scaled to 1 on average, by 5/3.
    train = ItemLists.from_pairs(np.array([0, 0, 0, 0, 1]), np.array([0, 1, 2, 3, 0], dtype=np.int32), 3)
    found = user_weights(train.counts(), balance)
    assert found.dtype == np.float32
    assert found == pytest.approx(expected)
    assert found[train.users()].mean() == pytest.approx(1.0)


def test_without_interactions_no_user_has_a_weight() -> None:
    assert user_weights(np.zeros(2, dtype=np.int64), 0.5).tolist() == [0.0, 0.0]


def lists(seed: int) -> ItemLists:
    """30 users, some without items, and 50 items: every third is cold, and item 1 is met by nearly everyone."""
    is_met = np.random.default_rng(seed).random((30, 50)) < 0.15
    is_met[:, 1] = True
    is_met[:, ::3] = False
    is_met[::7] = False
    return ItemLists.from_pairs(*np.nonzero(is_met), 30)


@pytest.mark.parametrize("seed", range(20))
def test_shared_negatives_are_warm_and_marked_where_met(seed: int) -> None:
    train, generator = lists(seed), np.random.default_rng(seed)
    dense = np.zeros((30, 50), dtype=bool)
    dense[train.users(), train.items] = True
    users = generator.integers(30, size=40)
    items, met = NegativeSampler(train, 50).shared(users, 12, generator)
    assert items.dtype == np.int64 and 0 < len(items) <= 12
    assert (np.diff(items) > 0).all()
    assert dense.any(axis=0)[items].all()
    assert met.dtype == bool and (met == dense[users][:, items]).all()


def test_shared_negatives_cover_the_warm_catalog_evenly() -> None:
    train, generator = lists(0), np.random.default_rng(0)
    sampler, drawn = NegativeSampler(train, 50), np.zeros(50)
    for _ in range(6000):
        drawn[sampler.shared(np.array([1]), 4, generator)[0]] += 1
    warm = np.unique(train.items)
    assert drawn.sum() == drawn[warm].sum()
    # About 700 draws of each item: a quarter is seven standard deviations.
    assert np.abs(drawn[warm] / drawn[warm].mean() - 1).max() < 0.25


def test_a_batch_shares_its_negatives_and_weighs_its_users(tmp_path: Path) -> None:
    train, nothing = lists(3), ItemLists.from_pairs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32), 30)
    interactions = Interactions(30, 50, train, nothing, nothing)
    ours = trainer(tmp_path, interactions)
    ours.model.shares_negatives = True
    picked = np.array([5, 0, 17, 5])
    batch = ours.batches.batch(picked, np.random.default_rng(1))
    assert batch.met is not None and batch.weights is not None
    assert batch.users.tolist() == train.users()[picked].tolist()
    assert batch.positives.tolist() == train.items[picked].tolist()
    assert batch.met.shape == (4, len(batch.negatives))
    assert batch.weights.tolist() == user_weights(train.counts(), 0.5)[train.users()[picked]].tolist()


def test_negatives_are_never_positives_and_cover_the_rest() -> None:
    interactions = checkerboard()
    sampler = NegativeSampler(interactions.train, interactions.num_items)
    users = np.full(20_000, 3)
    drawn = sampler.one_each(users, np.random.default_rng(0))
    met = interactions.train.rows(np.array([3]))[1]
    counts = np.bincount(drawn, minlength=interactions.num_items)
    assert counts[met].sum() == 0
    free = np.delete(counts, met)
    assert free.min() > 0.8 * free.mean()


def with_everything(num_full: int) -> Interactions:
    """The checkerboard, whose first users have met the whole catalog."""
    interactions = checkerboard()
    train = interactions.train
    full = np.arange(num_full).repeat(32), np.tile(np.arange(32, dtype=np.int32), num_full)
    kept = train.users() >= num_full
    users, items = np.append(full[0], train.users()[kept]), np.append(full[1], train.items[kept])
    return Interactions(40, 32, ItemLists.from_pairs(users, items, 40), interactions.validation, interactions.test)


@both_kinds
def test_a_user_with_every_item_is_set_aside(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []
    step = Trainer.step

    def watched(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            seen.extend(batch.users.tolist())
            yield batch

    monkeypatch.setattr(
        Trainer,
        "step",
        lambda self, graph, batches, num_rows: step(self, graph, watched(batches), num_rows),
    )
    ours = trainer(tmp_path, with_everything(2), changed(SMALL, num_epochs=3), kind)
    with caplog.at_level(logging.WARNING):
        summary = ours.run()
    assert summary["users_without_negatives"] == 2 and "set_aside users=2 of=40 rows=64" in caplog.text
    assert sorted(set(seen)) == list(range(2, 40)) and len(seen) == 3 * 38 * 6
    assert ours.graph.degrees()[:3].tolist() == [32, 32, 6], "they stay in the graph"
    assert ours.batches.weights[2:] == pytest.approx(np.ones(38)) and not ours.batches.weights[:2].any()
    assert all(torch.isfinite(rows).all() for rows in ours.best_rows())


@both_kinds
def test_without_a_user_to_learn_from_there_is_no_training(tmp_path: Path, kind: Kind) -> None:
    with pytest.raises(DataError, match="40 have met all 32 items"):
        trainer(tmp_path, with_everything(40), kind=kind)
    nothing = ItemLists.from_pairs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32), 40)
    with pytest.raises(DataError, match="nothing to learn from"):
        trainer(tmp_path, Interactions(40, 32, nothing, checkerboard().validation, nothing), kind=kind)


def test_a_batch_for_both_kinds_knows_what_its_users_have_met(tmp_path: Path) -> None:
    config = changed(SMALL, contrast_negatives="both_kinds", num_epochs=2)
    ours = trainer(tmp_path, config=config, kind="crane")
    batch = ours.batches.batch(np.array([100, 3, 60, 61, 3]), np.random.default_rng(0))
    users, items = (sorted(set(column.tolist())) for column in (batch.users, batch.positives))
    pairs = set(zip(ours.batches.users.tolist(), ours.batches.items.tolist(), strict=True))
    assert batch.known is not None
    assert batch.known.tolist() == [[(user, item) in pairs for item in items] for user in users]
    assert ours.run()["num_epochs"] == 2
    assert trainer(tmp_path / "other", kind="crane")._batch(np.arange(9), np.random.default_rng(0)).known is None


def test_without_validation_items_no_epoch_can_be_chosen(tmp_path: Path) -> None:
    interactions = dataclasses.replace(
        checkerboard(), validation=ItemLists(np.zeros(41, np.int64), np.empty(0, np.int32))
    )
    with pytest.raises(TrainingError, match=r"None of the 40 users has a validation item.*validation_days"):
        trainer(tmp_path, interactions).run()


@pytest.mark.parametrize("file", ["checkpoint.json", "rank-0.safetensors", "replicated.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_refused_with_a_remedy(file: str, damage: str, tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    ours.checkpoint()
    (path,) = tmp_path.rglob(file)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5])
    else:
        path.unlink()
    if file == "checkpoint.json" and damage == "gone":
        assert ours.checkpoints.read() is None
        return
    with pytest.raises(ArtifactError, match=r"is damaged|is refused"):
        trainer(tmp_path).run()


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    ours.model.ids.data[0] = torch.nan
    with pytest.raises(TrainingError, match="not finite in epoch 0"):
        ours.run()


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


def test_the_last_item_left_to_a_user_is_found_at_once() -> None:
    size = 100_000
    own = np.delete(np.arange(size, dtype=np.int32), 777)
    train = ItemLists(np.array([0, size - 1]), own)
    assert (
        NegativeSampler(train, size).one_each(np.zeros(3, dtype=np.int64), np.random.default_rng(0)).tolist()
        == [777] * 3
    )
