"""The training loop: deterministic, data-parallel, checkpointed."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from crane_core.config import Train
from crane_core.dataset import Interactions, ItemLists
from crane_core.errors import TrainingError
from crane_core.evaluation import dot_product, rank_users, user_metrics
from crane_core.graph import user_item_graph
from crane_core.model import Batch, LightGCN, Rows
from crane_core.monitors import effective_rank, mean_cosine
from crane_core.propagation import SymmetricGraph, drop_edges
from crane_core.tensors import load_tensors

logger = logging.getLogger(__name__)

STEERING_METRIC = "recall@20"
COLLAPSE = 0.02
"""How far from 1 to d the effective rank of the users' rows must reach, or the epoch is logged as a collapse. LightGCN
under BPR passes through 0.036 (Last.fm 2K, d = 64) while popularity is all it knows, and learns on from there."""


@dataclass
class Progress:
    """Where training stands; with the tensors of the checkpoint it determines everything that follows."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = -1
    best_ranking: str = ""
    best: dict[str, float] = field(default_factory=lambda: {STEERING_METRIC: -1.0})
    curve: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class NegativeSampler:
    """Items a user has not met.

    Args:
        train: training items per user.
        num_items: catalog size.
        pool: what shared negatives are drawn from, `warm` items or the whole `catalog`.

    Raises:
        TrainingError: a user has met every item.
    """

    def __init__(self, train: ItemLists, num_items: int, pool: Literal["warm", "catalog"] = "warm") -> None:
        full = int((train.counts() >= num_items).sum())
        if full:
            raise TrainingError(
                f"{full} of {train.num_users} users have met all {num_items} items, so no negative exists for them.",
                "Add items to the catalog or set these users aside.",
            )
        self.num_items = num_items
        self._train = train
        self._pool = np.unique(train.items) if pool == "warm" else np.arange(num_items)
        self._met = train.users().astype(np.int64) * num_items + train.items

    def one_each(self, users: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """One item for each user, uniform over the catalog by exact rejection: int [n] -> int64 [n]."""
        items = generator.integers(self.num_items, size=len(users))
        open_rows = np.arange(len(users))
        while len(open_rows):
            keys = users[open_rows].astype(np.int64) * self.num_items + items[open_rows]
            found = np.searchsorted(self._met, keys)
            open_rows = open_rows[self._met[np.minimum(found, len(self._met) - 1)] == keys]
            items[open_rows] = generator.integers(self.num_items, size=len(open_rows))
        return items

    def shared(self, users: np.ndarray, size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Random items of the pool, the same for all users.

        Args:
            users: int [n].
            size: items drawn; the distinct ones among them are kept.
            generator: of the draw.

        Returns:
            Ascending int64 [m], m <= size; bool [n, m], whether the user has met the item.
        """
        items = np.unique(generator.choice(self._pool, size)).astype(np.int64)
        column = np.full(self.num_items, -1, dtype=np.int32)
        column[items] = np.arange(len(items))
        rows, known = self._train.rows(users)
        columns = column[known]
        met = np.zeros((len(users), len(items)), dtype=bool)
        met[rows[columns >= 0], columns[columns >= 0]] = True
        return items, met


class Trainer:
    """Trains one model to its best validation recall and survives being killed.

    Every random choice is drawn from a generator seeded by (seed, purpose, epoch, step), so a resumed training
    repeats nothing and skips nothing: it ends with the same bits as an undisturbed one.

    Args:
        model: LightGCN or CRANE; on every rank the same.
        interactions: training and validation interactions.
        config: optimiser, batch, stopping and checkpoints.
        work: folder of the checkpoints.
        device: of the model.
    """

    def __init__(
        self, model: LightGCN, interactions: Interactions, config: Train, work: Path, device: torch.device
    ) -> None:
        self.model = model.to(device)
        self.interactions = interactions
        self.config = config
        self.work = work
        self.device = device
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.Adam(self.parameters, lr=config.learning_rate)
        self.users = interactions.train.users()
        self.items = interactions.train.items
        self.sampler = NegativeSampler(interactions.train, interactions.num_items, config.ranking_negatives)
        self.weights = _user_weights(interactions.train, config.user_balance)
        self._known = torch.from_numpy(interactions.train.counts() > 0)
        self.graph = self._graph(np.arange(len(self.users)))
        self.progress = Progress()
        self._started = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Train until the validation recall has not risen for `patience` epochs.

        Returns:
            `best_epoch`, `best_ranking`, `num_epochs` and `validation` metrics; `best_rows()` are what they are of.

        Raises:
            TrainingError: the loss is not finite.
        """
        torch.use_deterministic_algorithms(True)
        self._resume()
        progress = self.progress
        while progress.epoch < self.config.num_epochs and (
            progress.epoch - progress.best_epoch <= self.config.patience
        ):
            self._train_epoch()
        return {
            "best_epoch": progress.best_epoch,
            "best_ranking": progress.best_ranking,
            "num_epochs": progress.epoch,
            "validation": progress.best,
            "seconds": round(progress.seconds, 1),
        }

    def best_weights(self) -> dict[str, Tensor]:
        """Parameters and buffers of the best epoch."""
        return load_tensors(self.work / "best.safetensors")

    def best_rows(self) -> Rows:
        """Rows of users and items at the best epoch, as validation prefers to rank with them; loads its weights."""
        self.model.load_state_dict(self.best_weights())
        return self.rankings()[self.progress.best_ranking]

    @torch.no_grad()
    def rankings(self) -> dict[str, Rows]:
        """The ways to rank with the current weights, by name: rows of users and items on the CPU."""
        self.model.eval()
        rankings = self.model.rankings(self.model(self.graph), self.graph)
        return {name: (users.cpu(), items.cpu()) for name, (users, items) in rankings.items()}

    def _train_epoch(self) -> None:
        config, progress = self.config, self.progress
        if progress.step == 0:
            # Resumed within an epoch, what the model made at its start is in the checkpoint.
            self.model.start_epoch(progress.epoch)
        self.model.train()
        kept = drop_edges(self.users, self.items, self.model.edge_dropout, self._generator(1, progress.epoch))
        graph = self.graph if len(kept) == len(self.users) else self._graph(kept)
        order = self._generator(2, progress.epoch).permutation(len(self.users))
        num_steps = -(-len(order) // config.batch_size)
        while progress.step < num_steps:
            picked = order[progress.step * config.batch_size :][: config.batch_size]
            self._step(graph, self._batch(picked, self._generator(3, progress.epoch, progress.step)))
            progress.step += 1
            if progress.step % config.checkpoint_steps == 0 and progress.step < num_steps:
                self._checkpoint()
        rankings = self.rankings()
        ranking, metrics = self._validate(rankings)
        losses = {name: value / num_steps for name, value in progress.sums.items()}
        monitors = self._watch(rankings)
        progress.curve.append({"epoch": progress.epoch, "loss": sum(losses.values()), **losses, **metrics, **monitors})
        if metrics[STEERING_METRIC] > progress.best[STEERING_METRIC]:
            progress.best, progress.best_epoch, progress.best_ranking = metrics, progress.epoch, ranking
            self._write("best.safetensors", self.model.state_dict(), {})
        logger.info(
            "epoch=%d loss=%.4f recall@20=%.4f best=%.4f best_epoch=%d seconds=%.1f",
            progress.epoch,
            sum(losses.values()),
            metrics[STEERING_METRIC],
            progress.best[STEERING_METRIC],
            progress.best_epoch,
            self._elapsed(),
        )
        progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
        self._checkpoint()

    def _batch(self, picked: np.ndarray, generator: np.random.Generator) -> Batch:
        """The batch of some training interactions, negatives drawn; the same on every rank."""
        users = self.users[picked]
        columns = {"users": users, "positives": self.items[picked]}
        if self.model.shares_negatives:
            negatives, met = self.sampler.shared(users, self.config.num_negatives, generator)
            columns |= {"negatives": negatives, "met": met, "weights": self.weights[users]}
        else:
            columns["negatives"] = self.sampler.one_each(users, generator)
        tensors = {
            name: torch.from_numpy(column if name in ("met", "weights") else column.astype(np.int64)).to(self.device)
            for name, column in columns.items()
        }
        return Batch(**tensors, rank=self.rank, world_size=self.world_size)

    def _step(self, graph: SymmetricGraph, batch: Batch) -> None:
        losses = self.model.losses(self.model(graph), batch)
        total = torch.stack(list(losses.values())).sum()
        self.optimiser.zero_grad()
        total.backward()
        values = torch.stack([value.detach() for value in losses.values()])
        if self.world_size > 1:
            for parameter in self.parameters:
                dist.all_reduce(parameter.grad)
            dist.all_reduce(values)
        if not torch.isfinite(values).all():
            terms = ", ".join(f"{name} {float(value):g}" for name, value in zip(losses, values, strict=True))
            raise TrainingError(
                f"The loss is not finite in epoch {self.progress.epoch}, step {self.progress.step}: {terms}.",
                "Lower train.learning_rate, or look for extreme values in the features.",
            )
        self.optimiser.step()
        for name, value in zip(losses, values.tolist(), strict=True):
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + value

    def _validate(self, rankings: dict[str, Rows]) -> tuple[str, dict[str, float]]:
        """The ranking with the best Recall@20 and its metrics, over (a fixed sample of) the users with validation
        items; 0 when there are none."""
        held_out = self.interactions.validation
        users = self.interactions.validation_users(self.config.validation_users, self.config.seed)
        found = {}
        for name, rows in rankings.items():
            ranked = rank_users(dot_product(*rows), self.interactions.train, users, 20)
            metrics = user_metrics(ranked, held_out, users, (20,))
            found[name] = {metric: float(values.mean()) if len(users) else 0.0 for metric, values in metrics.items()}
        best = max(found, key=lambda name: found[name][STEERING_METRIC])
        return best, found[best]

    def _watch(self, rankings: dict[str, Rows]) -> dict[str, float]:
        """How far the rows of the users with training interactions have grown alike; all rankings share them."""
        users = next(iter(rankings.values()))[0][self._known]
        rank, cosine = effective_rank(users), mean_cosine(users)
        if rank < 1 + COLLAPSE * (users.shape[1] - 1) and self.rank == 0:
            logger.warning(
                "collapse epoch=%d effective_rank=%.2f dim=%d mean_cosine=%.3f",
                self.progress.epoch,
                rank,
                users.shape[1],
                cosine,
            )
        return {"effective_rank": rank, "mean_cosine": cosine}

    def _graph(self, kept: np.ndarray) -> SymmetricGraph:
        interactions = self.interactions
        matrix = user_item_graph(self.users[kept], self.items[kept], interactions.num_users, interactions.num_items)
        return SymmetricGraph(matrix, self.device)

    def _generator(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *purpose])

    def _elapsed(self) -> float:
        now = time.monotonic()
        self.progress.seconds += now - self._started
        self._started = now
        return round(self.progress.seconds, 2)

    def _checkpoint(self) -> None:
        self._elapsed()
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
        self._write("checkpoint.safetensors", tensors, {"progress": json.dumps(vars(self.progress))})

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        if self.rank != 0:
            return
        spooled = self.work / f".{name}"
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, spooled, metadata)
        with spooled.open("rb") as handle:
            os.fsync(handle.fileno())
        spooled.replace(self.work / name)

    def _resume(self) -> None:
        path = self.work / "checkpoint.safetensors"
        if not path.exists():
            return
        tensors = load_tensors(path)
        with safe_open(path, "pt") as handle:
            self.progress = Progress(**json.loads(handle.metadata()["progress"]))
        self.model.load_state_dict(
            {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        logger.info(
            "resume epoch=%d step=%d best_epoch=%d", self.progress.epoch, self.progress.step, self.progress.best_epoch
        )


def _user_weights(train: ItemLists, balance: float) -> np.ndarray:
    """float32 [num_users]: `n^-balance` for a user with n training interactions, 1 on average over interactions."""
    counts = train.counts().astype(np.float64)
    weights = np.zeros(len(counts))
    np.power(counts, -balance, out=weights, where=counts > 0)
    return (weights * counts.sum() / max((weights * counts).sum(), 1e-12)).astype(np.float32)
