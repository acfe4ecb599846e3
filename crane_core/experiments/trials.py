"""Trials kept as files. A trial is a model trained on a dataset by a recipe and a seed, with its metrics.

    {root}/cells/{key}/cell.json, users.npz     complete or absent
    {root}/work/{key}/                          checkpoints of a trial that is not finished
    {root}/work/lightgcn-{key}, content-{key}/  behavioural views and refined content, shared between trials

The key is a hash of the dataset's content, the model's name, the recipe, the seed, `models.VERSION` and the names of
the metrics. So a trial is trained once, and a trial of other data is never returned.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import math
import resource
import shutil
import time
import zipfile
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.errors import ConfigError
from crane_core.evaluation.cold import rank_cold
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import Scorer, rank_users
from crane_core.evaluation.slices import slices_of_test
from crane_core.experiments.data import Dataset, fingerprint, held
from crane_core.experiments.models import MODELS, VERSION, Recipe, version_of
from crane_core.storage.local import LocalStorage

logger = logging.getLogger(__name__)

KS = (5, 10, 20, 50)
_METRICS = tuple(f"{kind}@{k}" for k in KS for kind in ("recall", "ndcg"))
_MEASURED = {"validation": _METRICS, "test": _METRICS, "cold": (*_METRICS, "cold_auc")}
"""Metrics that every trial of this version keeps for every user, by part of the held-out rows. They enter the key."""
_ITEM_SLICES = ("head_items", "tail_items")

PerUser = dict[str, np.ndarray]
"""`users` int64 [n] and `recall@k`, `ndcg@k` float64 [n] each."""


@dataclass(frozen=True)
class Trial:
    """A model trained on a dataset by a recipe and a seed, measured.

    Attributes:
        key: identity.
        validation: metrics of the users with a validation item.
        test: metrics of the users with a test item; empty arrays where there is no test split.
        cold: metrics of the users with a cold test item, one without a training interaction. Only these items count as
            relevant; they are ranked in the whole catalog, and among the cold items by `evaluation.cold.rank_cold`.
        steering: validation Recall@20 that chose the best epoch or setting of the training.
        seconds: time for everything the model needs beyond the dataset.
        peak_bytes: memory the training took beyond what the process held before.
        facts: report of the training, JSON values.
        more: further parts: `head_items` and `tail_items`, slices of the test; `alone`, the test metrics of a fused
            model's own rows without LightGCN's. Trials of earlier revisions lack them, and `among_cold_recall@20` too.
    """

    key: str
    validation: PerUser
    test: PerUser
    cold: PerUser
    steering: float
    seconds: float
    peak_bytes: int
    facts: dict[str, Any]
    more: dict[str, PerUser] = field(default_factory=dict)

    def part(self, name: str) -> PerUser | None:
        """Return the metrics of a part by its name, None if the trial has none."""
        return getattr(self, name) if name in _MEASURED else self.more.get(name)

    def recall(self, split: str) -> float:
        """Return the mean Recall@20 over the users of `validation` or `test`; NaN if there are none."""
        values = getattr(self, split)["recall@20"]
        return float(values.mean()) if len(values) else math.nan


class Trials:
    """Trials in a folder. Processes may share it: when two need the same trial, the second waits for the first.

    Raises:
        ConfigError: there is no such folder and it cannot be created.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self.root} cannot be a folder for results: {error}.",
                "Give --out another folder, one that can be made and written.",
            ) from error
        self.storage = LocalStorage(self.root)

    def key(self, dataset: Dataset, model: str, recipe: Recipe, seed: int) -> str:
        """Return the identity of a trial, 32 hex digits."""
        settings = recipe.with_seed(seed).model_dump(mode="json")
        return fingerprint(version_of(recipe), _MEASURED, dataset.fingerprint, model, settings, seed)

    def find(self, dataset: Dataset, model: str, recipe: Recipe, seed: int) -> Trial | None:
        """Return the trial; None if it was not made, or its files are damaged."""
        key = self.key(dataset, model, recipe, seed)
        folder = self.root / "cells" / key
        if not folder.exists():
            return None
        try:
            known = json.loads((folder / "cell.json").read_text())
            parts: dict[str, PerUser] = {}
            with np.load(folder / "users.npz") as arrays:
                for path, values in arrays.items():
                    part, _, name = path.partition("/")
                    parts.setdefault(part, {})[name] = values
            return Trial(
                key,
                parts.pop("validation"),
                parts.pop("test"),
                parts.pop("cold"),
                known["steering"],
                known["seconds"],
                known["peak_bytes"],
                known["facts"],
                parts,
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            logger.warning("damaged trial=%s error=%s it will be made again", folder, error)
            return None

    def find_or_make(self, dataset: Dataset, model: str, recipe: Recipe, seed: int) -> Trial:
        """Return the trial. If there is none, train, rank the whole catalog for every held-out user, and write it.

        A training that was killed, or that ended with an exception, continues from its checkpoint.

        Raises:
            ConfigError: there is no such model.
            TrainingError: the loss is not finite.
        """
        if model not in MODELS:
            raise ConfigError(f"There is no model {model!r}.", f"Name one of the models {', '.join(MODELS)}.")
        key = self.key(dataset, model, recipe, seed)
        work = self.root / "work" / key
        with held(work):
            if self.find(dataset, model, recipe, seed) is None:
                shutil.rmtree(self.root / "cells" / key, ignore_errors=True)
                self._make(dataset, model, recipe.with_seed(seed), seed, key, work)
            shutil.rmtree(work)
        made = self.find(dataset, model, recipe, seed)
        assert made is not None
        return made

    def _make(self, dataset: Dataset, model: str, recipe: Recipe, seed: int, key: str, work: Path) -> None:
        started = time.monotonic()
        memory = PeakMemory()
        trained = MODELS[model](dataset, recipe, work)
        peak = memory.peak()
        interactions = dataset.interactions
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        columns = {
            f"{part}/{name}": values
            for part, measured in measure(trained.score, interactions, trained.alone).items()
            for name, values in measured.items()
        }
        np.savez(out / "users.npz", **columns)  # type: ignore[arg-type]
        known = {
            "dataset": dataset.name,
            "dataset_fingerprint": dataset.fingerprint,
            "model": model,
            "seed": seed,
            "recipe": recipe.model_dump(mode="json"),
            "version": VERSION,
            "steering": trained.validation,
            "seconds": round(trained.seconds, 3),
            "peak_bytes": peak,
            "facts": trained.facts,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (out / "cell.json").write_text(json.dumps(known, indent=1))
        self.storage.publish(out, f"cells/{key}")
        logger.info("trial key=%s model=%s seed=%d seconds=%.1f", key, model, seed, time.monotonic() - started)


def measure(score: Scorer, interactions: Interactions, alone: Scorer | None = None) -> dict[str, PerUser]:
    """Return metrics of every user with a held-out item. The whole catalog is ranked, training items are masked.

    Args:
        score: scores of the model.
        interactions: train, validation and test.
        alone: scores of a fused model's own rows without LightGCN's.

    Returns:
        The parts of a `Trial`, with the part `alone` if `alone` is given.
    """
    parts = slices_of_test(interactions)
    measured = _metrics(score, interactions.train, {"validation": interactions.validation})
    of_test = {"test": interactions.test, "cold": parts["cold_items"]} | {name: parts[name] for name in _ITEM_SLICES}
    measured |= _metrics(score, interactions.train, of_test)
    measured["cold"] |= rank_cold(score, interactions, measured["cold"]["users"])
    if alone:
        measured |= _metrics(alone, interactions.train, {"alone": interactions.test})
    return measured


def _metrics(score: Scorer, seen: ItemLists, parts: dict[str, ItemLists]) -> dict[str, PerUser]:
    """Return metrics of the users of each part. The first part must hold the users of all the others."""
    asked = np.flatnonzero(next(iter(parts.values())).counts() > 0)
    ranked = rank_users(score, seen, asked, max(KS))
    measured = {}
    for part, lists in parts.items():
        inside = lists.counts()[asked] > 0
        users = asked[inside]
        measured[part] = {"users": users, **user_metrics(ranked[inside], lists, users, KS)}
    return measured


class PeakMemory:
    """Peak memory of this process since the object was made, beyond what it held then.

    Linux resets its high-water mark on request. Elsewhere the mark of the whole process is compared, so that work
    that needs less memory than earlier work shows 0.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            # Freed memory that the allocator keeps would be used first, and the next work would seem to need less.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _high_water()

    def peak(self) -> int:
        """Return the peak in bytes."""
        return _high_water() - self._before


def _high_water() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
