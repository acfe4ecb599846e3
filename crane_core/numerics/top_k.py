"""Find the k largest scores of every row, exactly and in about one pass over the scores."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

GROUP = 128
"""Columns in a group. Groups of 64 and 256 were as fast with 40,000 items."""
FEWEST_GROUPS = 4
"""With fewer groups than this many times k, comparing groups first saves no time."""


def top_k(scores: Tensor, k: int, scattered: bool | None = None) -> tuple[Tensor, Tensor]:
    """Compute `scores.topk(k, dim=1)` for wide rows.

    The k largest scores of a row lie in the k groups of columns with the largest maxima. One pass finds the maximum of
    each group; then only the columns of k groups are ranked. torch's own selection reads each score several times and
    took 40 times as long. Among equal scores the choice is undefined, as in torch.

    Args:
        scores: float32 [n, m], contiguous, no NaN.
        k: at most m.
        scattered: a group is every so-many-th column, as a GPU reads them fastest, or consecutive columns, as a CPU
            does; by the device when None.

    Returns:
        float32 [n, k] scores, falling, and int64 [n, k] columns.
    """
    num_rows, num_columns = scores.shape
    num_groups = num_columns // GROUP
    if num_groups < FEWEST_GROUPS * k:
        return scores.topk(k, dim=1)
    whole, place = num_groups * GROUP, torch.arange(GROUP, device=scores.device)
    if scores.is_cuda if scattered is None else scattered:
        maxima = scores[:, :whole].unflatten(1, (GROUP, num_groups)).amax(1)
        within = maxima.topk(k, dim=1, sorted=False).indices[:, :, None] + place * num_groups
    else:
        maxima = scores[:, :whole].unflatten(1, (num_groups, GROUP)).amax(2)
        within = maxima.topk(k, dim=1, sorted=False).indices[:, :, None] * GROUP + place
    # The columns behind the last whole group are always ranked.
    rest = torch.arange(whole, num_columns, device=scores.device).expand(num_rows, -1)
    columns = torch.cat([within.flatten(1), rest], dim=1)
    values, positions = scores.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, positions)


class Groups:
    """The groups that columns belong to.

    Args:
        of_columns: int [m], group of each column; -1 for none.
        most: columns of a group that a list may hold, 1 or more; of columns without a group it may hold any number.
        device: of the scores.

    Attributes:
        num_left_out: columns that would have been among the k best of a row, but for the groups.
    """

    def __init__(self, of_columns: np.ndarray, most: int, device: torch.device) -> None:
        self.most, self.num_left_out = most, 0
        self.of_columns = torch.from_numpy(of_columns.astype(np.int64)).to(device)
        order = np.argsort(of_columns, kind="stable")
        starts = np.searchsorted(of_columns[order], np.arange(of_columns.max(initial=-1) + 2))
        columns = torch.from_numpy(order).to(device)
        self._columns = [columns[start:stop] for start, stop in itertools.pairwise(starts.tolist())]

    def within(self, columns: Tensor) -> Tensor:
        """Return which entries of some lists remain if later ones of a full group are left out: bool [n, k]."""
        own = self.of_columns[columns]
        ordered, order = own.sort(dim=1, stable=True)
        places = torch.arange(own.shape[1], device=own.device).expand_as(own)
        is_first = torch.ones_like(ordered, dtype=torch.bool)
        is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        before = places - torch.where(is_first, places, 0).cummax(1).values
        return torch.empty_like(is_first).scatter_(1, order, (before < self.most) | (ordered < 0))

    def leave_out(self, scores: Tensor, taken: Tensor) -> None:
        """Set the scores of all columns of groups that are full, but for those taken, to -inf.

        Args:
            scores: float32 [m], written.
            taken: int64, columns that a list holds.
        """
        own, kept = self.of_columns[taken], scores[taken]
        found, counts = own[own >= 0].unique(return_counts=True)
        full = [self._columns[group] for group in found[counts >= self.most].tolist()]
        scores[torch.cat(full)] = -torch.inf
        scores[taken] = kept


def grouped_top_k(scores: Tensor, k: int, groups: Groups) -> tuple[Tensor, Tensor]:
    """Find the k largest scores of every row of which no more are of one group than it may have, exactly.

    The result is that of a walk along the falling scores that passes over the columns of a group once it is full. The
    best `2 k` columns are enough for most rows. The others go on one by one, without what is left of their full groups;
    another group is full after each pass, so a row takes `k` at most.

    Args:
        scores: float32 [n, m], contiguous, no NaN; -inf is never found. May be written.
        k: at most m.
        groups: of the columns; counts what it leaves out.

    Returns:
        float32 [n, k] scores, falling, -inf where fewer than k are found; int64 [n, k] columns.
    """
    values, columns, taken = _walk(scores, k, groups)
    groups.num_left_out += int((~taken & (values > -torch.inf))[:, :k].sum())
    for row in _unfinished(values, taken, scores, k).nonzero()[:, 0].tolist():
        own, found = scores[row : row + 1], (values[row : row + 1], columns[row : row + 1], taken[row : row + 1])
        while _unfinished(found[0], found[2], own, k).any():
            groups.leave_out(own[0], found[1][found[2]])
            found = _walk(own, k, groups)
        values[row], columns[row], taken[row] = (part[0] for part in found)
    places = taken.cumsum(1)
    # What is not among the k first goes to a place of its own.
    places = torch.where(taken & (places <= k), places - 1, k)
    found_values = scores.new_full((len(scores), k + 1), -torch.inf).scatter_(1, places, values)
    return found_values[:, :k], columns.new_zeros(len(scores), k + 1).scatter_(1, places, columns)[:, :k]


def _walk(scores: Tensor, k: int, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best `2 k` scores, their columns, and whether a walk takes them: [n, w] each."""
    values, columns = top_k(scores, min(2 * k, scores.shape[1]))
    return values, columns, groups.within(columns) & (values > -torch.inf)


def _unfinished(values: Tensor, taken: Tensor, scores: Tensor, k: int) -> Tensor:
    """Return the rows that have taken fewer than k columns while some are left: bool [n]."""
    return (taken.sum(1) < k) & (values[:, -1] > -torch.inf) & (values.shape[1] < scores.shape[1])
