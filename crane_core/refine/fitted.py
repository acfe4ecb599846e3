"""The weights of a fitted refiner in a folder, and the fusion of rows in a file with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from crane_core.config import Refine
from crane_core.refine.refiner import Refiner
from crane_core.storage.matrix import open_matrix
from crane_core.storage.tensors import load_tensors

WEIGHTS = "rca.safetensors"


def save_refiner(refiner: Refiner, folder: Path) -> None:
    """Write the weights of a refiner."""
    weights = {name: value.cpu().contiguous() for name, value in refiner.state_dict().items()}
    save_file(weights, folder / WEIGHTS)


def load_refiner(dims: list[int], config: Refine, folder: Path) -> Refiner:
    """Read the weights of a fitted refiner.

    Args:
        dims: width of each modality.
        config: sizes and kernel.
        folder: folder with its weights.
    """
    refiner = Refiner(dims, [1.0] * len(dims), config)
    refiner.load_state_dict(load_tensors(folder / WEIGHTS))
    return refiner.eval()


@torch.no_grad()
def fuse_file(refiner: Refiner, source: Path, target: Path, chunk_size: int) -> None:
    """Fuse the rows of a file into another, [n, M, d] to [n, d], a chunk at a time."""
    num_rows = len(open_matrix(source))
    np.lib.format.open_memmap(target, "w+", np.float32, (num_rows, refiner.fusion.shape[1]))
    for start in range(0, num_rows, chunk_size):
        part = slice(start, start + chunk_size)
        rows = torch.from_numpy(np.array(open_matrix(source)[part]))
        np.load(target, mmap_mode="r+")[part] = refiner.fuse(rows).numpy()
