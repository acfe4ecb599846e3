"""Dataset of the experiments in memory, read from a folder in MMRec layout."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from crane_core.config import Features
from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.dataset.modalities import Modality
from crane_core.dataset.standardisation import fit_standardisation, standardised
from crane_core.errors import DataError
from crane_core.raw.importers.mmrec import LABELS, read_mmrec
from crane_core.storage.lock import locked

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """Interactions and item features of one dataset.

    Attributes:
        name: name of the folder.
        interactions: split by the labels in the folder.
        features: modality to float32 [num_items, dim], as delivered; a row that is not finite counts as missing.
    """

    name: str
    interactions: Interactions
    features: dict[str, NDArray[np.float32]]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content: interactions of every split and features, not the name."""
        interactions = self.interactions
        splits = (interactions.train, interactions.validation, interactions.test)
        return fingerprint(
            interactions.num_items,
            *(part for split in splits for part in (split.indptr, split.items)),
            *(part for name in sorted(self.features) for part in (name, self.features[name])),
        )

    def facts(self) -> dict[str, Any]:
        """Return name, fingerprint and sizes as JSON values."""
        interactions = self.interactions
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "users": interactions.num_users,
            "items": interactions.num_items,
            "train": len(interactions.train.items),
            "validation": len(interactions.validation.items),
            "test": len(interactions.test.items),
            "test_users": int((interactions.test.counts() > 0).sum()),
            "modalities": {name: matrix.shape[1] for name, matrix in sorted(self.features.items())},
        }

    def without_test(self) -> Dataset:
        """Return the same dataset without a test split, for choices that must not see it."""
        num_users = self.interactions.num_users
        nothing = ItemLists(np.zeros(num_users + 1, dtype=np.int64), np.empty(0, dtype=np.int32))
        return replace(self, interactions=replace(self.interactions, test=nothing))

    def joint(self, features: Features) -> NDArray[np.float32]:
        """Return standardised features of all modalities, [num_items, sum of widths]; missing ones are zeros.

        Raises:
            DataError: see `modalities`.
        """
        return np.concatenate([np.where(m.present[:, None], m.items, 0) for m in self.modalities(features)], axis=1)

    def require_splits(self) -> None:
        """Check that there are rows to train on, to validate on and to test on.

        Raises:
            DataError: it has no training, no validation or no test row.
        """
        interactions = self.interactions
        for label, name in enumerate(("train", "validation", "test")):
            if not len(getattr(interactions, name).items):
                raise DataError(
                    f"{self.name} has no {name} row.", f"Label some rows of the .inter file {label} in x_label."
                )

    def with_noise(self, seed: int) -> Dataset:
        """Return the same interactions with normal noise of the same shape as features; no row is missing."""
        generator = np.random.default_rng(seed)
        noise = {
            name: generator.standard_normal(matrix.shape, dtype=np.float32) for name, matrix in self.features.items()
        }
        return replace(self, name=f"{self.name}-noise", features=noise)

    def with_cold_items(self, share: float, seed: int) -> Dataset:
        """Return the same without the training rows of a random share of the items, in [0, 1): they are cold then."""
        interactions = self.interactions
        size = int(share * interactions.num_items)
        cold = np.random.default_rng(seed).choice(interactions.num_items, size, replace=False)
        train = interactions.train.where(~np.isin(interactions.train.items, cold))
        return replace(self, name=f"{self.name}-cold", interactions=replace(interactions, train=train))

    def modalities(self, features: Features, aggregate: Literal["sum", "mean"] = "sum") -> list[Modality]:
        """Return standardised features and profiles, as `etl.features` and `etl.profiles` make them.

        Raises:
            DataError: the dataset has no features, or not the modalities asked for.
        """
        missing = sorted(set(features.modalities) - set(self.features))
        if missing or not self.features:
            found = f"modalities {', '.join(sorted(self.features))}" if self.features else "no item features"
            raise DataError(
                f"Dataset {self.name} has {found}{f', not {missing}' if missing else ''}.",
                f"Set features.modalities to some of {', '.join(sorted(self.features))}."
                if self.features
                else "Deliver {modality}_feat.npy files, one row per item, or choose models that need no features.",
            )
        train = self.interactions.train
        history = sp.csr_array(
            (np.ones(len(train.items)), train.items, train.indptr), shape=(train.num_users, self.interactions.num_items)
        )
        is_train = self.interactions.item_counts() > 0
        return [
            _modality(name, self.features[name], history, is_train, features.standardise, aggregate)
            for name in sorted(features.modalities or self.features)
        ]


def fingerprint(*parts: Any) -> str:
    """Return a hash of arrays, byte for byte, and JSON values: 32 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def held(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a folder, which is created if it is missing.

    Another process waits until this one releases the lock or ends. `waiting` is called before this process waits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The lock file lies beside the folder, because a process may remove the folder while others wait.
    with locked(folder.parent / f".{folder.name}.lock", waiting):
        yield


def load_dataset(folder: str | Path) -> Dataset:
    """Read a folder in MMRec layout.

    Row numbers of users and items are those of the folder; users and items without a row are included. A pair of user
    and item counts once, as in the pipeline: in train if it is there, else in validation, else in test.

    Raises:
        DataError: see `crane_core.raw.importers.mmrec`.
    """
    folder = Path(folder)
    found = read_mmrec(folder)
    users, items, labels = (found.log[name].to_numpy() for name in ("userID", "itemID", "x_label"))
    num_users = int(users.max()) + 1
    order = np.argsort(labels, kind="stable")
    _, first = np.unique(users[order].astype(np.int64) * found.num_items + items[order], return_index=True)
    kept = np.sort(order[first])
    if len(kept) < len(users):
        logger.warning("repeats rows=%d kept=%d", len(users), len(kept))
    users, items, labels = users[kept], items[kept], labels[kept]
    train, validation, test = (
        ItemLists.from_pairs(users[labels == label], items[labels == label], num_users) for label in LABELS
    )
    interactions = Interactions(num_users, found.num_items, train, validation, test)
    features = {name: np.ascontiguousarray(matrix, dtype=np.float32) for name, matrix in found.matrices.items()}
    return Dataset(folder.resolve().name, interactions, features)


def _modality(
    name: str,
    raw: NDArray[np.float32],
    history: sp.csr_array,
    is_train: NDArray[np.bool_],
    kind: Literal["zscore", "l2", "none"],
    aggregate: Literal["sum", "mean"],
) -> Modality:
    present = np.asarray(np.isfinite(raw).all(axis=1))
    fitted = fit_standardisation(raw, present, is_train, kind)
    items = np.concatenate([rows for _, rows in standardised(raw, present, kind, fitted)]).astype(np.float32)
    profiles = (history @ items.astype(np.float64)).astype(np.float32)
    counts = (history @ present.astype(np.float64)).astype(np.int32)
    if aggregate == "mean":
        profiles /= np.maximum(counts, 1)[:, None]
    return Modality(name, items, present, profiles, counts)
