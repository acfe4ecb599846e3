"""Recursive cross-modal attention (arXiv 2601.11151, section 3.3): exact, in blocks, never rows x items in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crane_core.config import Phi


def attend(queries: Tensor, keys: Tensor, phi: Phi, chunk_size: int = 4096) -> Tensor:
    """`C E` of the paper: `phi(queries keys^T / sqrt(d)) keys`, with the keys as values.

    `softmax` runs over the keys; `tanh` and `linear` are divided by the number of keys, so that their scale
    does not depend on the size of the catalog and shards of keys add up. Forward and backward hold at most one
    `[chunk_size, chunk_size]` block of correlations.

    Args:
        queries: float [n, d].
        keys: float [m, d], m >= 1.
        phi: correlation function.
        chunk_size: rows and keys per block; the result does not depend on it beyond rounding.

    Returns:
        float [n, d].
    """
    if phi == "linear":
        scale = queries.shape[1] ** -0.5 / len(keys)
        return queries @ (keys.T @ keys) * scale
    return _BlockwiseAttention.apply(queries, keys, phi, chunk_size)


class _BlockwiseAttention(torch.autograd.Function):
    """Softmax and tanh attention over blocks of keys; the backward pass computes each block again."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, phi: Phi, chunk_size: int) -> Tensor:
        scale = queries.shape[1] ** -0.5
        output = torch.empty_like(queries)
        normaliser = queries.new_empty(len(queries))
        for rows in _blocks(len(queries), chunk_size):
            block = queries[rows] * scale
            total = torch.zeros_like(block)
            top = block.new_full((len(block), 1), -torch.inf)
            mass = block.new_zeros((len(block), 1))
            for columns in _blocks(len(keys), chunk_size):
                scores = block @ keys[columns].T
                if phi == "tanh":
                    total += torch.tanh_(scores) @ keys[columns]
                    continue
                new_top = torch.maximum(top, scores.amax(1, keepdim=True))
                shrink = torch.exp(top - new_top)
                weights = torch.exp_(scores.sub_(new_top))
                mass = mass * shrink + weights.sum(1, keepdim=True)
                total = total * shrink + weights @ keys[columns]
                top = new_top
            if phi == "tanh":
                output[rows] = total / len(keys)
            else:
                output[rows] = total / mass
                normaliser[rows] = (top + mass.log())[:, 0]
        ctx.save_for_backward(queries, keys, output, normaliser)
        ctx.phi, ctx.chunk_size = phi, chunk_size
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        queries, keys, output, normaliser = ctx.saved_tensors
        scale = queries.shape[1] ** -0.5
        query_gradient = torch.zeros_like(queries)
        key_gradient = torch.zeros_like(keys)
        for rows in _blocks(len(queries), ctx.chunk_size):
            block, incoming = queries[rows] * scale, gradient[rows]
            if ctx.phi == "tanh":
                incoming = incoming / len(keys)
            dot = (incoming * output[rows]).sum(1, keepdim=True)
            for columns in _blocks(len(keys), ctx.chunk_size):
                part = keys[columns]
                scores = block @ part.T
                if ctx.phi == "tanh":
                    weights = torch.tanh_(scores)
                    score_gradient = (incoming @ part.T) * (1 - weights * weights)
                else:
                    weights = torch.exp_(scores.sub_(normaliser[rows, None]))
                    score_gradient = weights * ((incoming @ part.T) - dot)
                query_gradient[rows] += score_gradient @ part * scale
                key_gradient[columns] += score_gradient.T @ block + weights.T @ incoming
        return query_gradient, key_gradient, None, None


def _blocks(length: int, chunk_size: int) -> list[slice]:
    return [slice(start, start + chunk_size) for start in range(0, length, chunk_size)]


class Recursion(nn.Module):
    """The weights of one RCA pass, `W_E, b_E, W_C,m, W_H,m`."""

    def __init__(self, num_modalities: int, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.joint = nn.Parameter(_xavier((num_modalities * dim, dim), generator))
        self.joint_bias = nn.Parameter(torch.zeros(dim))
        self.correlation = nn.Parameter(_xavier((num_modalities, dim, dim), generator))
        self.hidden = nn.Parameter(_xavier((num_modalities, dim, dim), generator))

    def joint_rows(self, rows: Tensor) -> Tensor:
        """`E = [X_1 ; ... ; X_M] W_E + b_E`: float [n, M, d] -> [n, d]."""
        return rows.flatten(1) @ self.joint + self.joint_bias

    def refine(self, rows: Tensor, keys: Tensor, phi: Phi, chunk_size: int) -> Tensor:
        """`X_m + ReLU(C_m E W_H,m)` for every modality: float [n, M, d] -> [n, M, d]."""
        refined = []
        for modality in range(rows.shape[1]):
            queries = rows[:, modality] @ self.correlation[modality]
            attended = attend(queries, keys, phi, chunk_size)
            refined.append(rows[:, modality] + torch.relu(attended @ self.hidden[modality]))
        return torch.stack(refined, dim=1)


class RecursiveCrossModalAttention(nn.Module):
    """R passes of cross-modal refinement with one set of weights each.

    Keys and values are the joint rows of the items; item rows and user rows are queries through the same
    weights. The paper leaves both open.

    Args:
        num_modalities: M >= 1.
        dim: d.
        num_recursions: R >= 0; with 0 the rows pass unchanged.
        phi: correlation function.
        generator: of the initial weights.
    """

    def __init__(
        self, num_modalities: int, dim: int, num_recursions: int, phi: Phi, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.phi: Phi = phi
        self.recursions = nn.ModuleList(Recursion(num_modalities, dim, generator) for _ in range(num_recursions))

    def forward(self, items: Tensor, queries: Tensor, chunk_size: int = 4096) -> tuple[Tensor, Tensor]:
        """Refine item rows, and other rows that look at them.

        Args:
            items: float [num_items, M, d]; the keys of every pass are made from them.
            queries: float [n, M, d], users or further items.
            chunk_size: rows and keys per block.

        Returns:
            refined items [num_items, M, d] and refined queries [n, M, d].
        """
        for recursion in self.recursions:
            assert isinstance(recursion, Recursion)
            keys = recursion.joint_rows(items)
            queries = recursion.refine(queries, keys, self.phi, chunk_size)
            items = recursion.refine(items, keys, self.phi, chunk_size)
        return items, queries


def _xavier(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    bound = (6 / (shape[-2] + shape[-1])) ** 0.5
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
