"""Shared by the benchmarks: a trainer of LightGCN, or of CRANE over random content."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from crane_core.dataset.interactions import Interactions
from crane_core.graph.item_graph import build_graph
from crane_core.model.content import Content
from crane_core.model.crane import Crane
from crane_core.model.lightgcn import LightGCN
from crane_core.model.propagation import SymmetricGraph
from crane_core.model_config import ModelConfig
from crane_core.training.trainer import Trainer


def make_trainer(
    interactions: Interactions, config: ModelConfig, folder: Path, device: torch.device, crane: bool = False
) -> Trainer:
    sizes = interactions.num_users, interactions.num_items
    model = Crane(*sizes, random_content(*sizes, device), config) if crane else LightGCN(*sizes, config)
    return Trainer(model, interactions, config, folder, device)


def random_content(num_users: int, num_items: int, device: torch.device) -> Content:
    """Refined rows of two modalities and a graph of ten neighbours for each item."""
    generator = torch.Generator().manual_seed(0)
    items, users = (torch.randn(size, 2, 64, generator=generator) for size in (num_items, num_users))
    neighbours = torch.randint(num_items, (num_items, 10), generator=generator, dtype=torch.int32)
    graph = SymmetricGraph(build_graph(neighbours.numpy()), device)
    return Content(F.normalize(items, dim=2).to(device), graph, F.normalize(users, dim=2).to(device))
