"""One training and its measure as a file: a cell is made once, found again, and never served for other data.

    {root}/cells/{key}/cell.json, users.npz     complete or absent
    {root}/work/{key}/                          checkpoints of a cell in the making
    {root}/work/lightgcn-{key}, content-{key}/  behavioural views and refined content, shared between cells

The key covers the content of the dataset, the model's name, the recipe, the seed, `harness.VERSION` and what is
measured.
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
"""What every cell of this version keeps of every user, by part of the held-out rows; it is in the key."""
_ITEM_SLICES = ("head_items", "tail_items")

PerUser = dict[str, np.ndarray]
"""`users` int64 [n] and `recall@k`, `ndcg@k` float64 [n] each."""


@dataclass(frozen=True)
class Cell:
    """A model trained on a dataset by a recipe and a seed, measured.

    Attributes:
        key: identity.
        validation: metrics of the users with a validation item.
        test: metrics of the users with a test item; empty arrays where there is no test split.
        cold: of the users with a test item that has no training interaction, metrics of these items in the whole
            catalog, and among the cold items what `evaluation.rank_cold` returns.
        steering: validation Recall@20 that the training itself steered by.
        seconds: of everything the model needed beyond the dataset.
        peak_bytes: memory the training took beyond what the process held before.
        facts: what the training reports about itself.
        more: what cells made by earlier revisions of this version lack, as they lack `among_cold_recall@20`: of the
            test, the slices `head_items` and `tail_items`, and `alone`, the rows of a fused model without LightGCN's.
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
        """The metrics of a part by its name, None where the cell has none."""
        return getattr(self, name) if name in _MEASURED else self.more.get(name)

    def recall(self, split: str) -> float:
        """Mean Recall@20 over the users of `validation` or `test`; NaN where there are none."""
        values = getattr(self, split)["recall@20"]
        return float(values.mean()) if len(values) else math.nan


class Cells:
    """Cells in a folder. Any number of processes may share it: the second one waits for the first one's cell.

    Raises:
        ConfigError: there is no such folder and it cannot be made.
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
        """Identity of a cell."""
        settings = recipe.with_seed(seed).model_dump(mode="json")
        return fingerprint(version_of(recipe), _MEASURED, dataset.fingerprint, model, settings, seed)

    def find(self, dataset: Dataset, model: str, recipe: Recipe, seed: int) -> Cell | None:
        """The cell, where it has been made; one whose files are damaged has not, and is made again."""
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
            return Cell(
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
            logger.warning("damaged cell=%s error=%s it is made again", folder, error)
            return None

    def cell(self, dataset: Dataset, model: str, recipe: Recipe, seed: int) -> Cell:
        """Find the cell or make it: train, rank the whole catalog for every held-out user, write.

        A training that was killed, or left by any exception, goes on from its checkpoint.

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
        logger.info("cell key=%s model=%s seed=%d seconds=%.1f", key, model, seed, time.monotonic() - started)


def measure(score: Scorer, interactions: Interactions, alone: Scorer | None = None) -> dict[str, PerUser]:
    """Metrics of every user with a held-out item, the whole catalog ranked, training items masked.

    Args:
        score: of the model.
        interactions: of the dataset.
        alone: of a fused model's rows without LightGCN's.

    Returns:
        The parts of a `Cell`, `alone` among them where it is given.
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
    """Metrics of the users of each part; the first holds the users of all, and is what is ranked for."""
    asked = np.flatnonzero(next(iter(parts.values())).counts() > 0)
    ranked = rank_users(score, seen, asked, max(KS))
    measured = {}
    for part, lists in parts.items():
        inside = lists.counts()[asked] > 0
        users = asked[inside]
        measured[part] = {"users": users, **user_metrics(ranked[inside], lists, users, KS)}
    return measured


class PeakMemory:
    """The most memory this process has held since, beyond what it held at the start.

    Linux forgets its high-water mark on request. Where it does not, the mark of the whole process is compared: then
    a smaller piece of work after a larger one shows 0.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            # Freed memory that the allocator still keeps would hide what is needed next.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _high_water()

    def peak(self) -> int:
        """Bytes."""
        return _high_water() - self._before


def _high_water() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
