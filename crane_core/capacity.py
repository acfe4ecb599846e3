"""Formulas for the memory, storage and seconds of each stage; their constants were measured (capacity.json).

Memory and storage are sums of terms, each a number of bytes that follows from shapes (a float32 matrix of the users'
rows, say) times a measured factor: 1 where the stage holds it once. `tests/bench/bench_capacity.py` measures runs and
fits the factors.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from crane_core.config import Evaluate, Export, Knn, Refine
from crane_core.errors import ConfigError
from crane_core.model_config import LightGCNSettings, Train

GPU_BYTES = 40 * 1024**3
EPOCH_SECONDS = 3600
"""Processor seconds of an epoch above which the steps of the preset `million` are recommended."""
SHARD_ITEMS = 250_000
SPARK_HEAP = 1024**3
"""`runtime.spark_memory` as it is shipped."""


@dataclass(frozen=True)
class Size:
    """Size of a run.

    Attributes:
        users, items: rows after the k-core.
        interactions: rows read.
        dims: width of each modality.
        refined_dim, embedding_dim, k: of the configuration.
        num_recommendations, num_similar, user_block: likewise.
        step_interactions: training interactions that share a step.
    """

    users: int
    items: int
    interactions: int
    dims: tuple[int, ...]
    refined_dim: int = Refine().embedding_dim
    embedding_dim: int = LightGCNSettings().embedding_dim
    k: int = Knn().k
    num_recommendations: int = Export().k
    num_similar: int = Export().num_similar
    user_block: int = Evaluate().user_block
    step_interactions: int = Train().batch_size * Train().batches_per_step

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in asdict(self).items() if name != "dims"}
        wrong = [f"{name}={value}" for name, value in numbers.items() if value < 1]
        wrong += [f"dims={list(self.dims)}"] if not self.dims or min(self.dims) < 1 else []
        if wrong:
            raise ConfigError(
                f"{', '.join(wrong)}: a run needs at least one of each.",
                "Give --users, --items, --interactions and the width of every modality as numbers of 1 or more.",
            )


TERMS: dict[str, Callable[[Size], float]] = {
    "1": lambda size: 1,
    "interactions": lambda size: size.interactions,
    "interactions steps": lambda size: size.interactions * math.ceil(size.interactions / size.step_interactions),
    "users": lambda size: size.users,
    "items": lambda size: size.items,
    "4 items dims": lambda size: 4 * size.items * sum(size.dims),
    "4 users dims": lambda size: 4 * size.users * sum(size.dims),
    "4 (users + items) (modalities + 1) refined_dim": lambda size: (
        4 * (size.users + size.items) * (len(size.dims) + 1) * size.refined_dim
    ),
    "4 items refined_dim": lambda size: 4 * size.items * size.refined_dim,
    "8 items k": lambda size: 8 * size.items * size.k,
    "4 (users + items) embedding_dim": lambda size: 4 * (size.users + size.items) * size.embedding_dim,
    "4 users_ranked_at_a_time items": lambda size: 4 * min(size.users, size.user_block) * size.items,
    "users num_recommendations": lambda size: size.users * min(size.num_recommendations, size.items),
    "items num_similar": lambda size: size.items * min(size.num_similar, size.items),
    "8 items embedding_dim": lambda size: 8 * size.items * size.embedding_dim,
}
"""Terms that memory and storage grow with: formula to its value, in bytes or rows."""

FORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "etl.interactions": {"memory": ("1", "interactions"), "storage": ("1", "interactions", "items")},
    "etl.features": {"memory": ("1", "4 items dims"), "storage": ("1", "4 items dims")},
    "etl.profiles": {"memory": ("1", "4 users dims", "4 items dims"), "storage": ("1", "4 users dims")},
    "ml.refine": {
        "memory": ("1", "4 (users + items) (modalities + 1) refined_dim", "4 items dims", "4 users dims"),
        "storage": ("1", "4 (users + items) (modalities + 1) refined_dim"),
    },
    "ml.knn": {"memory": ("1", "4 items refined_dim"), "storage": ("1", "8 items k")},
    "ml.graph": {"memory": ("1", "4 items refined_dim"), "storage": ("1", "8 items k")},
    "ml.behaviour": {
        "memory": ("1", "4 (users + items) embedding_dim", "interactions"),
        "storage": ("1", "4 (users + items) embedding_dim"),
    },
    "ml.train": {
        "memory": ("1", "4 (users + items) embedding_dim", "interactions"),
        "storage": ("1", "4 (users + items) embedding_dim"),
    },
    "ml.evaluate": {
        "memory": ("1", "4 (users + items) embedding_dim", "4 users_ranked_at_a_time items"),
        "storage": ("1", "users"),
    },
    "ml.export": {
        "memory": ("1", "4 (users + items) embedding_dim", "8 items embedding_dim"),
        "storage": ("1", "users num_recommendations", "items num_similar", "8 items embedding_dim"),
    },
}
"""Stage to the terms of its peak memory and of its artifact."""

WORK: dict[str, str] = {
    "ml.behaviour": "interactions steps",
    "ml.train": "interactions steps",
}
"""Stages whose seconds are worth an estimate, and what an epoch grows with: every step propagates the whole graph."""


def estimate(size: Size, constants: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Estimate peak memory, storage and seconds of every stage, and give the formulas.

    Args:
        size: of the run.
        constants: as `load_constants` returns, the shipped ones when None.

    Returns:
        Stage to `memory_bytes` (of one process), `storage_bytes`, `epoch_core_seconds` (None where it was not
        measured), `memory_formula` and `storage_formula`.
    """
    stages = (constants or load_constants())["stages"]
    found = {}
    for stage, forms in FORMS.items():
        values: dict[str, Any] = {}
        for what, terms in forms.items():
            factors = stages[stage][what]
            amount = sum(factors[term] * TERMS[term](size) for term in terms)
            formula = " + ".join(
                f"{factors[term]:.4g}" + ("" if term == "1" else f" x {term}") for term in terms if factors[term]
            )
            if what == "memory" and stage.startswith("etl."):
                # Spark spills once its heap is full.
                amount = min(amount, factors["1"] + SPARK_HEAP)
                formula += f", at most {factors['1']:.4g} + runtime.spark_memory"
            values[f"{what}_bytes"], values[f"{what}_formula"] = round(amount), formula
        per_pass = stages[stage].get("core_seconds_per_pass")
        values["epoch_core_seconds"] = None if per_pass is None else per_pass * TERMS[WORK[stage]](size)
        found[stage] = values
    return found


def recommend(size: Size, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Recommend a preset and the settings that keep every stage within its bounds.

    Args:
        size: of the run.
        stages: as `estimate` returns.
    """
    training = stages["ml.train"]["memory_bytes"]
    return {
        "preset": "million" if stages["ml.train"]["epoch_core_seconds"] > EPOCH_SECONDS else "staged",
        "settings": {"knn.num_shards": max(1, math.ceil(size.items / SHARD_ITEMS))},
        "overlay": "small" if training <= 8 * 1024**3 else "large",
        "gpus_by_memory": math.ceil(training / GPU_BYTES),
    }


def beyond_measured(size: Size, constants: Mapping[str, Any] | None = None) -> float:
    """Return the size of the run divided by that of the largest measured run."""
    measured = (constants or load_constants())["measured"]
    return max(getattr(size, name) / max(run[name] for run in measured) for name in ("users", "items", "interactions"))


def load_constants() -> dict[str, Any]:
    """Load the shipped constants: the factors of each stage's terms, and the measurements behind them."""
    return json.loads((importlib.resources.files("crane_core") / "capacity.json").read_text())


def fit(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fit the factors of the terms to measured runs: least squares of relative errors, no factor below 0.

    Args:
        runs: as `bench_capacity` prints them.
    """
    import numpy as np
    from scipy.optimize import nnls

    stages: dict[str, Any] = {}
    for stage, forms in FORMS.items():
        stages[stage] = {}
        finished = [run for run in runs if stage in run["stages"]]
        sizes = [Size(run["users"], run["items"], run["interactions"], tuple(run["dims"])) for run in finished]
        for what, terms in forms.items():
            key = "peak_bytes" if what == "memory" else "bytes"
            measured = np.array([run["stages"][stage][key] for run in finished], dtype=np.float64)
            matrix = np.array([[TERMS[term](size) for term in terms] for size in sizes], dtype=np.float64)
            scale = matrix.max(axis=0)
            factors, _ = nnls(matrix / scale / measured[:, None], np.ones(len(finished)))
            stages[stage][what] = {
                term: float(f"{factor / by:.4g}") for term, factor, by in zip(terms, factors, scale, strict=True)
            }
        if stage in WORK:
            # The largest run: the smaller ones mostly start up.
            timed = [
                (size, run)
                for size, run in zip(sizes, finished, strict=True)
                if "epoch_core_seconds" in run["stages"][stage]
            ]
            size, run = max(timed, key=lambda each: each[0].interactions)
            seconds = run["stages"][stage]["epoch_core_seconds"] / TERMS[WORK[stage]](size)
            stages[stage]["core_seconds_per_pass"] = float(f"{seconds:.4g}")
    return {"stages": stages, "measured": [dict(run) for run in runs]}
