"""Features and profiles of a small catalog that grows."""

from __future__ import annotations

import numpy as np

from crane_core.dataset.modalities import Modality


def catalog(num_items: int, changed: tuple[int, ...] = (), shift: float = 0.0) -> list[Modality]:
    """Items numbered alike whatever their number; a shift makes those from 200 on another kind."""
    generator = np.random.default_rng(3)
    modalities = []
    for name, width in (("text", 6), ("image", 5)):
        items = generator.normal(size=(400, width)).astype(np.float32)
        profiles = generator.normal(size=(30, width)).astype(np.float32)
        present = generator.random(400) > 0.1
        items[~present] = 0
        items[200:] += np.float32(shift)
        items[list(changed)] += 1
        modalities.append(Modality(name, items[:num_items], present[:num_items], profiles, np.ones(30, np.int32)))
    return modalities
