"""The training loop: deterministic, sharded over ranks, checkpointed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from crane_core.config import Train
from crane_core.dataset.interactions import Interactions
from crane_core.errors import DataError, TrainingError, TrainingStopped
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users, users_at_a_time
from crane_core.model.lightgcn import LightGCN
from crane_core.model.propagation import SymmetricGraph, drop_edges
from crane_core.model.sharding import Shards
from crane_core.model.user_item_graph import sampled_user_item_graph, user_item_graph
from crane_core.model.views import Batch, PickedViews, Rows
from crane_core.progress import LOG_SECONDS, resident_bytes
from crane_core.ranks import ranks
from crane_core.storage.tensors import load_tensors
from crane_core.training.checkpoint import Checkpoint, Checkpoints, write_tensors
from crane_core.training.memory import check_memory, free_bytes
from crane_core.training.monitors import GRADIENT, cosine_moments, effective_rank, signs
from crane_core.training.negatives import NegativeSampler

logger = logging.getLogger(__name__)
SHARDED = "ids"
"""The parameter of which every rank keeps its own rows; the others are the same on all ranks."""
STEERING_METRIC = "recall@20"


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


class Trainer:
    """Trains one model to its best validation recall and survives being killed.

    Every random choice is drawn from a generator seeded by (seed, purpose, epoch, step), so a resumed training
    repeats nothing and skips nothing: it ends with the same bits as an undisturbed one.

    Args:
        model: LightGCN or CRANE; on every rank the same.
        interactions: training and validation interactions.
        config: optimiser, batch, stopping and checkpoints.
        work: folder of the checkpoints, which all ranks see.
        device: of the model.
        stopping: set by whoever wants the training to end; it finishes its step and leaves a checkpoint.
        watch: called with the curve's entry after every epoch.

    Raises:
        DataError: no user has both a training interaction and an item left that could be a negative.
        TrainingError: the training does not fit in memory.
    """

    def __init__(
        self,
        model: LightGCN,
        interactions: Interactions,
        config: Train,
        work: Path,
        device: torch.device,
        stopping: Event | None = None,
        watch: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self.interactions = interactions
        self.config = config
        self.work = work
        self.device = device
        self.stopping = stopping or Event()
        self.watch = watch
        self.rank, self.world_size = ranks()
        self.shards = Shards((interactions.num_users, interactions.num_items), self.rank, self.world_size)
        model.shard(self.shards)
        self.model = model.to(device)
        self.checkpoints = Checkpoints(work, self.shards)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.replicated = [parameter for parameter in self.parameters if parameter is not model.ids]
        self.optimiser = torch.optim.Adam(self.parameters, lr=config.learning_rate * config.batches_per_step**0.5)
        self.users = interactions.train.users()
        self.items = interactions.train.items
        self.sampler = NegativeSampler(interactions.train, interactions.num_items, config.ranking_negatives)
        # A user who has met every item stays in the graph and teaches nothing.
        exhausted = self.sampler.exhausted
        self.sampled = np.flatnonzero(~exhausted[self.users])
        if not len(self.sampled):
            raise DataError(
                f"Of {interactions.num_users} users {exhausted.sum()} have met all {interactions.num_items} items and "
                "none of the others has a training interaction: there is nothing to learn from.",
                "Set window.start earlier, or add items to the catalog.",
            )
        self.weights = _user_weights(np.where(exhausted, 0, interactions.train.counts()), config.user_balance)
        self._known = torch.from_numpy(interactions.train.counts() > 0)
        # A GPU is one rank's own; the memory of a machine is shared by its ranks, not by those of other nodes.
        sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        check_memory(model, len(self.items), device, free_bytes(device) // sharing)
        whole = user_item_graph(self.users, self.items, self.shards)
        self.graph = SymmetricGraph(whole, device, self.shards, resident=config.num_neighbours is None)
        self.progress = Progress()
        self._started = self._reported = time.monotonic()
        self._rows = 0

    def run(self) -> dict[str, Any]:
        """Train until the validation recall has not risen for `patience` epochs.

        Returns:
            `best_epoch`, `best_ranking`, `num_epochs` and `validation` metrics; `best_rows()` are what they are of.
            `users_without_negatives`, how many users were set aside because they have met every item.

        Raises:
            TrainingError: the loss is not finite, or nobody has a validation item.
            TrainingStopped: somebody asked for it.
        """
        if not (self.interactions.validation.counts() > 0).any():
            raise TrainingError(
                f"None of the {self.interactions.num_users} users has a validation item, so no epoch can be told from "
                "another.",
                "Raise etl.validation_days, or deliver rows of the label 1 under etl.split=label.",
            )
        torch.use_deterministic_algorithms(True)
        self._resume()
        progress, num_exhausted = self.progress, int(self.sampler.exhausted.sum())
        if num_exhausted and self.rank == 0:
            logger.warning(
                "set_aside users=%d of=%d rows=%d reason=every_item_met",
                num_exhausted,
                len(self.sampler.exhausted),
                len(self.users) - len(self.sampled),
            )
        while progress.epoch < self.config.num_epochs and (
            progress.epoch - progress.best_epoch <= self.config.patience
        ):
            self._train_epoch()
        return {
            "best_epoch": progress.best_epoch,
            "best_ranking": progress.best_ranking,
            "num_epochs": progress.epoch,
            "validation": progress.best,
            "users_without_negatives": num_exhausted,
            "seconds": round(progress.seconds, 1),
        }

    def best_weights(self) -> dict[str, Tensor]:
        """Parameters and buffers of the best epoch."""
        return load_tensors(self.work / "best.safetensors")

    def best_rows(self) -> Rows:
        """Rows of users and items at the best epoch, as validation prefers to rank with them; loads its weights.

        Every rank calls it.
        """
        if self.world_size > 1:
            dist.barrier()
        weights = self.best_weights()
        self.model.load_state_dict(weights | {SHARDED: self.shards.local(weights[SHARDED])})
        return self.rankings()[self.progress.best_ranking]

    @torch.no_grad()
    def rankings(self) -> dict[str, Rows]:
        """The ways to rank with the current weights, by name: rows of users and items on the CPU; by every rank."""
        self.model.eval()
        rankings = self.model.rankings(self.model(self.graph).collect(self.shards), self.graph)
        return {name: (users.cpu(), items.cpu()) for name, (users, items) in rankings.items()}

    def _train_epoch(self) -> None:
        config, progress = self.config, self.progress
        if progress.step == 0:
            # Resumed within an epoch, what the model made at its start is in the checkpoint.
            self.model.start_epoch(progress.epoch)
        self.model.train()
        graph = self._epoch_graph()
        self._reported, self._rows = time.monotonic(), 0
        order = self.sampled[self._generator(2, progress.epoch).permutation(len(self.sampled))]
        step_size = config.batch_size * config.batches_per_step
        num_steps = -(-len(order) // step_size)
        while progress.step < num_steps:
            picked = order[progress.step * step_size :][:step_size]
            self._step(graph, self._batches(picked), len(picked))
            progress.step += 1
            self._report(num_steps, len(order))
            is_stopping = self._any_rank(self.stopping.is_set())
            if is_stopping or (progress.step % config.checkpoint_steps == 0 and progress.step < num_steps):
                self._checkpoint()
            if is_stopping:
                raise TrainingStopped(
                    f"Training was asked to stop after step {progress.step} of {num_steps} in epoch {progress.epoch}; "
                    "a checkpoint is written.",
                    "Start the same command again: it goes on from there.",
                )
        first = self._batch(order[: config.batch_size], self._generator(3, progress.epoch, 0))
        norms = self._gradient_norms(graph, first, list(progress.sums))
        rankings = self.rankings()
        ranking, metrics = self._validate(rankings)
        losses = {name: value / num_steps for name, value in progress.sums.items()}
        monitors = {**self._watch(rankings), **norms}
        progress.curve.append({"epoch": progress.epoch, "loss": sum(losses.values()), **losses, **metrics, **monitors})
        self._warn()
        if self.watch is not None:
            self.watch(progress.curve[-1])
        if metrics[STEERING_METRIC] > progress.best[STEERING_METRIC]:
            progress.best, progress.best_epoch, progress.best_ranking = metrics, progress.epoch, ranking
            weights = self.model.state_dict()
            self._write("best.safetensors", weights | {SHARDED: self.shards.collect(weights[SHARDED])})
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

    def _batches(self, picked: np.ndarray) -> Iterator[Batch]:
        """The batches of the step that is due, made one at a time."""
        size, progress = self.config.batch_size, self.progress
        first = progress.step * self.config.batches_per_step
        for number, start in enumerate(range(0, len(picked), size), first):
            yield self._batch(picked[start : start + size], self._generator(3, progress.epoch, number))

    def _batch(self, picked: np.ndarray, generator: np.random.Generator) -> Batch:
        """The batch of some training interactions, negatives drawn; the same on every rank."""
        users = self.users[picked]
        columns = {"users": users, "positives": self.items[picked]}
        if self.model.shares_negatives:
            negatives, met = self.sampler.shared(users, self.config.num_negatives, generator)
            columns |= {"negatives": negatives, "met": met, "weights": self.weights[users]}
        else:
            columns["negatives"] = self.sampler.one_each(users, generator)
        if self.model.contrasts_kinds:
            columns["known"] = self.sampler.met(np.unique(users), np.unique(columns["positives"]))
        tensors = {
            name: torch.from_numpy(column.astype(np.int64) if column.dtype.kind == "i" else column).to(self.device)
            for name, column in columns.items()
        }
        return Batch(**tensors, rank=self.rank, world_size=self.world_size)

    def _step(self, graph: SymmetricGraph, batches: Iterable[Batch], num_rows: int) -> None:
        """One step of Adam on the mean loss over the `num_rows` rows of some batches, which share one propagation."""
        losses = self._differentiate(graph, batches, num_rows)
        values = torch.stack(list(losses.values()))
        if self.world_size > 1:
            dist.all_reduce(values)
        if not torch.isfinite(values).all():
            found = ", ".join(f"{name} {float(value):g}" for name, value in zip(losses, values, strict=True))
            raise TrainingError(
                f"The loss is not finite in epoch {self.progress.epoch}, step {self.progress.step}: {found}.",
                "Lower train.learning_rate in a new run, for example to a tenth, or set features.standardise=l2.",
            )
        self.optimiser.step()
        for name, value in zip(losses, values.tolist(), strict=True):
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + value

    def _differentiate(
        self, graph: SymmetricGraph, batches: Iterable[Batch], num_rows: int, term: str | None = None
    ) -> dict[str, Tensor]:
        """Leave the gradient of the mean loss, or of one term of it, and return this rank's part of every term.

        Gradients add up at the rows of the nodes before they go back through the propagation, so memory holds what
        one batch needs.
        """
        self.optimiser.zero_grad()
        views = self.model(graph)
        picked = PickedViews.of(views, self.model.ids, self.shards)
        losses: dict[str, Tensor] = {}
        for batch in batches:
            share = len(batch.users) / num_rows
            terms = {name: share * value for name, value in self.model.losses(picked, batch).items()}
            torch.stack(list(terms.values()) if term is None else [terms[term]]).sum().backward()
            losses = {name: value.detach() + losses.get(name, 0.0) for name, value in terms.items()}
        picked.backward(views, self.model.ids, self.shards)
        if self.world_size > 1:
            for parameter in self.replicated:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
        return losses

    def _any_rank(self, flag: bool) -> bool:
        """Whether it is so on any rank; all ranks get the same answer."""
        if self.world_size == 1:
            return flag
        answer = torch.tensor([flag], dtype=torch.float32, device=self.device)
        dist.all_reduce(answer)
        return bool(answer > 0)

    def _report(self, num_steps: int, num_rows: int) -> None:
        """Log how the epoch goes, every few seconds: rows per second, mean loss, resident memory, what is left."""
        progress, now = self.progress, time.monotonic()
        self._rows += min(self.config.batch_size * self.config.batches_per_step, num_rows)
        if now - self._reported < LOG_SECONDS:
            return
        rate = self._rows / (now - self._reported)
        self._reported, self._rows = now, 0
        logger.info(
            "train epoch=%d step=%d total=%d loss=%.4f rate=%.0f/s memory=%.2fGB epoch_left=%.0fs",
            progress.epoch,
            progress.step,
            num_steps,
            sum(progress.sums.values()) / progress.step,
            rate,
            resident_bytes() / 1e9,
            num_rows * (1 - progress.step / num_steps) / rate,
        )

    def _validate(self, rankings: dict[str, Rows]) -> tuple[str, dict[str, float]]:
        """The ranking with the best Recall@20 and its metrics, over (a fixed sample of) the users with validation
        items; 0 when there are none."""
        held_out = self.interactions.validation
        users = self.interactions.validation_users(self.config.validation_users, self.config.seed)
        mine = users[self.rank :: self.world_size]
        block = users_at_a_time(self.interactions.num_items)
        found = {}
        for name, rows in rankings.items():
            ranked = rank_users(dot_product(*rows), self.interactions.train, mine, 20, block)
            metrics = user_metrics(ranked, held_out, mine, (20,))
            sums = torch.tensor([values.sum() for values in metrics.values()], dtype=torch.float64)
            if self.world_size > 1:
                sums = sums.to(self.device)
                dist.all_reduce(sums)
            found[name] = dict(zip(metrics, (sums / max(len(users), 1)).tolist(), strict=True))
        best = max(found, key=lambda name: found[name][STEERING_METRIC])
        return best, found[best]

    def _watch(self, rankings: dict[str, Rows]) -> dict[str, float]:
        """How far the rows of the users with training interactions have grown alike; all rankings share them."""
        users = next(iter(rankings.values()))[0][self._known]
        mean, variance = cosine_moments(users)
        return {"effective_rank": effective_rank(users), "mean_cosine": mean, "cosine_variance": variance}

    def _gradient_norms(self, graph: SymmetricGraph, batch: Batch, terms: Iterable[str]) -> dict[str, float]:
        """Norm of the gradient of every term of the loss over all parameters, at the current weights."""
        norms = {}
        for term in terms:
            self._differentiate(graph, [batch], len(batch.users), term)
            squares = torch.stack([_square(self.model.ids), *(_square(each) for each in self.replicated)])
            if self.world_size > 1:
                # Of the embeddings every rank holds a part, of the rest the whole.
                dist.all_reduce(squares[:1])
            norms[f"{GRADIENT}{term}"] = float(squares.sum().sqrt())
        return norms

    def _warn(self) -> None:
        """Log what the monitors say of the last epoch and did not of the one before."""
        *before, last = [signs(entry, self.config.embedding_dim) for entry in self.progress.curve[-2:]]
        for name in sorted(set(last) - {name for each in before for name in each}):
            if self.rank == 0:
                logger.warning(last[name])

    def _epoch_graph(self) -> SymmetricGraph:
        """What is left of the user-item graph for this epoch."""
        epoch, num_neighbours = self.progress.epoch, self.config.num_neighbours
        kept = drop_edges(self.users, self.items, self.model.edge_dropout, self._generator(1, epoch))
        if num_neighbours is None and len(kept) == len(self.users):
            return self.graph
        edges = self.users[kept], self.items[kept], self.shards
        if num_neighbours is None:
            matrix = user_item_graph(*edges)
        else:
            matrix = sampled_user_item_graph(*edges, num_neighbours, self._generator(4, epoch))
        return SymmetricGraph(matrix, self.device, self.shards)

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
        progress = self.progress
        sharded = {name: tensors.pop(name) for name in self._sharded if name in tensors}
        checkpoint = Checkpoint(sharded, tensors, vars(progress))
        self.checkpoints.write(f"{progress.epoch:05d}-{progress.step:07d}", checkpoint)

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self.rank == 0:
            write_tensors(self.work / name, tensors)

    def _resume(self) -> None:
        checkpoint = self.checkpoints.read()
        if checkpoint is None:
            return
        tensors = checkpoint.sharded | checkpoint.replicated
        self.progress = Progress(**checkpoint.state)
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

    @property
    def _sharded(self) -> tuple[str, ...]:
        """Tensors of a checkpoint of which every rank keeps its own rows: the embeddings and their moments."""
        index = next(number for number, parameter in enumerate(self.parameters) if parameter is self.model.ids)
        return f"model.{SHARDED}", f"adam.{index}.exp_avg", f"adam.{index}.exp_avg_sq"


def _user_weights(counts: np.ndarray, balance: float) -> np.ndarray:
    """float32 [num_users]: `n^-balance` for a user with n training interactions, 1 on average over interactions."""
    counts = counts.astype(np.float64)
    weights = np.zeros(len(counts))
    np.power(counts, -balance, out=weights, where=counts > 0)
    return (weights * counts.sum() / max((weights * counts).sum(), 1e-12)).astype(np.float32)


def _square(parameter: Tensor) -> Tensor:
    """Squared norm of the parameter's gradient; 0 where nothing has reached it."""
    return parameter.new_zeros(()) if parameter.grad is None else parameter.grad.square().sum()
