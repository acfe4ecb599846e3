"""Read safetensors files of unknown origin: the header is checked against the file size before memory is allocated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from crane_core.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes that a safetensors file declares, and check that the file holds exactly the bytes it declares.

    Raises:
        ArtifactError: the file cannot be read, or header and data disagree: it is truncated or padded, tensors overlap,
            or it declares more than it holds.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > size - 8:
                raise _refused(path, f"declares a header of {length} bytes and has {size} in all")
            header: dict[str, Any] = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        position = 0
        shapes = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            shapes[name] = tuple(int(edge) for edge in entry["shape"])
            declared = _BYTES[entry["dtype"]] * math.prod(shapes[name])
            if min(shapes[name], default=0) < 0 or start != position or end - start != declared:
                raise _refused(path, f"{name} declares {declared} bytes, found {end - start}")
            position = end
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(path, f"has no JSON header ({error})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise _refused(path, f"has a header that is none of safetensors ({error!r})") from error
    if position != size - 8 - length:
        raise _refused(path, f"declares {position} bytes of data, found {size - 8 - length}")
    return {name: shapes[name] for name in header}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load all tensors of a file, on the CPU.

    Raises:
        ArtifactError: as `tensor_shapes`.
    """
    # Torch takes seconds to import, and a served model is read without it.
    import safetensors.torch

    tensor_shapes(path)
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise _refused(path, f"cannot be read ({error})") from error


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Load all tensors of a file, as NumPy arrays.

    Raises:
        ArtifactError: as `tensor_shapes`.
    """
    tensor_shapes(path)
    try:
        return safetensors.numpy.load_file(path)
    except SafetensorError as error:
        raise _refused(path, f"cannot be read ({error})") from error


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write NumPy arrays, in any layout, as tensors.

    The NumPy side of safetensors 0.8 writes the memory of an array as it lies: a transposed array would be read as
    another one.
    """
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def _refused(path: Path, found: str) -> ArtifactError:
    return ArtifactError(f"{path} is refused: it {found}.", f"Remove {path.parent} and run its stage again.")
