"""Content: refined rows and the item graph, which CRANE reads beside the interactions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from crane_core.config import Knn, Refine
from crane_core.dataset.modalities import Modality
from crane_core.graph.exact import search
from crane_core.graph.item_graph import build_graph
from crane_core.model.propagation import SymmetricGraph
from crane_core.model_config import CraneSettings
from crane_core.ranks import ranks
from crane_core.refine.refiner import Refiner, profile_scales
from crane_core.storage.artifacts import Artifact
from crane_core.storage.matrix import open_matrix


@dataclass(frozen=True)
class Content:
    """Frozen content, as the stages `ml.refine` and `ml.graph` left it.

    Attributes:
        items: refined item rows, float32 [num_items, M, d], each of length 1.
        graph: normalised item-item graph.
        users: refined user rows, float32 [num_users, M, d], each of length 1, where the model reads them.
    """

    items: Tensor
    graph: SymmetricGraph
    users: Tensor | None = None

    @property
    def width(self) -> int:
        """Numbers in a row, M d."""
        return self.items[0].numel()

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """Return `items` and `users`."""
        return self.items, self.users

    def start_epoch(self, epoch: int) -> None:
        """Do nothing: frozen content does not change."""


class JointContent(nn.Module):
    """Content that learns with the model: RCA over the whole catalog, with gradients.

    The paper has one learned fusion `W_F`. Here the model fuses the rows with a fusion of its own. The refiner's fusion
    only weighs the modalities in the item graph; no gradient reaches it, so it stays as it was fitted, or the plain
    average.

    Args:
        modalities: standardised features, and profiles where the model reads user rows. Kept whole on the device, as
            float32: a step would widen them all.
        refiner: projection and RCA; its parameters become the model's.
        refine: `chunk_size` bounds the blocks of scores. The rows themselves, a few times M d numbers for each
            recursion, are kept for the backward pass.
        knn: neighbours in the item graph.
        crane: epochs that a graph is kept, and whether to refine the users too.
        device: where the rows will be.

    Attributes:
        neighbours: int32 [num_items, k], what `graph` is made of. In the state dict, so weights are never loaded
            without the graph they belong to.
        graph: normalised item-item graph.
    """

    neighbours: Tensor
    graph: SymmetricGraph

    def __init__(
        self,
        modalities: list[Modality],
        refiner: Refiner,
        refine: Refine,
        knn: Knn,
        crane: CraneSettings,
        device: torch.device,
    ) -> None:
        super().__init__()
        refiner.fusion.requires_grad_(False)
        self.refiner = refiner.to(device)
        self.chunk_size = refine.chunk_size
        self.k = knn.k
        self.graph_epochs = crane.graph_epochs
        self.items = [(_tensor(each.items, device).float(), _tensor(each.present, device)) for each in modalities]
        self.users = [
            (_tensor(each.profiles, device) / scale, _tensor(each.counts, device) > 0)
            for each, scale in zip(modalities, refiner.get_buffer("profile_scales"), strict=True)
            if crane.reads_users
        ]
        num_items = len(modalities[0].items)
        empty = torch.empty(num_items, min(knn.k, num_items - 1), dtype=torch.int32, device=device)
        self.register_buffer("neighbours", empty)
        self.register_load_state_dict_post_hook(_connect)
        self._find_neighbours()

    @property
    def width(self) -> int:
        """Numbers in a row, M d."""
        return self.refiner.biases.numel()

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """Return the refined rows , each of length 1: items float32 [num_items, M, d], and users."""
        items, users = self._refined(self.users)
        return F.normalize(items, dim=2), F.normalize(users, dim=2) if self.users else None

    def start_epoch(self, epoch: int) -> None:
        """Build the graph anew in every `graph_epochs`-th epoch; the first one is built with the content."""
        if epoch and epoch % self.graph_epochs == 0:
            self._find_neighbours()

    def _refined(self, users: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        items = self.refiner.project(*map(list, zip(*self.items, strict=True)))
        queries = self.refiner.project(*map(list, zip(*users, strict=True))) if users else items[:0]
        return self.refiner.rca(items, queries, self.chunk_size)

    @torch.no_grad()
    def _find_neighbours(self) -> None:
        rank, num_ranks = ranks()
        if rank == 0:
            fused = self.refiner.fuse(self._refined([])[0]).cpu().numpy()
            neighbours, _ = search(fused, range(len(fused)), self.k)
            self.neighbours.copy_(torch.from_numpy(neighbours))
        if num_ranks > 1:
            # One rank searches: no rounding can then make the ranks train on different graphs.
            dist.broadcast(self.neighbours, 0)
        _connect(self)


def _connect(content: JointContent, _: Any = None) -> None:
    """Make the graph of the neighbours anew: a state dict may have replaced them."""
    content.graph = neighbour_graph(content.neighbours)


def neighbour_graph(neighbours: Tensor) -> SymmetricGraph:
    """Return the graph of int32 [num_items, k] neighbours, on their device."""
    return SymmetricGraph(build_graph(neighbours.cpu().numpy()), neighbours.device)


def joint_content(
    modalities: list[Modality],
    fitted: dict[str, Tensor],
    refine: Refine,
    knn: Knn,
    crane: CraneSettings,
    device: torch.device,
) -> JointContent:
    """Return the content of a joint training at its start.

    Args:
        modalities: features and profiles.
        fitted: state dict of the refiner that the staged fit left; read where `crane.joint_start` is `fitted`.
        refine, knn, crane: the settings of each.
        device: of the training.
    """
    refiner = Refiner([each.items.shape[1] for each in modalities], profile_scales(modalities), refine)
    if crane.joint_start == "fitted":
        refiner.load_state_dict(fitted)
    return JointContent(modalities, refiner, refine, knn, crane, device)


def load_content(refined: Artifact, graph: Artifact, device: torch.device, with_users: bool) -> Content:
    """Read the artifacts of `ml.refine` and `ml.graph`; user rows only where `with_users`."""
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


def _tensor(rows: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(rows)).to(device)
