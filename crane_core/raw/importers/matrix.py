"""Open the `.npy` matrices that people deliver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crane_core.errors import DataError
from crane_core.raw.checks import UNREADABLE
from crane_core.raw.importers.foreign import check_unpacked


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
