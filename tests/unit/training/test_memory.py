"""What a training is said to need in memory: refused in time, and true."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.errors import TrainingError
from crane_core.graph.item_graph import build_graph
from crane_core.model.content import Content
from crane_core.model.crane import Crane
from crane_core.model.lightgcn import LightGCN
from crane_core.model.propagation import SymmetricGraph
from crane_core.training import memory
from crane_core.training import trainer as training
from crane_core.training.memory import (
    batch_bytes,
    check_memory,
    edge_bytes,
    free_bytes,
    naming_out_of_memory,
    node_bytes,
)
from crane_core.training.trainer import Trainer
from tests.worlds.settings import changed, model_config
from tests.worlds.trainings import CPU, SMALL, Kind, trainer


def test_a_step_that_does_not_fit_is_refused_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model(batch_size: int, dim: int = 64) -> LightGCN:
        return LightGCN(100_000, 30_000, model_config(embedding_dim=dim, batch_size=batch_size))

    nodes, row = 8 * 130_000 * 64 * 4, 18 * 64 * 4
    edges = (16 + 20) * 1_000_000
    check_memory(model(100_000), 1_000_000, CPU, edges + nodes + 100_000 * row)
    with pytest.raises(
        TrainingError, match=r"130000 nodes and 0\.46 GB for 100000 interactions; 0\.34 GB are free"
    ) as caught:
        check_memory(model(100_000), 1_000_000, CPU, 300_000_000 + edges)
    fitting = (300_000_000 - nodes) // row
    assert f"train.batch_size to {fitting} or less" in caught.value.remedy
    check_memory(model(fitting), 1_000_000, CPU, 300_000_000 + edges)
    with pytest.raises(TrainingError):
        check_memory(model(fitting + 1), 1_000_000, CPU, 300_000_000 + edges)
    with pytest.raises(TrainingError, match=r"a machine's CPU, or set lightgcn.embedding_dim to 8 or less"):
        check_memory(model(100_000), 1_000_000, CPU, 100_000_000 + edges)
    check_memory(model(100_000, 8), 1_000_000, CPU, 100_000_000 + edges)
    with pytest.raises(TrainingError, match=r"a machine's CPU\."):
        check_memory(model(100_000), 1_000_000, CPU, 1_000_000)
    with pytest.raises(TrainingError, match=r"5\.60 GB: 3\.60 GB for 100000000 edges.*a machine's CPU\."):
        check_memory(model(1, 1), 100_000_000, CPU, 5_590_000_000)
    check_memory(model(1, 1), 100_000_000, CPU, 5_600_000_000)
    monkeypatch.setattr(training, "free_bytes", lambda _: 1000)
    with pytest.raises(TrainingError, match="72 nodes"):
        trainer(tmp_path)


def test_ranks_on_one_machine_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = trainer(tmp_path)
    dim = needed.config.lightgcn.embedding_dim
    enough = edge_bytes(needed.model, len(needed.batches.edges.items), CPU) + node_bytes(needed.model, dim)
    enough += batch_bytes(needed.model, needed.config.train.batch_size, dim)
    monkeypatch.setattr(training, "free_bytes", lambda _: 2 * enough)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    trainer(tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(TrainingError, match="are free"):
        trainer(tmp_path)


def test_memory_that_runs_out_is_a_typed_error() -> None:
    for allocate in (lambda: np.empty(2**60, np.uint8), lambda: torch.empty(2**60, dtype=torch.uint8)):
        with pytest.raises(TrainingError, match=r"Memory ran out: .*llocat"), naming_out_of_memory():
            allocate()
    with pytest.raises(RuntimeError, match=r"^another$"), naming_out_of_memory():
        raise RuntimeError("another")


def _held(name: str) -> int:
    """Bytes of this process, by their name in /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _peak_of_epochs(num_neighbours: int | None) -> tuple[int, int]:
    """Peak of a training of two epochs in a graph of two million edges, and the estimate."""
    torch.set_num_threads(1)
    num_users, num_items, generator = 20_000, 4_000, np.random.default_rng(0)
    pairs = np.unique(generator.integers(num_users * num_items, size=2_025_000))
    train = ItemLists.from_pairs(pairs // num_items, (pairs % num_items).astype(np.int32), num_users)
    del pairs
    held_out = ItemLists(np.arange(num_users + 1), np.zeros(num_users, dtype=np.int32))
    interactions = Interactions(num_users, num_items, train, held_out, held_out)
    # Ten batches share a propagation: memory holds what one of them needs.
    batches = {"batch_size": 100_000, "batches_per_step": 10}
    config = changed(SMALL, num_neighbours=num_neighbours, num_epochs=2, validation_users=100, **batches)
    model = LightGCN(num_users, num_items, config)
    model.edge_dropout = 0.1
    with tempfile.TemporaryDirectory() as work:
        trainer(Path(work), config=changed(SMALL, num_epochs=1)).run()
        Path("/proc/self/clear_refs").write_text("5")
        before = _held("VmRSS")
        Trainer(model, interactions, config, Path(tempfile.mkdtemp(dir=work)), CPU).run()
        taken = _held("VmHWM") - before
    edges, dim = edge_bytes(model, len(train.items), CPU), config.lightgcn.embedding_dim
    step = node_bytes(model, dim) + batch_bytes(model, config.train.batch_size, dim)
    return taken, edges + max(step, 20 * len(train.items))


def _peak_of_a_step(kind: Kind, contrast: Literal["same_kind", "both_kinds"], batch_size: int) -> tuple[int, int]:
    """Peak of the second step in a graph of 90,000 nodes over what was held before the first, and the estimate."""
    torch.set_num_threads(1)
    num_users, num_items, generator = 60_000, 30_000, np.random.default_rng(0)
    train = ItemLists(np.arange(num_users + 1), generator.integers(0, num_items, num_users, dtype=np.int32))
    interactions = Interactions(num_users, num_items, train, train, train)
    config = changed(SMALL, embedding_dim=64, batch_size=batch_size, contrast_negatives=contrast, num_negatives=1024)
    neighbours = generator.integers(0, num_items, (num_items, 5), dtype=np.int32)
    rows = torch.randn(num_items, 3, 64), torch.randn(num_users, 3, 64)
    content = Content(rows[0], SymmetricGraph(build_graph(neighbours), CPU), rows[1])
    sizes = num_users, num_items
    model = LightGCN(*sizes, config) if kind == "lightgcn" else Crane(*sizes, content, config)
    with tempfile.TemporaryDirectory() as work:
        # What torch loads and keeps for itself at its first step is not of this model's size.
        trainer(Path(work), config=changed(SMALL, num_epochs=1), kind=kind).run()
        ours = Trainer(model, interactions, config, Path(work) / "large", CPU)
    batch = ours.batches.batch(generator.permutation(num_users)[:batch_size], generator)
    Path("/proc/self/clear_refs").write_text("5")
    before = _held("VmRSS")
    for _ in range(2):
        ours.step(ours.graph, [batch], batch_size)
    return _held("VmHWM") - before, node_bytes(model, 64) + batch_bytes(model, batch_size, 64)


@pytest.fixture(scope="module")
def sparing() -> Iterator[Executor]:
    """A process whose allocator gives back at once what is freed.

    The gaps that glibc keeps otherwise would count too, by chance a third more or less.
    """
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process,
    ):
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        process.submit(int).result()
        patch.undo()
        yield process


def _forked(measure: Callable[..., tuple[int, int]], *arguments: Any) -> tuple[int, int]:
    """Measure in a process of its own, which has torch from its parent and nothing of other measurements."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
        return process.submit(measure, *arguments).result()


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process cannot be reset")
@pytest.mark.parametrize(
    ("peak", "arguments"),
    [
        (_peak_of_a_step, ("lightgcn", "same_kind", 20_000)),
        (_peak_of_a_step, ("crane", "same_kind", 5_000)),
        (_peak_of_a_step, ("crane", "both_kinds", 2_500)),
        (_peak_of_epochs, (None,)),
        (_peak_of_epochs, (20,)),
    ],
)
def test_training_takes_the_memory_it_is_said_to(
    peak: Callable[..., tuple[int, int]], arguments: tuple[Any, ...], sparing: Executor
) -> None:
    taken, estimated = sparing.submit(_forked, peak, *arguments).result(timeout=300)
    assert 0.6 < taken / estimated < 1


def test_pages_of_files_are_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    for name, text in (("max", "1000000"), ("current", "900000"), ("stat", "anon 300000\ninactive_file 500000")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_bytes(CPU) == 600_000
