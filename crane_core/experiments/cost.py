"""Measure RCA: time, memory and error of each correlation function, and their growth with the catalog."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crane_core.config import Phi
from crane_core.dataset.modalities import Modality
from crane_core.experiments.data import Dataset, fingerprint
from crane_core.experiments.models import VERSION, Recipe
from crane_core.experiments.trials import PeakMemory, Trials
from crane_core.refine.catalog import refine_catalog
from crane_core.refine.fit import fit
from crane_core.refine.refiner import Refiner

logger = logging.getLogger(__name__)

EXACT: tuple[Phi, ...] = ("softmax", "tanh", "linear")
"""Forms that attend to every key; any other one approximates softmax."""

MOST_SECONDS = 60.0
"""Longest expected time of a measurement; a larger catalog is not measured."""

_SMALLEST, _LARGEST_AT_LEAST = 1024, 16384
_FIT_STEPS = 50
_USERS = 1000


@dataclass(frozen=True)
class PowerLaw:
    """`value = constant * size ** exponent`, least squares on logarithms.

    Attributes:
        exponent, constant: parameters of the law.
        r_squared: share of the variance of the logarithms that the law explains.
    """

    exponent: float
    constant: float
    r_squared: float


def fit_power_law(sizes: Sequence[float], values: Sequence[float]) -> PowerLaw | None:
    """Fit the law to the positive values; None if fewer than three are positive."""
    kept = [(size, value) for size, value in zip(sizes, values, strict=True) if size > 0 and value > 0]
    if len(kept) < 3:
        return None
    x, y = np.log(np.array(kept, dtype=np.float64)).T
    exponent, offset = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    residual = float(((y - exponent * x - offset) ** 2).sum())
    return PowerLaw(float(exponent), float(np.exp(offset)), 1 - residual / spread if spread > 0 else 1.0)


def catalog_sizes(num_items: int) -> list[int]:
    """Return powers of two from 1,024 to at least four times the catalog and at least 16,384."""
    sizes = [_SMALLEST]
    while sizes[-1] < max(4 * num_items, _LARGEST_AT_LEAST):
        sizes.append(2 * sizes[-1])
    return sizes


class Measurements:
    """Measurements kept as JSON files beside the trials; each is taken once."""

    def __init__(self, trials: Trials) -> None:
        self.storage = trials.storage

    def find(self, *identity: Any) -> dict[str, Any] | None:
        """Return a measurement; None if it was not taken, or its file is damaged."""
        key = f"measurements/{fingerprint(VERSION, *identity)}.json"
        data = self.storage.read(key)
        if data is None:
            return None
        try:
            found = json.loads(data)
            return {**found, "load": found["load"]}
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("damaged measurement=%s error=%s it will be taken again", self.storage.root / key, error)
            return None

    def take(self, work: Callable[[], dict[str, Any]], *identity: Any) -> dict[str, Any]:
        """Return a measurement; if there is none, take it and keep it."""
        found = self.find(*identity)
        if found is None:
            # Other processes make the measured time longer, so the page names the load.
            found = {**work(), "load": os.getloadavg()[0], "cores": os.cpu_count()}
            key = f"measurements/{fingerprint(VERSION, *identity)}.json"
            self.storage.write(key, json.dumps({**found, "identity": identity}).encode())
        return found


class SameWeights:
    """Compare the correlation functions on one set of fitted weights and the same rows.

    Args:
        dataset: features and interactions.
        recipe: sizes and seed; at least one recursion is used.
    """

    def __init__(self, dataset: Dataset, recipe: Recipe) -> None:
        # The weights are fitted with softmax, because the sparse forms approximate its scores. A few steps are enough.
        steps = min(recipe.refine.num_steps, _FIT_STEPS)
        changes = {"phi": "softmax", "num_steps": steps, "num_recursions": max(1, recipe.refine.num_recursions)}
        self.config = recipe.refine.model_copy(update=changes)
        self.modalities: list[Modality] = dataset.modalities(recipe.features, recipe.profiles.aggregate)
        self.refiner, _ = fit(self.modalities, dataset.interactions.train, recipe.profiles.aggregate, self.config)
        flat = self._refiner(num_recursions=0)
        self._start = refine_catalog(flat, self.modalities, self.config.chunk_size)[:2]
        users = len(self._start[1])
        self._users = np.sort(np.random.default_rng(0).choice(users, min(users, _USERS), replace=False))
        self._references: dict[Phi, Tensor] = {}

    def measure(self, phi: Phi) -> dict[str, Any]:
        """Measure seconds and bytes of one pass of all rows, and the error of what the recursions add."""
        refiner = self._refiner(phi=phi)
        memory = PeakMemory()
        (items, users, _), seconds = _fastest(lambda: refine_catalog(refiner, self.modalities, self.config.chunk_size))
        peak = memory.peak()
        against: Phi = phi if phi in EXACT else "softmax"
        start, reference = self._stack(*self._start).double(), self._reference(against)
        added = float((reference - start).norm())
        error = float((self._stack(items, users).double() - reference).norm())
        return {
            "phi": phi,
            "against": against,
            "seconds": seconds,
            "peak_bytes": peak,
            "error": error / added if added > 0 else None,
            "rows": len(items) + len(users),
        }

    @torch.no_grad()
    def _reference(self, phi: Phi) -> Tensor:
        """Return refined rows in float64."""
        if phi not in self._references:
            rca = self._refiner(phi=phi).rca.double()
            items, users = self._start
            self._references[phi] = torch.cat(rca(items.double(), users[self._users].double(), 1024))
        return self._references[phi]

    def _refiner(self, **changes: Any) -> Refiner:
        """Return the fitted weights with another phi, or without recursions."""
        config = self.config.model_copy(update=changes)
        widths = [modality.items.shape[1] for modality in self.modalities]
        refiner = Refiner(widths, self.refiner.get_buffer("profile_scales").tolist(), config)
        known = refiner.state_dict()
        refiner.load_state_dict({name: value for name, value in self.refiner.state_dict().items() if name in known})
        return refiner.eval()

    def _stack(self, items: Tensor, users: Tensor) -> Tensor:
        return torch.cat([items, users[self._users]])


@torch.no_grad()
def measure_growth(phi: Phi, num_items: int, num_modalities: int, recipe: Recipe) -> dict[str, Any]:
    """Measure seconds and bytes of RCA over random item rows. Every item is a query.

    Args:
        phi: correlation function.
        num_items: rows.
        num_modalities: M.
        recipe: width, recursions and chunk size.
    """
    config = recipe.refine
    changes = {"phi": phi, "num_recursions": max(1, config.num_recursions)}
    rca = Refiner([1] * num_modalities, [1.0] * num_modalities, config.model_copy(update=changes)).rca
    generator = torch.Generator().manual_seed(config.seed)
    rows = torch.randn(num_items, num_modalities, config.embedding_dim, generator=generator)
    rca(rows[:256], rows[:1], config.chunk_size)
    memory = PeakMemory()
    _, seconds = _fastest(lambda: rca(rows, rows[:1], config.chunk_size))
    return {"phi": phi, "items": num_items, "seconds": seconds, "peak_bytes": memory.peak()}


def _fastest(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of the work and its shortest time: of one run, or of up to three within a second."""
    taken: list[float] = []
    while not taken or (len(taken) < 3 and sum(taken) < 1):
        started = time.monotonic()
        result = work()
        taken.append(time.monotonic() - started)
    return result, min(taken)
