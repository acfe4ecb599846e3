"""Open the `.npy` matrices that people deliver, and the files with the ids of their rows."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crane_core.errors import DataError
from crane_core.raw.checks import UNREADABLE
from crane_core.raw.importers.foreign import check_unpacked
from crane_core.raw.importers.layout import open_text


def load_matrix(path: Path) -> NDArray:
    """Open a `.npy` file of numbers, [items, dim].

    Raises:
        DataError: it is none.
    """
    try:
        check_unpacked(path)
        matrix: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except UNREADABLE as error:
        raise DataError(
            f"{path} ({path.stat().st_size} bytes, row count unknown) is no complete .npy array of numbers: {error}.",
            "Save it again with numpy.save as a matrix of numbers, one row per item: numpy.save(FILE, "
            "rows.astype('float32')).",
        ) from error
    if not isinstance(matrix, np.ndarray):
        raise DataError(
            f"{path} ({path.stat().st_size} bytes, row count unknown) is an archive of arrays, not one array.",
            "Save one array with numpy.save.",
        )
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiub" or matrix.shape[1] == 0:
        raise DataError(
            f"{path} has shape {list(matrix.shape)} and type {matrix.dtype}, expected a numeric [items, dim] matrix.",
            "Save a matrix of numbers with numpy.save, one row per item.",
        )
    return matrix


def read_id_lines(path: Path, section: str, encoding: str, num_rows: int) -> list[str]:
    """Return the ids of a file with one a line, without empty lines at its end beyond the `num_rows` of the matrix.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open_text(path, encoding, None) as text:
            lines = [line.removesuffix("\n") for line in text]
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}.", f"Set {section}.encoding in the mapping to that of the ids."
        ) from error
    while len(lines) > num_rows and not lines[-1].strip():
        del lines[-1]
    return lines


def wrong_id_count(files: Sequence[Path], matrix: NDArray, lines: Sequence[str]) -> DataError:
    """Return the error of a matrix, the first of the files, that has not as many rows as the second has ids."""
    header = f"; {lines[0]!r} may be a header" if len(lines) == len(matrix) + 1 else ""
    return DataError(
        f"{files[0]} has shape {list(matrix.shape)} and type {matrix.dtype}, {files[1]} {len(lines)} ids{header}; "
        "expected as many ids as rows.",
        f"Write {files[1].name} with one item id for each of the {len(matrix)} rows, one a line, without a header.",
    )
