"""Interactions per second of LightGCN's training, beside the loop the reference implementations run.

    python -m tests.bench.bench_train --users 30000 --items 41000 --interactions 800000
    python -m tests.bench.bench_train --data folder                # both trained to their best on real data
    python -m tests.bench.bench_train --users 1000000 --items 300000 --interactions 42000000 --whole

The peer does what LightGCN-PyTorch and MMRec do: for every 2,048 interactions it propagates the whole graph with
`torch.sparse.mm` over a COO matrix and lets autograd transpose it; one Adam on all embeddings. Its negatives are drawn
without Python loops, which theirs are not. First, propagated rows and the gradient of one batch must agree. Then both
sides take turns, so that what else the machine does burdens both. The last line on stdout is one JSON object:

- `interactions_per_second`, `peer_interactions_per_second`: batches drawn, propagated, and stepped. `cpu_...`: the
  same by the time of the processor. `epoch_seconds`: of a whole epoch, computed from the steps unless `--whole`.
- `peak_bytes`: the resident set at its largest (VmHWM), the peer's included unless `--whole`.
- With `--data`: `recall@20` and `peer_recall@20` on validation and `seconds` of each, trained until it stops rising.
- With `--whole`: the interactions are written as Parquet shards and read from there, an epoch is trained, validated and
  written as a checkpoint, and all users are ranked; `seconds` and `cpu_seconds` of each part. `--whole-steps` and
  `--whole-users` take a part of the epoch and of the users, and the seconds of the whole are computed from it. With
  `--crane`, CRANE learns in place of LightGCN, from random rows of two modalities. The peer is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from crane_core.dataset.interactions import Interactions, load_interactions
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import SCORE_BYTES, dot_product, rank_blocks, rank_users
from crane_core.experiments.data import load_dataset
from crane_core.model.lightgcn import LightGCN
from crane_core.model.sharding import Shards
from crane_core.model.user_item_graph import Edges, user_item_graph
from crane_core.model_config import ModelConfig
from crane_core.schema import EVENT_TIME, ITEM_IDX, SPLIT, USER_IDX, WEIGHT
from crane_core.storage.artifacts import Artifact
from crane_core.training.negatives import NegativeSampler
from tests.bench.device import draw, origin, status_bytes, synthetic, wait_for
from tests.bench.trainers import make_trainer
from tests.worlds.settings import changed, model_config

PEER_BATCH = 2048
LIMIT = 1e-4
"""Largest difference to the peer's rows and gradients, over their largest value."""


class Peer:
    """LightGCN as the reference implementations train it."""

    def __init__(self, interactions: Interactions, config: ModelConfig, device: torch.device) -> None:
        self.interactions, self.config, self.device = interactions, config, device
        self.num_users = interactions.num_users
        self.users, self.items = interactions.train.users(), interactions.train.items
        graph = user_item_graph(Edges(self.users, self.items), Shards((self.num_users, interactions.num_items))).tocoo()
        places = torch.from_numpy(np.stack([graph.row, graph.col]).astype(np.int64))
        self.adjacency = torch.sparse_coo_tensor(places, torch.from_numpy(graph.data), graph.shape).coalesce()
        self.adjacency = self.adjacency.to(device)
        self.ids = LightGCN(self.num_users, interactions.num_items, config).ids.detach().to(device).requires_grad_()
        self.optimiser = torch.optim.Adam([self.ids], lr=config.train.learning_rate)
        self.sampler = NegativeSampler(interactions.train, interactions.num_items)
        self.generator = np.random.default_rng(config.train.seed)

    def rows(self) -> Tensor:
        layers = [self.ids]
        for _ in range(self.config.lightgcn.num_layers):
            layers.append(torch.sparse.mm(self.adjacency, layers[-1]))
        return torch.stack(layers).mean(0)

    def loss(self, users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        rows = self.rows()
        user, positive, negative = users, positives + self.num_users, negatives + self.num_users
        scores = (rows[user] * rows[positive]).sum(1), (rows[user] * rows[negative]).sum(1)
        norm = sum(self.ids[nodes].square().sum() for nodes in (user, positive, negative))
        return F.softplus(scores[1] - scores[0]).mean() + self.config.lightgcn.regularisation / 2 * norm / len(users)

    def step(self, picked: np.ndarray) -> float:
        users = self.users[picked]
        columns = users, self.items[picked], self.sampler.one_each(users, self.generator)
        loss = self.loss(*(torch.from_numpy(column.astype(np.int64)).to(self.device) for column in columns))
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())

    def epoch(self) -> None:
        order = self.generator.permutation(len(self.users))
        for start in range(0, len(order), PEER_BATCH):
            self.step(order[start : start + PEER_BATCH])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=30_000)
    parser.add_argument("--items", type=int, default=41_000)
    parser.add_argument("--interactions", type=int, default=800_000)
    parser.add_argument("--data", help="folder in MMRec layout: both are trained to their best")
    parser.add_argument("--batch-size", type=int, default=PEER_BATCH)
    parser.add_argument("--batches-per-step", type=int, default=4)
    parser.add_argument("--num-neighbours", type=int, help="ours propagates over sampled graphs")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=model_config().train.learning_rate)
    parser.add_argument("--peer-learning-rate", type=float, default=1e-3)
    parser.add_argument("--patience", type=int, default=model_config().train.patience)
    parser.add_argument("--num-epochs", type=int, default=1000, help="bound with --data")
    parser.add_argument("--steps", type=int, default=10, help="of each side")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--crane", action="store_true", help="with --whole")
    parser.add_argument("--whole-steps", type=int, help="of the epoch; all when absent")
    parser.add_argument("--whole-users", type=int, help="ranked; all when absent")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch's choice when absent")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = model_config(
        embedding_dim=args.dim,
        num_layers=args.layers,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        batches_per_step=args.batches_per_step,
        num_neighbours=args.num_neighbours,
        num_epochs=args.num_epochs if args.data else 1,
        patience=args.patience,
        seed=args.seed,
    )
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        if args.whole:
            result = run_whole(args, config, Path(folder), device)
        else:
            sizes = args.users, args.items, args.interactions
            interactions = load_dataset(args.data).interactions if args.data else synthetic(*sizes)
            worst = check(interactions, config, Path(folder), device)
            if not worst < LIMIT:
                print(f"The sides differ by {worst}, expected below {LIMIT}.", file=sys.stderr)
                return 1
            result = {"max_rel_difference": worst, **compare(interactions, args, config, Path(folder), device)}
            if args.data:
                result |= train_both(interactions, args, config, Path(folder), device)
    result |= {
        "peak_bytes": status_bytes("/proc/self/status", "VmHWM"),
        **origin("bench_train", device),
    }
    print(json.dumps(result))
    return 0


def check(interactions: Interactions, config: ModelConfig, folder: Path, device: torch.device) -> float:
    """Largest relative difference of propagated rows and of the gradient of one batch to those of the peer."""
    single = changed(config, batch_size=PEER_BATCH, batches_per_step=1)
    trainer = make_trainer(interactions, single, folder, device)
    peer = Peer(interactions, single, device)
    batch = trainer.batches.batch(
        np.arange(min(PEER_BATCH, len(trainer.batches.edges.users))), np.random.default_rng(0)
    )
    peer.loss(batch.users, batch.positives, batch.negatives).backward()
    views = trainer.model(trainer.graph)
    torch.stack(list(trainer.model.losses(views, batch).values())).sum().backward()
    assert peer.ids.grad is not None and trainer.model.ids.grad is not None
    pairs = (views.final.detach(), peer.rows().detach()), (trainer.model.ids.grad, peer.ids.grad)
    return max(float((found - expected).abs().max() / expected.abs().max()) for found, expected in pairs)


def compare(
    interactions: Interactions, args: argparse.Namespace, config: ModelConfig, folder: Path, device: torch.device
) -> dict[str, Any]:
    """Steps of both sides in turn, the first of each not counted."""
    trainer = make_trainer(interactions, config, folder, device)
    graph = trainer.epoch_graph()
    peer = Peer(interactions, changed(config, learning_rate=args.peer_learning_rate), device)
    generator = np.random.default_rng(0)
    size = min(config.train.batch_size * config.train.batches_per_step, len(trainer.batches.edges.users))

    def ours() -> int:
        picked = generator.permutation(len(trainer.batches.edges.users))[:size]
        trainer.step(graph, trainer.batches.of_step(picked, 0, 0), size)
        trainer.progress.step += 1
        return size

    def theirs() -> int:
        picked = generator.permutation(len(peer.users))[:PEER_BATCH]
        peer.step(picked)
        return len(picked)

    rates = {}
    sides = {"": ours, "peer_": theirs}
    done = {side: np.zeros(3) for side in sides}
    for turn in range(args.steps + 1):
        for side, step in sides.items():
            started, worked = time.perf_counter(), time.process_time()
            rows = step()
            wait_for(device)
            if turn:
                done[side] += rows, time.perf_counter() - started, time.process_time() - worked
    for side, (rows, seconds, cpu_seconds) in done.items():
        rates[f"{side}interactions_per_second"] = rows / seconds
        rates[f"{side}interactions_per_cpu_second"] = rows / cpu_seconds
        rates[f"{side}epoch_seconds"] = len(trainer.batches.edges.users) * seconds / rows
    return rates | {
        "peer": f"torch.sparse.mm over COO, {PEER_BATCH} interactions per propagation",
        "times": rates["interactions_per_second"] / rates["peer_interactions_per_second"],
        "cpu_times": rates["interactions_per_cpu_second"] / rates["peer_interactions_per_cpu_second"],
    }


def train_both(
    interactions: Interactions, args: argparse.Namespace, config: ModelConfig, folder: Path, device: torch.device
) -> dict[str, Any]:
    """Validation Recall@20 of both sides at their best epoch, and the seconds spent."""
    work = folder / "ours"
    work.mkdir()
    started = time.process_time()
    summary = make_trainer(interactions, config, work, device).run()
    seconds = {"ours": time.process_time() - started}
    peer = Peer(interactions, changed(config, learning_rate=args.peer_learning_rate), device)
    users = interactions.validation_users(config.train.validation_users, config.train.seed)
    best, best_epoch, epoch, started = -1.0, -1, 0, time.process_time()
    while epoch - best_epoch <= config.train.patience and epoch < config.train.num_epochs:
        peer.epoch()
        with torch.no_grad():
            rows = peer.rows().cpu()
        ranked = rank_users(dot_product(*rows.tensor_split([peer.num_users])), interactions.train, users, 20)
        recall = float(user_metrics(ranked, interactions.validation, users, (20,))["recall@20"].mean())
        if recall > best:
            best, best_epoch = recall, epoch
        epoch += 1
    seconds["peer"] = time.process_time() - started
    return {
        "recall@20": summary["validation"]["recall@20"],
        "ndcg@20": summary["validation"]["ndcg@20"],
        "num_epochs": summary["num_epochs"],
        "peer_recall@20": best,
        "peer_num_epochs": epoch,
        "training_cpu_seconds": seconds,
    }


def run_whole(args: argparse.Namespace, config: ModelConfig, folder: Path, device: torch.device) -> dict[str, Any]:
    """From Parquet shards to a ranking of all users."""
    parts: dict[str, dict[str, float]] = {"seconds": {}, "cpu_seconds": {}}
    clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
    before = {name: clock() for name, clock in clocks.items()}

    def part(name: str) -> None:
        for kind, clock in clocks.items():
            now = clock()
            parts[kind][name], before[kind] = round(now - before[kind], 1), now
        peak = status_bytes("/proc/self/status", "VmHWM") / 1e9
        times = " ".join(f"{kind}={values[name]}" for kind, values in parts.items())
        print(f"{name} {times} peak={peak:.2f}GB", file=sys.stderr, flush=True)

    artifact = write_shards(folder, args.users, args.items, args.interactions)
    part("write_shards")
    interactions = load_interactions(artifact)
    part("read_shards")
    trainer = make_trainer(interactions, config, folder, device, args.crane)
    part("adjacency_and_state")
    size = config.train.batch_size * config.train.batches_per_step
    num_steps = -(-len(trainer.batches.edges.users) // size)
    graph = trainer.epoch_graph()
    part("epoch_graph")
    order = trainer.batches.order(0)
    done = min(args.whole_steps or num_steps, num_steps)
    for step in range(done):
        trainer.progress.step = step
        picked = order[step * size :][:size]
        trainer.step(graph, trainer.batches.of_step(picked, 0, 0), len(picked))
        print(f"step={step + 1} of {num_steps} seconds={time.perf_counter() - before['seconds']:.0f}", file=sys.stderr)
    part("steps")
    trainer.progress.step += 1
    trainer.checkpoint()
    part("checkpoint")
    rankings = trainer.rankings()
    part("final_rows")
    ranking, _ = trainer.validation.best(rankings)
    users, items = rankings[ranking]
    part("validation")
    ranked, block = min(args.whole_users or args.users, args.users), max(1, SCORE_BYTES // (4 * args.items))
    for _ in rank_blocks(dot_product(users, items), interactions.train, np.arange(ranked), 20, block):
        pass
    part("rank")
    epochs = {kind: values["epoch_graph"] + values["steps"] * num_steps / done for kind, values in parts.items()}
    return {
        "epoch_seconds": epochs["seconds"],
        "epoch_cpu_seconds": epochs["cpu_seconds"],
        "rank_all_seconds": parts["seconds"]["rank"] * args.users / ranked,
        "rank_all_cpu_seconds": parts["cpu_seconds"]["rank"] * args.users / ranked,
        "interactions_per_second": len(trainer.batches.edges.users) / epochs["seconds"],
        "interactions": len(trainer.batches.edges.users),
        "steps": f"{done} of {num_steps}",
        "users_ranked": ranked,
        "loss": sum(trainer.progress.sums.values()) / done,
        "checkpoint_bytes": sum(path.stat().st_size for path in folder.glob("checkpoint-*/*")),
        "content": "random" if args.crane else None,
        **parts,
        "peer": None,
        "peer_interactions_per_second": None,
    }


def write_shards(folder: Path, num_users: int, num_items: int, num_interactions: int) -> Artifact:
    """The interactions as `etl.interactions` leaves them; a tenth of a thousandth of the rows is for validation."""
    (folder / "interactions").mkdir()
    generator, names = np.random.default_rng(1), []
    for number, (users, items) in enumerate(draw(num_users, num_items, num_interactions)):
        split = (generator.random(len(users)) < 1e-3).astype(np.int8)
        path = folder / "interactions" / f"part-{number}.parquet"
        columns = {USER_IDX: users, ITEM_IDX: items, SPLIT: split, WEIGHT: np.ones(len(users), np.float32)}
        times = pa.array(np.zeros(len(users), np.int64)).cast(pa.timestamp("us", "UTC"))
        pq.write_table(pa.table(columns | {EVENT_TIME: times}), path)
        names.append(f"interactions/{path.name}")
    return Artifact(folder, {"facts": {"num_users": num_users, "num_items": num_items}, "files": dict.fromkeys(names)})


if __name__ == "__main__":
    raise SystemExit(main())
