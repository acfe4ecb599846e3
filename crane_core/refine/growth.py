"""Refine only what is new or has changed since an earlier run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crane_core.dataset.modalities import Modality
from crane_core.storage.matrix import blocks, changed_rows, open_matrix

ANCHORS = 16_384
"""Items on whose rows the drift is measured; with a catalog no larger it is exact."""
MAX_CHANGED = 0.5
"""Where a larger share of the earlier items has other features, they are of another kind or measured otherwise: weights
fitted on the ones before say nothing about them, nor does the drift, which compares keys under these weights."""
MAX_GROWTH = 2
"""Times the items that RCA was built on; as many times `ANCHORS` is the largest sample the drift is measured on."""


@dataclass(frozen=True)
class Touched:
    """Numbers of the rows that are new or whose input has changed, ascending: int64."""

    items: np.ndarray
    users: np.ndarray


def touched(before: list[Modality], now: list[Modality]) -> Touched:
    """Compare the features and profiles of two runs under the same numbers."""
    pairs = list(zip(before, now, strict=True))
    items = [changed_rows(getattr(b, name), getattr(n, name)) for b, n in pairs for name in ("items", "present")]
    users = [changed_rows(getattr(b, name), getattr(n, name)) for b, n in pairs for name in ("profiles", "counts")]
    return Touched(*(np.flatnonzero(np.logical_or.reduce(masks)) for masks in (items, users)))


def outgrown(items: np.ndarray, num_before: int, num_built: int, num_items: int) -> bool:
    """Whether so much is new or changed that the weights are to be fitted anew, whatever the drift.

    Args:
        items: int, numbers of the items that are new or have changed, ascending.
        num_before, num_built, num_items: number of items in the run before, when RCA was built, and today.
    """
    num_changed = int(np.searchsorted(items, num_before))
    return num_changed > MAX_CHANGED * num_before or num_items > MAX_GROWTH * num_built


_COLUMNS = {"items": "items", "present": "items", "profiles": "users", "counts": "users"}
"""Parts of a modality to whose rows they are."""


def write_selected(modalities: list[Modality], rows: Touched, folder: Path) -> None:
    """Copy some rows of features and profiles into files, a block at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, modality in enumerate(modalities):
        for name, whose in _COLUMNS.items():
            source, which = getattr(modality, name), getattr(rows, whose)
            shape = (len(which), *source.shape[1:])
            target = np.lib.format.open_memmap(folder / f"{number}-{name}.npy", "w+", source.dtype, shape)
            for block in blocks(len(which), source[:1].nbytes):
                target[block] = source[which[block]]


def load_selected(modalities: list[Modality], folder: Path) -> list[Modality]:
    """The rows that were copied, memory-mapped."""
    return [
        Modality(modality.name, *(open_matrix(folder / f"{number}-{name}.npy") for name in _COLUMNS))
        for number, modality in enumerate(modalities)
    ]


def choose_anchors(num_items: int, seed: int) -> np.ndarray:
    """A random sample of the items, all of them when there are few: int64 [n], ascending."""
    generator = np.random.default_rng(seed)
    return np.sort(generator.choice(num_items, min(num_items, ANCHORS), replace=False))
