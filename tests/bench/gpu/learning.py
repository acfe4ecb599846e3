"""Propagation, fitting, training and ranking on a GPU against the CPU."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crane_core.config import Knn, Phi, Refine
from crane_core.dataset.modalities import Modality
from crane_core.evaluation.ranking import users_at_a_time
from crane_core.model.content import JointContent
from crane_core.model.crane import Crane
from crane_core.model.propagation import SymmetricGraph
from crane_core.model.sharding import Shards
from crane_core.model.user_item_graph import Edges, user_item_graph
from crane_core.model_config import ModelConfig
from crane_core.refine.catalog import refine_to_files, refined_files
from crane_core.refine.fit import fit
from crane_core.refine.refiner import Refiner, profile_scales
from crane_core.storage.matrix import open_matrix
from crane_core.training.trainer import Trainer
from tests.bench import bench_rank
from tests.bench.device import synthetic
from tests.bench.gpu.plan import Plan, Row, compared, distance, plain_cpu, skipped, worst
from tests.bench.trainers import make_trainer
from tests.worlds.planted import REFINE, checkerboard, planted_modalities
from tests.worlds.settings import changed, model_config

CPU = torch.device("cpu")
FORMS: dict[str, dict[str, Any]] = {
    "LightGCN": {},
    "CRANE": {},
    "CRANE, users against items": {"contrast_negatives": "both_kinds"},
    "CRANE, BPR": {"loss": "bpr", "semantic_users": "profiles", "semantic_weight": "scale", "edge_dropout": 0.0},
    "CRANE, sampled graph": {"num_neighbours": 3},
}
Make = Callable[[Path, torch.device], Trainer]


def run(plan: Plan) -> Iterator[Row]:
    """Compare one part of learning after the other."""
    yield from propagation(plan)
    world = synthetic(*plan.pick((3000, 2000, 60_000), (40, 30, 300)))
    for name, fields in FORMS.items():
        config = model_config(batch_size=64, batches_per_step=3, embedding_dim=plan.pick(64, 8), **fields)

        def make(
            folder: Path, device: torch.device, config: ModelConfig = config, crane: bool = name != "LightGCN"
        ) -> Trainer:
            return make_trainer(world, config, folder, device, crane)

        yield from one_step(plan, name, make)
    yield from whole_training(plan)
    yield from fitting(plan)
    yield from ranking(plan)


def propagation(plan: Plan) -> Iterator[Row]:
    """Compare products and gradients with scipy's in float64; one item has met nearly every user, some none."""
    num_users, num_items, num_pairs = plan.pick((50_000, 3000, 400_000), (60, 20, 200))
    generator = np.random.default_rng(plan.seed)
    users, items = generator.integers(num_users - 5, size=num_pairs), generator.integers(1, num_items - 5, num_pairs)
    users = np.concatenate([users, np.arange(num_users - 5)])
    items = np.concatenate([items, np.zeros(num_users - 5, dtype=np.int64)])
    users, items = np.unique(np.stack([users, items]), axis=1).astype(np.int32)
    matrix = user_item_graph(Edges(users, items), Shards((num_users, num_items)))
    rows, incoming = (plan.normal(salt, matrix.shape[0], 64) for salt in (1, 2))
    exact = matrix.astype(np.float64)
    errors = {}
    for resident in (True, False):
        graph = SymmetricGraph(matrix, plan.device, resident=resident)
        given = plan.leaf(rows)
        product = graph @ given
        product.backward(incoming.to(plan.device))
        expected = torch.from_numpy(exact @ rows.double().numpy())
        errors[f"product, resident={resident}"] = distance(product, expected)
        expected = torch.from_numpy(exact @ incoming.double().numpy())
        errors[f"gradient, resident={resident}"] = distance(given.grad, expected)
    name, error = worst(errors)
    yield compared("propagation", error, 1e-5, worst=name)


def one_step(plan: Plan, name: str, make: Make) -> Iterator[Row]:
    """Compare losses and gradients of a step with those on the CPU; then two runs of it, bit for bit."""
    losses, gradients, weights = [], [], []
    for number, device in enumerate((CPU, plan.device, plan.device)):
        with tempfile.TemporaryDirectory() as folder, nullcontext() if number else plain_cpu():
            trainer = make(Path(folder), device)
            graph, order = trainer.epoch_graph(), trainer.batches.order(0)
            picked = order[: trainer.batches.step_size]
            trainer.step(graph, trainer.batches.of_step(picked, 0, 0), len(picked))
            losses.append(dict(trainer.progress.sums))
            named = trainer.model.named_parameters()
            gradients.append({key: each.grad.cpu() for key, each in named if each.grad is not None})
            weights.append({key: value.cpu() for key, value in trainer.model.state_dict().items()})
    errors = {f"gradient of {key}": distance(each, gradients[0][key]) for key, each in gradients[1].items()}
    errors |= {key: abs(value / losses[0][key] - 1) for key, value in losses[1].items() if losses[0][key]}
    key, error = worst(errors)
    yield compared(f"a step of {name}", error, 1e-4, worst=key)
    different = sum(not torch.equal(value, weights[2][key]) for key, value in weights[1].items())
    yield compared(f"a step of {name}, twice: tensors that differ", different, 0)


def whole_training(plan: Plan) -> Iterator[Row]:
    """Train two epochs, and the same with a stop after the first; compare bits, and the recall with that on the CPU."""
    interactions = checkerboard()
    for crane in (False, True):
        config = model_config(num_epochs=2, batch_size=32, embedding_dim=16, checkpoint_steps=2)
        results = []
        for device, stops in ((CPU, False), (plan.device, False), (plan.device, True)):
            with tempfile.TemporaryDirectory() as folder:
                if stops:
                    make_trainer(interactions, changed(config, num_epochs=1), Path(folder), device, crane).run()
                trainer = make_trainer(interactions, config, Path(folder), device, crane)
                summary = trainer.run()
                results.append((summary["validation"]["recall@20"], trainer.best_rows()))
        name = "CRANE" if crane else "LightGCN"
        rows = [torch.cat(rows) for _, rows in results]
        yield compared(f"two epochs of {name}: rows", distance(rows[1], rows[0]), 5e-2)
        yield compared(f"two epochs of {name}: recall", abs(results[1][0] - results[0][0]), 0.05)
        yield compared(f"{name} gone on from a checkpoint: rows that differ", float((rows[1] != rows[2]).sum()), 0)


def fitting(plan: Plan) -> Iterator[Row]:
    """Fit a refiner for a few steps and run the catalog through it, for every correlation function."""
    modalities, train = planted_modalities(), checkerboard().train
    phis: tuple[Phi, ...] = ("softmax", "tanh", "linear", "block", "landmark")
    for phi in phis:
        sizes = {"num_steps": plan.pick(3, 1), "chunk_size": plan.pick(7, 64), "num_lists": 3, "num_probes": 3}
        config = REFINE.model_copy(update={"phi": phi, **sizes})
        with plain_cpu():
            refiner, expected = fit(modalities, train, "sum", config, CPU)
            rows = refined(refiner, modalities, config.chunk_size)
        _, found = fit(modalities, train, "sum", config, plan.device)
        error = abs(found["curve"][0]["ranking"] / expected["curve"][0]["ranking"] - 1)
        yield compared(f"fit with {phi}: loss of the first step", error, 1e-4)
        # The weights of the CPU, so that rounding in the fit is no part of the comparison.
        moved = refined(refiner.to(plan.device), modalities, config.chunk_size)
        name, error = worst({name: distance(moved[name], rows[name]) for name in rows})
        yield compared(f"catalog refined to files with {phi}", error, 1e-4, worst=name)


def refined(refiner: Refiner, modalities: list[Modality], chunk_size: int) -> dict[str, Tensor]:
    """Return the refined rows of items and users, by way of files."""
    with tempfile.TemporaryDirectory() as folder:
        refine_to_files(refiner, modalities, chunk_size, Path(folder))
        files = refined_files(Path(folder), len(refiner.rca.recursions))
        return {name: torch.from_numpy(np.array(open_matrix(path))) for name, path in files.items()}


def ranking(plan: Plan) -> Iterator[Row]:
    """Compare the lists of some users with a sort of float64 scores; items of the history must be left out."""
    num_users, num_items, k = plan.pick((300, 50_000, 20), (20, 3000, 5))
    users, items = (plan.normal(salt, size, 64).to(plan.device) for salt, size in ((5, num_users), (6, num_items)))
    seen = bench_rank.histories(num_users, num_items, 40)
    for block in (7, users_at_a_time(num_items)):
        error = bench_rank.check(users, items, seen, k, block)
        yield compared(f"lists of users, {block} at a time: scores", error, bench_rank.LIMIT)


def run_joint(plan: Plan) -> Iterator[Row]:
    """Compare a step of CRANE whose content learns with it, through RCA; it searches neighbours with faiss."""
    if importlib.util.find_spec("faiss") is None:
        yield skipped("joint training", "faiss is not installed, with which joint content finds its neighbours")
        return
    interactions = checkerboard()
    for phi in ("softmax", "tanh", "block", "landmark", "linear"):
        refine = REFINE.model_copy(update={"phi": phi, "num_lists": 3, "num_probes": 3, "chunk_size": 64})

        def make(folder: Path, device: torch.device, refine: Refine = refine) -> Trainer:
            config = model_config(batch_size=64, batches_per_step=2, embedding_dim=8, mode="joint")
            modalities = planted_modalities()
            refiner = Refiner([each.items.shape[1] for each in modalities], profile_scales(modalities), refine)
            content = JointContent(modalities, refiner, refine, Knn(k=4), config.crane, device)
            sizes = interactions.num_users, interactions.num_items
            return Trainer(Crane(*sizes, content, config), interactions, config, folder, device)

        yield from one_step(plan, f"joint CRANE with {phi}", make)
