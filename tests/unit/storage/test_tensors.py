"""Safetensors files: read when sound, refused before memory is allocated when hostile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from crane_core.errors import ArtifactError
from crane_core.storage.tensors import load_arrays, load_tensors, save_arrays
from tests.worlds.hostile_tensors import HOSTILE_TENSORS


@pytest.mark.parametrize("read", [load_arrays, load_tensors])
@pytest.mark.parametrize("kind", HOSTILE_TENSORS)
def test_a_hostile_tensor_file(tmp_path: Path, kind: str, read: Callable[[Path], Any]) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(HOSTILE_TENSORS[kind])
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is refused"):
        read(path)


def test_a_sound_tensor_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((0, 4), np.int64)}, path)
    assert load_arrays(path)["b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert load_tensors(path)["a"].shape == (0, 4)


@pytest.mark.parametrize(
    "layout", [np.asfortranarray, np.transpose, lambda rows: rows[:, ::-1], lambda rows: rows[::2]]
)
def test_arrays_in_any_layout_are_written_as_they_are(
    tmp_path: Path, layout: Callable[[np.ndarray], np.ndarray]
) -> None:
    rows = layout(np.arange(12, dtype=np.float32).reshape(3, 4))
    save_arrays({"rows": rows}, tmp_path / "rows.safetensors")
    assert load_arrays(tmp_path / "rows.safetensors")["rows"].tolist() == rows.tolist()
