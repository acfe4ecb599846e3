"""Training: one step by hand, a planted answer found, kills survived, ranks that agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from crane_core.config import Train
from crane_core.dataset import Interactions, ItemLists
from crane_core.errors import TrainingError
from crane_core.evaluation import dot_product, rank_users, user_metrics
from crane_core.graph import user_item_graph
from crane_core.model import Batch, LightGCN
from crane_core.propagation import drop_edges
from crane_core.training import NegativeSampler, Trainer
from tests.unit.planted import checkerboard

CPU = torch.device("cpu")
SMALL = Train(embedding_dim=8, batch_size=64, num_epochs=12, learning_rate=0.02, regularisation=1e-4)


def trainer(work: Path, interactions: Interactions | None = None, config: Train = SMALL) -> Trainer:
    work.mkdir(exist_ok=True)
    interactions = interactions or checkerboard()
    return Trainer(LightGCN(interactions.num_users, interactions.num_items, config), interactions, config, work, CPU)


def test_one_step_equals_the_step_by_hand(tmp_path: Path) -> None:
    interactions, config = checkerboard(), SMALL
    ours = trainer(tmp_path, interactions, config)
    before = ours.model.ids.detach().clone()
    picked, negatives = np.array([0, 5, 9]), np.array([31, 20, 11])
    rows = (ours.users[picked], ours.items[picked], negatives)
    ours._step(ours.graph, Batch(*(torch.from_numpy(row.astype(np.int64)) for row in rows)))

    adjacency = torch.from_numpy(
        user_item_graph(
            interactions.train.users(), interactions.train.items, interactions.num_users, interactions.num_items
        ).toarray()
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
        loss = loss - torch.log(torch.sigmoid(difference)) / 3 + config.regularisation / 2 * squares / 3
    loss.backward()
    assert sum(ours.progress.sums.values()) == pytest.approx(loss.item(), rel=1e-5)
    # Adam's first step: every entry moves by the learning rate against the sign of its gradient.
    expected = before - config.learning_rate * ids.grad / (ids.grad.abs() + 1e-8)
    torch.testing.assert_close(ours.model.ids.detach(), expected, rtol=1e-4, atol=1e-6)


def test_the_planted_answer_is_found(tmp_path: Path) -> None:
    interactions = checkerboard()
    ours = trainer(tmp_path, interactions, SMALL.model_copy(update={"num_epochs": 40, "patience": 40}))
    ours.run()
    users = np.arange(interactions.num_users)
    ranked = rank_users(dot_product(*ours.rankings()["dot"]), interactions.train, users, 2)
    assert user_metrics(ranked, interactions.test, users, (2,))["recall@2"].mean() == 1.0


def finish(work: Path) -> tuple[dict, list, dict[str, Tensor]]:
    ours = trainer(work, config=SMALL.model_copy(update={"checkpoint_steps": 2}))
    result = ours.run()
    result.pop("seconds")
    curve = [{k: v for k, v in entry.items() if k != "seconds"} for entry in ours.progress.curve]
    return result, curve, ours.best_weights()


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", [1, 5, 8])
def test_a_training_killed_at_any_moment_ends_with_the_same_bits(
    tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = finish(tmp_path / "undisturbed")
    step, taken = Trainer._step, 0

    def dying_step(self: Trainer, *arguments: object) -> None:
        nonlocal taken
        taken += 1
        if taken == moment:
            raise Killed
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", dying_step)
        with pytest.raises(Killed):
            finish(tmp_path / "killed")
    found = finish(tmp_path / "killed")
    assert found[:2] == expected[:2]
    for name, value in expected[2].items():
        assert torch.equal(found[2][name], value)


def test_same_seed_same_bits_other_seed_other_bits(tmp_path: Path) -> None:
    first, second = finish(tmp_path / "a"), finish(tmp_path / "b")
    assert torch.equal(first[2]["ids"], second[2]["ids"])
    other = trainer(tmp_path / "c", config=SMALL.model_copy(update={"seed": 1}))
    other.run()
    assert not torch.equal(first[2]["ids"], other.best_weights()["ids"])


def _rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{world_size}", rank=rank, world_size=world_size
    )
    ours = trainer(
        Path(folder) / f"work{world_size}", config=SMALL.model_copy(update={"num_epochs": 3, "batch_size": 61})
    )
    ours.run()
    if rank == 0:
        (Path(folder) / f"curve{world_size}.json").write_text(json.dumps(ours.progress.curve))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ranks_agree_with_one_process(tmp_path: Path) -> None:
    curves = []
    for world_size in (1, 3):
        mp.spawn(_rank, (world_size, str(tmp_path)), nprocs=world_size)
        curves.append(json.loads((tmp_path / f"curve{world_size}.json").read_text()))
    for one, three in zip(*curves, strict=True):
        assert three["loss"] == pytest.approx(one["loss"], rel=1e-5)


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


def test_a_user_with_every_item_is_refused() -> None:
    full = ItemLists.from_pairs(np.array([0, 0, 1]), np.array([0, 1, 0], dtype=np.int32), 2)
    with pytest.raises(TrainingError, match="1 of 2 users have met all 2 items"):
        NegativeSampler(full, 2)


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
