from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from crane_core.errors import ArtifactError
from crane_core.storage import matrix
from crane_core.storage.matrix import RowWriter, blocks, open_matrix


def test_rows_land_at_their_numbers_and_the_rest_is_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "BLOCK_BYTES", 16)
    with RowWriter(tmp_path / "m.npy", 9, 2) as writer:
        writer.write(np.array([1, 2, 5]), np.array([[1, 2], [3, 4], [5, 6]]))
        writer.write(np.array([], dtype=int), np.empty((0, 2)))
        writer.write(np.array([6]), np.array([[7.5, 8]], dtype=np.float16))
    expected = np.zeros((9, 2))
    expected[[1, 2, 5, 6]] = [[1, 2], [3, 4], [5, 6], [7.5, 8]]
    found = open_matrix(tmp_path / "m.npy")
    np.testing.assert_array_equal(found, expected)
    assert isinstance(found, np.memmap) and found.dtype == np.float32 and found.flags.c_contiguous


def test_file_is_what_numpy_would_write(tmp_path: Path) -> None:
    rows = np.arange(12, dtype=np.int32).reshape(4, 3)
    with RowWriter(tmp_path / "ours.npy", 4, 3, np.int32) as writer:
        writer.write(np.arange(4), rows)
    np.save(tmp_path / "numpy.npy", rows)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_torch_maps_a_file_without_a_copy(dtype: str, tmp_path: Path) -> None:
    with RowWriter(tmp_path / "m.npy", 1000, 8, dtype) as writer:
        writer.write(np.arange(1000), np.arange(8000).reshape(1000, 8) % 2048)
    found = open_matrix(tmp_path / "m.npy")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensor = torch.from_numpy(found)
    assert (tensor.data_ptr(), tensor.dtype) == (found.ctypes.data, getattr(torch, dtype))
    assert tensor[999].tolist() == [n % 2048 for n in range(7992, 8000)]
    assert (tmp_path / "m.npy").stat().st_size == 128 + 8000 * np.dtype(dtype).itemsize


@pytest.mark.parametrize("index", [[2, 1], [1, 1], [0], [7]])
def test_rows_out_of_order_are_refused(tmp_path: Path, index: list[int]) -> None:
    writer = RowWriter(tmp_path / "m.npy", 7, 1)
    writer.write(np.array([0]), np.ones((1, 1)))
    with pytest.raises(AssertionError):
        writer.write(np.array(index), np.ones((len(index), 1)))


def test_interrupted_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RowWriter(tmp_path / "m.npy", 1000, 8) as writer:
        writer.write(np.array([3]), np.ones((1, 8)))
        raise RuntimeError("interrupted")
    with pytest.raises(ArtifactError, match=r"m\.npy is no matrix that can be mapped .* Remedy: Remove"):
        open_matrix(tmp_path / "m.npy")


def test_missing_and_pickled_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name in ("absent.npy", "objects.npy"):
        with pytest.raises(ArtifactError, match=name):
            open_matrix(tmp_path / name)


def test_blocks_cover_every_row_once() -> None:
    cuts = list(blocks(10, matrix.BLOCK_BYTES // 4))
    assert [(cut.start, cut.stop) for cut in cuts] == [(0, 4), (4, 8), (8, 10)]
    assert list(blocks(0, 8)) == []
    assert [cut.stop for cut in blocks(2, 10 * matrix.BLOCK_BYTES)] == [1, 2]
