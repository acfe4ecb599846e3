"""The ranking losses and the contrast between two views."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crane_core.model.views import Batch, Picked, Sample


def bpr(users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Return `-log sigmoid` of score differences (Rendle et al., UAI 2009): float32 [n, d] each -> [n]."""
    return F.softplus(-(users * (positives - negatives)).sum(1))


def sampled_softmax(
    users: Tensor, positives: Tensor, negatives: Tensor, met: Tensor, temperature: float, rows: Tensor | None = None
) -> Tensor:
    """Return the sampled softmax loss over cosines (Wu et al., arXiv 2201.02327).

    It is the negative log probability of the positive among itself and the negatives.

    Args:
        users: float32 [u, d].
        positives: float32 [n, d].
        negatives: float32 [m, d], shared by all rows.
        met: bool [u, m], negatives that a user has met; they are left out of its softmax.
        temperature: what the cosines are divided by.
        rows: int64 [n], the user of each row. Its negatives are scored once, however many rows it has. None: u = n,
            and row i is of user i.

    Returns:
        float32 [n].
    """
    users, positives, negatives = (F.normalize(rows, dim=1) for rows in (users, positives, negatives))
    users = users / temperature
    others = log_sum_exp(users, negatives, met)
    if rows is not None:
        users, others = users.index_select(0, rows), others.index_select(0, rows)
    return F.softplus(others - (users * positives).sum(1))


def log_sum_exp(left: Tensor, right: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Return the logarithm of the sum over j of `exp(left_i . right_j)`.

    One block of n x m numbers serves from the scores to the gradient.

    Args:
        left: float32 [n, d].
        right: float32 [m, d].
        left_out: bool [n, m], the pairs that are not in the sum.

    Returns:
        float32 [n]; -inf where all pairs are left out.
    """
    return _LogSumExp.apply(left, right, left_out)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, left_out: Tensor | None) -> Tensor:
        scores = left @ right.T
        if left_out is not None:
            scores.masked_fill_(left_out, -torch.inf)
        limits = torch.finfo(scores.dtype)
        largest = scores.amax(1).clamp(min=limits.min)
        weights = scores.sub_(largest[:, None]).exp_()
        total = weights.sum(1)
        ctx.save_for_backward(left, right, weights, total.clamp(min=limits.tiny))
        return largest + total.log()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right, weights, total = ctx.saved_tensors
        share = (gradients[0] / total)[:, None]
        # As the transpose of a product with rows of `weights` as they lie, the second takes a quarter less.
        return share * (weights @ right), ((share * left).T @ weights).T, None


def info_nce(
    anchors: Tensor | Picked,
    others: Tensor | Picked,
    nodes: Tensor | Sample,
    batch: Batch,
    temperature: float,
    false: Tensor | None = None,
) -> Tensor:
    """Return the InfoNCE loss of two views of the same nodes, by cosine (van den Oord et al., arXiv 1807.03748).

    The positive of a node is itself in the other view; its negatives are the other distinct nodes given, over all
    ranks, the false ones left out. Of a sample each negative stands for `(num_distinct - 1) / (n - 1)` of them.

    Args:
        anchors, others: float32 [num_nodes, d], the views.
        nodes: int64 [n], nodes of the batch, repeats allowed; or a sample of the distinct ones.
        batch: says which of the distinct nodes are this rank's.
        temperature: tau.
        false: bool [distinct nodes, distinct nodes], both ascending: pairs that are no negatives.

    Returns:
        Sum over this rank's distinct nodes, divided by the number of distinct nodes of the batch or the sample.
    """
    distinct, num_distinct = nodes if isinstance(nodes, Sample) else (torch.unique(nodes), 0)
    own = batch.mine(torch.arange(len(distinct), device=distinct.device))
    left = F.normalize(anchors[distinct[own]], dim=1) / temperature
    right = F.normalize(others[distinct], dim=1)
    left_out = own[:, None] == torch.arange(len(distinct), device=distinct.device)
    negatives = log_sum_exp(left, right, left_out if false is None else left_out | false[own])
    if num_distinct > len(distinct) > 1:
        negatives = negatives + math.log((num_distinct - 1) / (len(distinct) - 1))
    return F.softplus(negatives - (left * right[own]).sum(1)).sum() / len(distinct)
