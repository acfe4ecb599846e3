"""Features of the catalog and of the users, one modality each."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crane_core.storage.artifacts import Artifact
from crane_core.storage.matrix import open_matrix

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Modality:
    """Features of the catalog and of the users in one modality.

    Attributes:
        name: name of the modality.
        items: float32 or float16 [num_items, dim], standardised.
        present: bool [num_items].
        profiles: float32 [num_users, dim], sum or mean over the training items of each user.
        counts: int [num_users], number of items in each profile.
    """

    name: str
    items: np.ndarray
    present: np.ndarray
    profiles: np.ndarray
    counts: np.ndarray


PROFILE_SPREAD = 2.0
"""Orders of magnitude that the norms of profiles may spread over without a warning; sums on Last.fm 2K: 0.65."""
_PROFILE_SAMPLE = 100_000


def profile_spreads(modalities: Sequence[Modality]) -> dict[str, float]:
    """Measure the spread of the profile norms of each modality: log10 of the 95th over the 5th percentile.

    At most 100,000 users with a profile are sampled; without any, the spread is 0. A spread beyond `PROFILE_SPREAD` is
    logged as a warning.
    """
    spreads = {}
    for modality in modalities:
        users = np.flatnonzero(modality.counts > 0)
        users = users[:: -(-len(users) // _PROFILE_SAMPLE) or 1]
        norms = np.linalg.norm(modality.profiles[users], axis=1)
        low, high = np.quantile(norms, [0.05, 0.95]) if len(norms) else (1.0, 1.0)
        # The norm of a profile may be 0, since features of opposite sign cancel.
        spreads[modality.name] = spread = math.log10(max(high, 1e-12) / max(low, 1e-12))
        if spread > PROFILE_SPREAD:
            logger.warning(
                "profiles_spread modality=%s orders_of_magnitude=%.1f p5=%.2e p95=%.2e",
                modality.name,
                spread,
                low,
                high,
            )
    return spreads


def load_features(features: Artifact) -> list[tuple[np.ndarray, np.ndarray]]:
    """Map the artifact of `etl.features` into memory: float [num_items, dim] and bool [num_items], by name."""
    return [
        (open_matrix(features.file(f"{name}/matrix.npy")), open_matrix(features.file(f"{name}/mask.npy")))
        for name in sorted(features.facts["modalities"])
    ]


def load_modalities(features: Artifact, profiles: Artifact) -> list[Modality]:
    """Map the artifacts of `etl.features` and `etl.profiles` into memory, modalities by name."""
    return [
        Modality(
            name,
            open_matrix(features.file(f"{name}/matrix.npy")),
            open_matrix(features.file(f"{name}/mask.npy")),
            open_matrix(profiles.file(f"{name}.npy")),
            open_matrix(profiles.file(f"{name}.counts.npy")),
        )
        for name in sorted(features.facts["modalities"])
    ]
