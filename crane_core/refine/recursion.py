"""Recursive cross-modal attention (arXiv 2601.11151, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crane_core.numerics.initial import xavier
from crane_core.refine.attention import Correlation, Keys


class Recursion(nn.Module):
    """One pass of RCA, with its weights `W_E, b_E, W_C,m, W_H,m`."""

    def __init__(self, num_modalities: int, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.joint = nn.Parameter(xavier((num_modalities * dim, dim), generator))
        self.joint_bias = nn.Parameter(torch.zeros(dim))
        self.correlation = nn.Parameter(xavier((num_modalities, dim, dim), generator))
        self.hidden = nn.Parameter(xavier((num_modalities, dim, dim), generator))

    def joint_rows(self, rows: Tensor) -> Tensor:
        """Return `E = [X_1 ; ... ; X_M] W_E + b_E`: float [n, M, d] -> [n, d]."""
        return torch.addmm(self.joint_bias, rows.flatten(1), self.joint)

    def refine(self, rows: Tensor, keys: Keys, chunk_size: int) -> Tensor:
        """Return `X_m + ReLU(C_m E W_H,m)` for all modalities at once: float [n, M, d] -> [n, M, d]."""
        by_modality = rows.transpose(0, 1)
        queries = by_modality @ self.correlation
        attended = keys.attend(queries.flatten(0, 1), chunk_size).view_as(queries)
        return (by_modality + torch.relu(attended @ self.hidden)).transpose(0, 1).contiguous()


class RecursiveCrossModalAttention(nn.Module):
    """R passes of cross-modal refinement, each with its own weights.

    Keys and values are the joint rows of the items. Item rows and user rows are queries and share the weights. The
    paper leaves both open.

    Args:
        num_modalities: M >= 1.
        dim: d.
        num_recursions: R >= 0; with 0 the rows do not change.
        correlation: phi.
        generator: draws the initial weights.
    """

    def __init__(
        self,
        num_modalities: int,
        dim: int,
        num_recursions: int,
        correlation: Correlation,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.correlation = correlation
        self.recursions = nn.ModuleList(Recursion(num_modalities, dim, generator) for _ in range(num_recursions))

    def forward(self, items: Tensor, queries: Tensor, chunk_size: int = 4096) -> tuple[Tensor, Tensor]:
        """Refine item rows, and other rows that attend to them.

        Args:
            items: float [num_items, M, d]; the keys of every pass are made from them.
            queries: float [n, M, d], users or further items.
            chunk_size: upper bound of the rows and of the keys in a block of scores.

        Returns:
            refined items [num_items, M, d] and refined queries [n, M, d].
        """
        for recursion in self.recursions:
            assert isinstance(recursion, Recursion)
            keys = self.correlation.prepare(recursion.joint_rows(items))
            queries = recursion.refine(queries, keys, chunk_size)
            items = recursion.refine(items, keys, chunk_size)
        return items, queries
