"""Refine only the rows that are new or have changed since an earlier run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crane_core.config import RunConfig
from crane_core.dataset.modalities import Modality, load_modalities
from crane_core.refine.catalog import keys_file
from crane_core.refine.fitted import WEIGHTS
from crane_core.refine.refiner import Refiner, project_items
from crane_core.stages import STAGES
from crane_core.storage.artifacts import Artifact
from crane_core.storage.matrix import blocks, changed_rows, open_matrix

logger = logging.getLogger(__name__)

NUM_ANCHORS = 16_384
"""Items on whose rows the drift is measured; with a catalog no larger it is exact."""
MAX_CHANGED = 0.5
"""Largest share of the earlier items that may have other features. Beyond it the features are of another kind or were
measured differently. The old weights then do not fit them, and the drift cannot show it: it compares keys under these
weights."""
MAX_GROWTH = 2
"""Largest catalog, as a multiple of the items that RCA was built on; the sample of the drift grows with it."""

_ANCHOR_ITEMS, _ANCHOR_ROWS = "anchor_items.npy", "anchors.npy"


@dataclass(frozen=True)
class Base:
    """The earlier run that `ml.refine` grows from.

    Attributes:
        refined: its artifact.
        modalities: features and profiles it was made of.
    """

    refined: Artifact
    modalities: list[Modality]

    @property
    def num_built(self) -> int:
        """Number of items when RCA was built, in this run or in one that it has grown from."""
        return self.refined.facts.get("growth", {}).get("num_built", len(self.modalities[0].items))

    def copy_fit(self, folder: Path, num_recursions: int) -> None:
        """Copy weights, curve, keys and anchors, which stay the same when a run grows."""
        keys = [keys_file(self.refined.path, number).name for number in range(1, num_recursions + 1)]
        for name in (*keys, WEIGHTS, "fit.json", _ANCHOR_ROWS, _ANCHOR_ITEMS):
            shutil.copy(self.refined.file(name), folder)


def find_base(
    earlier: Sequence[Artifact], interactions: Artifact, modalities: list[Modality], config: RunConfig
) -> Base | None:
    """Return the earlier run, if it was made in the same way with the same ids; else None, with a line in the log.

    Args:
        earlier: artifacts of `etl.interactions`, `etl.features`, `etl.profiles` and `ml.refine` of the earlier run.
        interactions: artifact of `etl.interactions` of this run.
        modalities: features and profiles of this run.
        config: configuration of this run.
    """
    ids, features, profiles, refined = earlier
    then = load_modalities(features, profiles)
    widths = [[(each.name, each.items.shape[1]) for each in side] for side in (then, modalities)]
    fits = {
        "same_ids": ids.fingerprint == interactions.facts["base"],
        "same_version": refined.manifest["stage_version"] == STAGES["ml.refine"].version,
        "same_settings": refined.manifest["config"]["refine"] == config.refine.model_dump(mode="json"),
        "same_modalities": widths[0] == widths[1],
        "same_profiles": profiles.facts["aggregate"] == config.profiles.aggregate,
    }
    if not all(fits.values()):
        found = " ".join(f"{name}={fit}" for name, fit in fits.items())
        logger.warning("build_anew base=%s %s", config.etl.base_run, found)
        return None
    for artifact in (features, profiles, refined):
        artifact.verify()
    return Base(refined, then)


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
    """Return whether so much is new or changed that the weights must be fitted anew, whatever the drift.

    Args:
        items: int, numbers of the items that are new or have changed, ascending.
        num_before, num_built, num_items: number of items in the run before, when RCA was built, and in this run.
    """
    num_changed = int(np.searchsorted(items, num_before))
    return num_changed > MAX_CHANGED * num_before or num_items > MAX_GROWTH * num_built


_ROWS_OF = {"items": "items", "present": "items", "profiles": "users", "counts": "users"}
"""Part of a modality to whose rows it holds, items or users."""


def write_selected(modalities: list[Modality], rows: Touched, folder: Path) -> None:
    """Copy some rows of features and profiles into files, a block at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, modality in enumerate(modalities):
        for name, whose in _ROWS_OF.items():
            source, which = getattr(modality, name), getattr(rows, whose)
            shape = (len(which), *source.shape[1:])
            target = np.lib.format.open_memmap(folder / f"{number}-{name}.npy", "w+", source.dtype, shape)
            for block in blocks(len(which), source[:1].nbytes):
                target[block] = source[which[block]]


def load_selected(modalities: list[Modality], folder: Path) -> list[Modality]:
    """Map the rows that `write_selected` has copied into memory."""
    return [
        Modality(modality.name, *(open_matrix(folder / f"{number}-{name}.npy") for name in _ROWS_OF))
        for number, modality in enumerate(modalities)
    ]


def overlay(before: Path, which: np.ndarray, rows: Path, num_rows: int, target: Path) -> None:
    """Write the rows of a file with some of them replaced and new ones appended, a block at a time.

    Args:
        before: [m, ...], the file.
        which: int, numbers of the replaced and new rows; every number from m on is among them.
        rows: [len(which), ...], file of these rows.
        num_rows: rows of the target.
        target: file to write.
    """
    old, new = open_matrix(before), open_matrix(rows)
    np.lib.format.open_memmap(target, "w+", old.dtype, (num_rows, *old.shape[1:]))
    for block in blocks(len(old), old[:1].nbytes):
        np.load(target, mmap_mode="r+")[block] = old[block]
    for block in blocks(len(which), old[:1].nbytes):
        np.load(target, mmap_mode="r+")[which[block]] = new[block]


@dataclass(frozen=True)
class Anchors:
    """A random sample of the items RCA was built on, on which the drift of later runs is measured.

    Attributes:
        items: int64 [n], item numbers, ascending; all items when there are few.
        projections: float32 [n, M, d], their projections when RCA was built.
        num_built: number of items when RCA was built.
    """

    items: np.ndarray
    projections: np.ndarray
    num_built: int

    @classmethod
    def choose(cls, refiner: Refiner, modalities: list[Modality], seed: int) -> Anchors:
        """Draw the sample and project it."""
        num_items = len(modalities[0].items)
        generator = np.random.default_rng(seed)
        items = np.sort(generator.choice(num_items, min(num_items, NUM_ANCHORS), replace=False))
        with torch.no_grad():
            return cls(items, project_items(refiner, modalities, items).cpu().numpy(), num_items)

    @classmethod
    def load(cls, base: Base) -> Anchors:
        """Map the sample of an earlier run into memory."""
        items, projections = (open_matrix(base.refined.file(name)) for name in (_ANCHOR_ITEMS, _ANCHOR_ROWS))
        return cls(items, projections, base.num_built)

    def write(self, folder: Path) -> None:
        """Write items and projections."""
        np.save(folder / _ANCHOR_ITEMS, self.items)
        np.save(folder / _ANCHOR_ROWS, self.projections)
