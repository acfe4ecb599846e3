"""Matrices on disk: `.npy` files, written row by row in bounded memory and read by memory mapping."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import DTypeLike, NDArray

from crane_core.errors import ArtifactError

BLOCK_BYTES = 32 * 1024 * 1024


class RowWriter:
    """Writes a C-order matrix from the first row to the last; rows that are not written are zero.

    Args:
        path: the `.npy` file, replaced if it exists.
        num_rows: number of rows.
        dim: width of a row.
        dtype: element type.
    """

    def __init__(self, path: Path, num_rows: int, dim: int, dtype: DTypeLike = np.float32) -> None:
        self.shape = (num_rows, dim)
        self.dtype = np.dtype(dtype)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        np.lib.format.write_array_header_1_0(
            self._file,
            {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape},
        )
        self._next = 0

    def write(self, index: NDArray[np.integer], rows: NDArray) -> None:
        """Write `rows[j]` at row `index[j]`.

        Args:
            index: integer [n], strictly increasing, within and across calls.
            rows: [n, dim], cast to the writer's dtype.
        """
        if len(index) == 0:
            return
        assert rows.shape == (len(index), self.shape[1]), (rows.shape, self.shape)
        assert self._next <= index[0] and index[-1] < self.shape[0] and (np.diff(index) > 0).all()
        rows = np.ascontiguousarray(rows, dtype=self.dtype)
        for start, stop in _runs(index):
            self._fill(int(index[start]))
            self._file.write(rows[start:stop].data)
            self._next = int(index[stop - 1]) + 1

    def close(self) -> None:
        """Fill the remaining rows with zeros and close the file."""
        self._fill(self.shape[0])
        self._file.close()

    def _fill(self, until: int) -> None:
        step = rows_per_block(self.shape[1] * self.dtype.itemsize)
        while self._next < until:
            count = min(step, until - self._next)
            self._file.write(bytes(count * self.shape[1] * self.dtype.itemsize))
            self._next += count

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def open_matrix(path: Path) -> NDArray:
    """Map a `.npy` file into memory, read-only.

    Raises:
        ArtifactError: it is missing, truncated or not an array of numbers.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(
            f"{path} is no matrix that can be mapped ({error}).", f"Remove {path.parent} and run its stage again."
        ) from error


def blocks(num_rows: int, row_bytes: int) -> Iterator[slice]:
    """Cut rows into slices of about 32 MiB, always the same for the same arguments, so that sums are reproducible."""
    step = rows_per_block(row_bytes)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def changed_rows(before: NDArray, now: NDArray) -> NDArray[np.bool_]:
    """Mark the rows of `now` that are new or differ from the row of the same number in `before`: bool [len(now)].

    Args:
        before, now: matrices of the same width, or columns; `now` has at least as many rows.
    """
    changed = np.ones(len(now), dtype=bool)
    for block in blocks(len(before), before[:1].nbytes):
        changed[block] = (before[block] != now[block]).reshape(block.stop - block.start, -1).any(axis=1)
    return changed


def rows_per_block(row_bytes: int) -> int:
    """Return how many rows fit in `BLOCK_BYTES`, but one at least."""
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def _runs(index: NDArray[np.integer]) -> Iterator[tuple[int, int]]:
    cuts = np.flatnonzero(np.diff(index) != 1) + 1
    edges = [0, *cuts.tolist(), len(index)]
    yield from itertools.pairwise(edges)
