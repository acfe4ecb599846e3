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
        users: refined user rows, float32 [num_users, M, d], each of length 1, where the model reads them.
    """

    items: Tensor
    graph: SymmetricGraph
    users: Tensor | None = None


def load_content(refined: Artifact, graph: Artifact, device: torch.device, with_users: bool) -> Content:
    """Read the artifacts of `ml.refine` and `ml.graph`, the user rows only on demand."""
    items, users = (
        F.normalize(torch.from_numpy(np.array(open_matrix(refined.file(name)))), dim=2).to(device) if wanted else None
        for name, wanted in (("items.npy", True), ("users.npy", with_users))
    )
    assert items is not None
    return Content(items, load_graph(graph, device), users)


def load_graph(graph: Artifact, device: torch.device) -> SymmetricGraph:
    """Read the item graph of `ml.graph`."""
    values, indices, indptr = (
        np.array(open_matrix(graph.file(name))) for name in ("values.npy", "indices.npy", "indptr.npy")
    )
    size = len(indptr) - 1
    return SymmetricGraph(sp.csr_array((values, indices, indptr), shape=(size, size)), device)
