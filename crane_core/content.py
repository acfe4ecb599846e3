"""What the refine and graph stages left, as CRANE trains on it: frozen refined rows and the item graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from crane_core.matrix import open_matrix
from crane_core.propagation import SymmetricGraph
from crane_core.store import Artifact


@dataclass(frozen=True)
class Content:
    """Frozen inputs of the semantic view.

    Attributes:
        items: refined item rows, float32 [num_items, M, d], each of length 1.
        graph: normalised item-item graph.
    """

    items: Tensor
    graph: SymmetricGraph


def load_content(refined: Artifact, graph: Artifact, device: torch.device) -> Content:
    """Read the artifacts of `ml.refine` and `ml.graph`."""
    items = F.normalize(torch.from_numpy(np.array(open_matrix(refined.file("items.npy")))), dim=2).to(device)
    values, indices, indptr = (
        np.array(open_matrix(graph.file(name))) for name in ("values.npy", "indices.npy", "indptr.npy")
    )
    matrix = sp.csr_array((values, indices, indptr), shape=(len(items), len(items)))
    return Content(items, SymmetricGraph(matrix, device))
