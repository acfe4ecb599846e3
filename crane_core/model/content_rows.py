"""A row for an item that the training has not seen, from its features alone: it can be ranked at once.

The map goes from delivered vectors to the row of a cold item: standardised and projected as `etl.features` did, softly
whitened (`model.whitening`), then one matrix and one constant. Every number of it is in the files of the export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crane_core.dataset.standardisation import projected, standardised
from crane_core.errors import DataError
from crane_core.model.whitening import Features, Whitening
from crane_core.storage.tensors import load_arrays, save_arrays

_WHITENING = "whitening_"
_KEYS = ("mean", "scale", "axes", "centre")
"""Arrays of `Delivered`."""
_OF_MAP = ("matrix", "shift", "constant")


@dataclass(frozen=True)
class Delivered:
    """How vectors of a modality are made features, as `etl.features` did.

    Attributes:
        kind: `features.standardise`.
        width: of a vector as it is delivered.
        arrays: of `fit_standardisation`; of `fit_projection`, too, where the modality is projected.
    """

    kind: str
    width: int
    arrays: Mapping[str, np.ndarray]

    def features(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return features float64 [n, dim], and which vectors are there, bool [n]: those that are finite."""
        present, arrays = np.asarray(np.isfinite(vectors).all(axis=1)), dict(self.arrays)
        rows = standardised(np.where(present[:, None], vectors, 0), present, self.kind, arrays)
        if "axes" in arrays:
            rows = projected(rows, present, arrays)
        return np.concatenate([block for _, block in rows]), present


def read_delivered(folder: Path, width: int) -> Delivered:
    """Read how a modality was made features from its folder in the artifact of `etl.features`.

    Args:
        folder: of the modality.
        width: of a vector as it was delivered.
    """
    arrays: dict[str, np.ndarray] = {}
    for name in ("standardisation.npz", "projection.npz"):
        if (folder / name).exists():
            with np.load(folder / name, allow_pickle=False) as saved:
                arrays |= {key: saved[key] for key in saved.files}
    return Delivered(str(arrays["kind"]), width, {key: arrays[key] for key in _KEYS if key in arrays})


@dataclass(frozen=True)
class ContentMap:
    """The last part of the map: from features to rows.

    Attributes:
        whitening: of the modalities; None where content says nothing, and then every row is `constant`.
        matrix, shift: float64 [k, d] and [d], of items with features.
        constant: float64 [d], the row of an item without any features.
    """

    whitening: Whitening | None
    matrix: np.ndarray
    shift: np.ndarray
    constant: np.ndarray

    def rows(self, features: Sequence[Features]) -> np.ndarray:
        """Return the rows of some items, float32 [n, d]."""
        if self.whitening is None:
            return np.tile(self.constant, (len(features[0][0]), 1)).astype(np.float32)
        white = self.whitening.rows(features).numpy().astype(np.float64)
        own = np.where(white.any(axis=1, keepdims=True), white @ self.matrix + self.shift, 0)
        return (own + self.constant).astype(np.float32)


@dataclass(frozen=True)
class ContentRows:
    """The whole map: from vectors as they are delivered to rows.

    Attributes:
        modalities: name to how its vectors are made features, in the order of the whitening.
        content: from features to rows.
    """

    modalities: Mapping[str, Delivered]
    content: ContentMap

    def rows(self, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the rows of some items, float32 [n, d]: their scores are the dot products with the users' rows.

        Args:
            vectors: modality to float [n, width]. A vector that is not finite is missing, and so is a modality that
                is not given.

        Raises:
            DataError: no or an unknown modality, or vectors of another width or number.
        """
        expected = ", ".join(f"{name} of width {each.width}" for name, each in self.modalities.items())
        shapes = {name: each.shape for name, each in vectors.items()}
        is_right = all(
            name in self.modalities and shape[1:] == (self.modalities[name].width,) for name, shape in shapes.items()
        )
        if not is_right or len({shape[0] for shape in shapes.values()}) != 1:
            raise DataError(
                f"The vectors have the shapes {shapes}; the model knows {expected}.",
                f"Give as many vectors of each modality, {expected}, or leave a modality out.",
            )
        size = next(iter(shapes.values()))[0]
        return self.content.rows(
            [
                each.features(vectors[name] if name in vectors else np.full((size, each.width), np.nan))
                for name, each in self.modalities.items()
            ]
        )

    def facts(self) -> dict[str, Any]:
        """Return what is no array as JSON values."""
        return {name: {"kind": each.kind, "width": each.width} for name, each in self.modalities.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by their names in a file."""
        found = {f"{name}.{key}": array for name, each in self.modalities.items() for key, array in each.arrays.items()}
        found |= {name: getattr(self.content, name) for name in _OF_MAP}
        whitening = self.content.whitening
        if whitening is not None:
            for name, mean, scale in zip(self.modalities, whitening.means, whitening.scales, strict=True):
                found |= {f"{name}.{_WHITENING}mean": mean, f"{name}.{_WHITENING}scale": np.array([scale])}
            found[f"{_WHITENING}axes"] = whitening.axes
        return {name: np.ascontiguousarray(array, dtype=np.float64) for name, array in found.items()}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> ContentRows:
        """Return the map that `arrays` and `facts` describe."""
        modalities = {
            name: Delivered(
                each["kind"],
                each["width"],
                {key: arrays[f"{name}.{key}"] for key in _KEYS if f"{name}.{key}" in arrays},
            )
            for name, each in facts.items()
        }
        whitening = None
        if f"{_WHITENING}axes" in arrays:
            means = tuple(arrays[f"{name}.{_WHITENING}mean"] for name in facts)
            scales = tuple(float(arrays[f"{name}.{_WHITENING}scale"][0]) for name in facts)
            whitening = Whitening(means, scales, arrays[f"{_WHITENING}axes"])
        return cls(modalities, ContentMap(whitening, *(arrays[name] for name in _OF_MAP)))


CONTENT_FILES = ("content.safetensors", "content.json")


def save_content_rows(rows: ContentRows, folder: Path) -> None:
    """Write arrays and facts into a folder."""
    arrays, facts = (folder / name for name in CONTENT_FILES)
    save_arrays(rows.arrays(), arrays)
    facts.write_text(json.dumps(rows.facts(), indent=1))


def load_content_rows(folder: Path) -> ContentRows:
    """Read the map from the folder of a training or an export."""
    arrays, facts = (folder / name for name in CONTENT_FILES)
    return ContentRows.of(load_arrays(arrays), json.loads(facts.read_text()))
