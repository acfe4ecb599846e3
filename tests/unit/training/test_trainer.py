"""Training: one step by hand, a planted answer found, kills survived, ranks that agree."""

from __future__ import annotations

import logging
import math
import multiprocessing
import random
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # Adam imports it at its first use: here, before the processes that are killed are forked.

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.errors import TrainingError, TrainingStopped
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users
from crane_core.graph.exact import search
from crane_core.graph.item_graph import build_graph
from crane_core.model.content import Content
from crane_core.model.crane import Crane
from crane_core.model.propagation import SymmetricGraph
from crane_core.model.user_item_graph import user_item_graph
from crane_core.model.views import Batch
from crane_core.model_config import Choices
from crane_core.training.trainer import Trainer
from tests.worlds.planted import checkerboard
from tests.worlds.processes import PRELOADED, on_ranks
from tests.worlds.settings import changed
from tests.worlds.trainings import CPU, KINDS, SMALL, Kind, both_kinds, equal, finish, trainer, with_everything


def test_one_step_equals_the_step_by_hand(tmp_path: Path) -> None:
    interactions, config = checkerboard(), SMALL
    ours = trainer(tmp_path, interactions, config)
    before = ours.model.ids.detach().clone()
    picked, negatives = np.array([0, 5, 9]), np.array([31, 20, 11])
    rows = (ours.batches.edges.users[picked], ours.batches.edges.items[picked], negatives)
    ours.step(ours.graph, [Batch(*(torch.from_numpy(row.astype(np.int64)) for row in rows))], 3)

    adjacency = torch.from_numpy(user_item_graph(ours.batches.edges, ours.shards).toarray())
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
    picked = np.arange(0, len(ours.batches.edges.users), 9)
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


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    ours.model.ids.data[0] = torch.nan
    with pytest.raises(TrainingError, match="not finite in epoch 0"):
        ours.run()


@both_kinds
def test_given_choices_train_as_the_chosen_ones_did(tmp_path: Path, kind: Kind) -> None:
    """Validation only watches: the same epochs without it end with the same bits, also after a stop within them."""
    twin = trainer(tmp_path / "twin", kind=kind)
    found = twin.run()
    epochs = {"behaviour_epochs": 1, "crane_epochs": 1} | {
        "behaviour_epochs" if kind == "lightgcn" else "crane_epochs": found["best_epoch"] + 1
    }
    choices = Choices(**epochs, crane_ranking=found["best_ranking"], share=0.5)
    config = SMALL.model_copy(update={"choices": choices})
    planted = checkerboard()
    nothing = ItemLists.from_pairs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32), planted.num_users)
    unseen = replace(planted, validation=nothing, test=nothing)
    ours = trainer(tmp_path / "given", unseen, config, kind)
    ours.train_epoch()
    ours = trainer(tmp_path / "given", unseen, config, kind)
    given = ours.run()
    assert (given["num_epochs"], given["best_epoch"]) == (found["best_epoch"] + 1, found["best_epoch"])
    assert given["best_ranking"] == found["best_ranking"] and given["validation"] == {}
    assert all(torch.equal(*pair) for pair in zip(ours.best_rows(), twin.best_rows(), strict=True))


def test_a_ranking_that_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    choices = Choices(behaviour_epochs=1, crane_epochs=1, crane_ranking="length^3", share=0.5)
    ours = trainer(tmp_path, config=SMALL.model_copy(update={"choices": choices}), kind="crane")
    with pytest.raises(TrainingError, match="'length\\^3' is none"):
        ours.run()
