"""The training loop: deterministic, sharded over ranks, checkpointed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crane_core.dataset.interactions import Interactions
from crane_core.errors import TrainingError, TrainingStopped
from crane_core.model.lightgcn import LightGCN
from crane_core.model.propagation import SymmetricGraph, drop_edges
from crane_core.model.sharding import Shards
from crane_core.model.user_item_graph import sampled_user_item_graph, user_item_graph
from crane_core.model.views import Batch, Rows
from crane_core.model_config import ModelConfig
from crane_core.ranks import any_rank, ranks
from crane_core.storage.tensors import load_tensors
from crane_core.training.batches import Batches, Purpose, generator_for
from crane_core.training.checkpoint import Checkpoint, Checkpoints, write_tensors
from crane_core.training.epoch_log import EpochLog
from crane_core.training.gradients import Gradients
from crane_core.training.memory import check_memory, free_bytes
from crane_core.training.monitors import new_warnings, row_monitors
from crane_core.training.validation import STEERING_METRIC, Validation

logger = logging.getLogger(__name__)

SHARDED = "ids"
"""The parameter of which every rank keeps its own rows; the others are the same on all ranks."""
BEST = "best.safetensors"
"""File of the weights of the best epoch."""


@dataclass
class Progress:
    """The state of a training; with the tensors of the checkpoint it determines everything that follows."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = -1
    best_ranking: str = ""
    best: dict[str, float] = field(default_factory=lambda: {STEERING_METRIC: -1.0})
    curve: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Hooks:
    """Ways into a training from outside.

    Attributes:
        stopping: set it to end the training; it finishes its step and leaves a checkpoint.
        watch: called with the curve's entry after every epoch.
    """

    stopping: Event = field(default_factory=Event)
    watch: Callable[[dict[str, float]], None] | None = None


class Trainer:
    """Trains one model to its best validation recall, or for a given number of epochs, and survives being killed.

    A resumed training ends with the same bits as an undisturbed one: every random choice has a generator of its own,
    by its purpose and place.

    Args:
        model: LightGCN or CRANE; on every rank the same.
        interactions: training and validation interactions.
        config: optimiser, batch, stopping and checkpoints.
        work: folder of the checkpoints, which all ranks see.
        device: of the model.
        hooks: ways in from outside.

    Attributes:
        batches: of the training.
        gradients: of the model.
        validation: by which the best epoch is chosen.
        chosen: epochs and ranking where they are given and not chosen.
        graph: the whole user-item graph, this rank's rows.
        progress: where the training stands.

    Raises:
        DataError: no user has both a training interaction and an item left that could be a negative.
        TrainingError: the training does not fit in memory.
    """

    def __init__(
        self,
        model: LightGCN,
        interactions: Interactions,
        config: ModelConfig,
        work: Path,
        device: torch.device,
        hooks: Hooks | None = None,
    ) -> None:
        self.interactions = interactions
        self.config = config
        self.work = work
        self.device = device
        self.hooks = hooks or Hooks()
        self.rank, self.world_size = ranks()
        self.shards = Shards((interactions.num_users, interactions.num_items), self.rank, self.world_size)
        model.shard(self.shards)
        self.model = model.to(device)
        self.checkpoints = Checkpoints(work, self.shards)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        step_size = config.train.learning_rate * config.train.batches_per_step**0.5
        self.optimiser = torch.optim.Adam(self.parameters, lr=step_size)
        self.batches = Batches(model, interactions, config, device)
        self.gradients = Gradients(model)
        self.validation = Validation(interactions, config.train, device)
        self.chosen = model.chosen()
        self._known = torch.from_numpy(interactions.train.counts() > 0)
        # A GPU is one rank's own; the memory of a machine is shared by its ranks, not by those of other nodes.
        sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        check_memory(model, len(self.batches.edges.items), device, free_bytes(device) // sharing)
        whole = user_item_graph(self.batches.edges, self.shards)
        self.graph = SymmetricGraph(whole, device, self.shards, resident=config.train.num_neighbours is None)
        self.progress = Progress()
        self._clock = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Train until the validation recall has not risen for `patience` epochs, or for the given number of epochs.

        Returns:
            `best_epoch`, `best_ranking`, `num_epochs` and `validation` metrics; `best_rows()` are what they are of.
            With a given number of epochs the last one counts as the best, and there are no metrics.
            `users_without_negatives`, how many users were set aside because they have met every item.

        Raises:
            TrainingError: the loss is not finite, or no user has a validation item.
            TrainingStopped: `stopping` was set.
        """
        if self.chosen is None:
            self.validation.check()
        torch.use_deterministic_algorithms(True)
        self.resume()
        progress = self.progress
        exhausted = self.batches.sampler.exhausted
        num_exhausted = int(exhausted.sum())
        if num_exhausted and self.rank == 0:
            logger.warning(
                "set_aside users=%d of=%d rows=%d reason=every_item_met",
                num_exhausted,
                len(exhausted),
                len(self.batches.edges.users) - len(self.batches.learned),
            )
        while self._goes_on():
            self.train_epoch()
        return {
            "best_epoch": progress.best_epoch,
            "best_ranking": progress.best_ranking,
            "num_epochs": progress.epoch,
            "validation": progress.best if self.chosen is None else {},
            "users_without_negatives": num_exhausted,
            "seconds": round(progress.seconds, 1),
        }

    def best_weights(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of the best epoch."""
        return load_tensors(self.work / BEST)

    def best_rows(self) -> Rows:
        """Return the rows of users and items at the best epoch, as validation prefers to rank with them.

        It loads the weights of that epoch. Every rank calls it.
        """
        if self.world_size > 1:
            dist.barrier()
        weights = self.best_weights()
        self.model.load_state_dict(weights | {SHARDED: self.shards.local(weights[SHARDED])})
        return self.rankings()[self.progress.best_ranking]

    @torch.no_grad()
    def rankings(self) -> dict[str, Rows]:
        """Return the ways to rank with the current weights: name to rows of users and items, on the CPU.

        Every rank calls it.
        """
        self.model.eval()
        rankings = self.model.rankings(self.model(self.graph).collect(self.shards), self.graph)
        return {name: (users.cpu(), items.cpu()) for name, (users, items) in rankings.items()}

    def _goes_on(self) -> bool:
        progress, limits = self.progress, self.config.train
        if self.chosen is not None:
            return progress.epoch < self.chosen[0]
        return progress.epoch < limits.num_epochs and progress.epoch - progress.best_epoch <= limits.patience

    def train_epoch(self) -> None:
        """Train what is left of an epoch, validate it, and keep its weights when they are the best so far."""
        progress = self.progress
        if progress.step == 0:
            # In a training resumed within an epoch, the checkpoint holds what the model made at its start.
            self.model.start_epoch(progress.epoch)
        self.model.train()
        graph, order = self.epoch_graph(), self.batches.order(progress.epoch)
        num_steps = self.batches.num_steps()
        log = EpochLog(progress.epoch, num_steps, len(order))
        while progress.step < num_steps:
            picked = order[progress.step * self.batches.step_size :][: self.batches.step_size]
            self.step(graph, self.batches.of_step(picked, progress.epoch, progress.step), len(picked))
            progress.step += 1
            log.count(progress.step, len(picked), sum(progress.sums.values()))
            self._checkpoint_within_epoch(num_steps)
        first = self.batches.first(order, progress.epoch)
        norms = self.gradients.norms(graph, first, list(progress.sums))
        self._end_epoch({name: value / num_steps for name, value in progress.sums.items()}, norms)

    def step(self, graph: SymmetricGraph, batches: Iterable[Batch], num_rows: int) -> None:
        """Take one step of Adam on the mean loss of some batches, which share one propagation.

        Args:
            graph: to propagate over.
            batches: of the step.
            num_rows: interactions in all of them.

        Raises:
            TrainingError: the loss is not finite.
        """
        losses = self.gradients.compute(graph, batches, num_rows)
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

    def epoch_graph(self) -> SymmetricGraph:
        """Return the part of the user-item graph that this epoch propagates over."""
        train, epoch = self.config.train, self.progress.epoch
        edges = self.batches.edges
        generator = generator_for(train.seed, Purpose.EDGE_DROPOUT, epoch)
        kept = drop_edges(edges.users, edges.items, self.model.edge_dropout, generator)
        if train.num_neighbours is None and len(kept) == len(edges.users):
            return self.graph
        if train.num_neighbours is None:
            matrix = user_item_graph(edges.where(kept), self.shards)
        else:
            sampling = generator_for(train.seed, Purpose.SAMPLED_GRAPH, epoch)
            matrix = sampled_user_item_graph(edges.where(kept), self.shards, train.num_neighbours, sampling)
        return SymmetricGraph(matrix, self.device, self.shards)

    def checkpoint(self) -> None:
        """Write what the training needs to go on from here."""
        self._count_seconds()
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
        progress = self.progress
        sharded = {name: tensors.pop(name) for name in self._sharded_tensors() if name in tensors}
        checkpoint = Checkpoint(sharded, tensors, vars(progress))
        self.checkpoints.write(f"{progress.epoch:05d}-{progress.step:07d}", checkpoint)

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
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

    def write_best(self) -> None:
        """Write the current weights as those of the best epoch."""
        weights = self.model.state_dict()
        whole = weights | {SHARDED: self.shards.collect(weights[SHARDED])}
        if self.rank == 0:
            write_tensors(self.work / BEST, whole)

    def _checkpoint_within_epoch(self, num_steps: int) -> None:
        progress = self.progress
        is_stopping = any_rank(self.hooks.stopping.is_set(), self.device)
        is_due = progress.step % self.config.train.checkpoint_steps == 0 and progress.step < num_steps
        if is_stopping or is_due:
            self.checkpoint()
        if is_stopping:
            raise TrainingStopped(
                f"Training was asked to stop after step {progress.step} of {num_steps} in epoch {progress.epoch}; "
                "a checkpoint is written.",
                "Start the same command again: it goes on from there.",
            )

    def _end_epoch(self, losses: dict[str, float], norms: dict[str, float]) -> None:
        progress, rankings = self.progress, self.rankings()
        ranking, metrics, is_best = self._judge(rankings)
        # All rankings share the rows of the users.
        monitors = row_monitors(next(iter(rankings.values()))[0][self._known]) | norms
        loss = sum(losses.values())
        progress.curve.append({"epoch": progress.epoch, "loss": loss, **losses, **metrics, **monitors})
        if self.rank == 0:
            for line in new_warnings(progress.curve, self.config.lightgcn.embedding_dim):
                logger.warning(line)
        if self.hooks.watch is not None:
            self.hooks.watch(progress.curve[-1])
        if is_best:
            progress.best, progress.best_epoch, progress.best_ranking = metrics, progress.epoch, ranking
            self.write_best()
        measured = ""
        if metrics:
            best = progress.best[STEERING_METRIC]
            measured = f" recall@20={metrics[STEERING_METRIC]:.4f} best={best:.4f} best_epoch={progress.best_epoch}"
        logger.info("epoch=%d loss=%.4f%s seconds=%.1f", progress.epoch, loss, measured, self._count_seconds())
        progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
        self.checkpoint()

    def _judge(self, rankings: dict[str, Rows]) -> tuple[str, dict[str, float], bool]:
        """Return the ranking to use, its validation metrics, and whether this epoch is the best so far.

        Raises:
            TrainingError: the model cannot rank in the given way.
        """
        if self.chosen is None:
            ranking, metrics = self.validation.best(rankings)
            return ranking, metrics, metrics[STEERING_METRIC] > self.progress.best[STEERING_METRIC]
        num_epochs, ranking = self.chosen
        if ranking not in rankings:
            raise TrainingError(
                f"The given ranking {ranking!r} is none of this model's.",
                f"Give --set choices.crane_ranking, one of {', '.join(rankings)}.",
            )
        return ranking, {}, self.progress.epoch == num_epochs - 1

    def _count_seconds(self) -> float:
        now = time.monotonic()
        self.progress.seconds += now - self._clock
        self._clock = now
        return round(self.progress.seconds, 2)

    def _sharded_tensors(self) -> tuple[str, ...]:
        """Return the tensors of a checkpoint of which every rank keeps its rows: the embeddings and their moments."""
        index = next(number for number, parameter in enumerate(self.parameters) if parameter is self.model.ids)
        return f"model.{SHARDED}", f"adam.{index}.exp_avg", f"adam.{index}.exp_avg_sq"
