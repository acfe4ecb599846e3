"""Find the item of a user's history that adds most to the score of a recommended item, by the sums of the fold-in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from crane_core.dataset.interactions import ItemLists
from crane_core.evaluation.baselines import first_unseen
from crane_core.evaluation.rules import ItemRules, no_rules
from crane_core.model.fold_in import FoldIn, History

_BLOCK_NUMBERS = 1 << 20
"""Numbers of rows of histories that are held at a time: 4 MiB; a single longer history is held whole."""


class Reasons:
    """Reasons of recommended items.

    Item j of the history adds `f_j h_j y_i` to the score of item i, where `h_j` is its row of the fold-in, `f_j` what
    that is multiplied by (`FoldIn.factors`) and `y_i` the row that i is scored by. The reason is the item that adds
    most; of equal ones the one with the lowest row. There is none where what is the same for all users, popularity
    and boosts above all, would have put the item into the user's list alone, and where no item of the history adds
    anything.

    Args:
        fold_in: of the model.
        items: float32 [num_items, d], by which scores are made.
        seen: items of each user's history.
        history: the same with weights and ages, in the order of `seen.items`.
        device: where the sums are computed.
        rules: what may be shown; None: all that a user does not have.
    """

    def __init__(
        self,
        fold_in: FoldIn,
        items: np.ndarray,
        seen: ItemLists,
        history: History,
        device: torch.device,
        rules: ItemRules | None = None,
    ) -> None:
        self._fold_in, self._seen, self._history, self._device = fold_in, seen, history, device
        self._places = ItemLists(seen.indptr, np.arange(len(seen.items)))
        # Blocks stay apart: the factor of an event is then one number for a score, and not one for a coordinate.
        widths = [block.width for block in fold_in.blocks]
        self._width = max(widths)
        self._items, self._rows = (
            [part.contiguous().to(device) for part in torch.from_numpy(rows).split(widths, dim=1)]
            for rows in (items, fold_in.rows)
        )
        self._adds = [bool(rows.any()) for rows in self._rows]
        rules = rules or no_rules(len(items))
        added, self._had = rules.added, rules.had(seen)
        order = np.argsort(-(items @ fold_in.constant + (0 if added is None else added)), kind="stable")
        self._popular = order[rules.factors[order] > 0]

    def of(self, users: np.ndarray, lists: np.ndarray) -> np.ndarray:
        """Return the reasons for the lists of some users.

        Args:
            users: int [n].
            lists: int [n, k] rows of items.

        Returns:
            int64 [n, k] rows of items of the users' histories, -1 where there is none.
        """
        popular = first_unseen(self._popular, self._had, users, lists.shape[1])
        is_popular = (lists[:, :, None] == popular[:, None, :]).any(2)
        found = np.full(lists.shape, -1, dtype=np.int64)
        wanted = np.flatnonzero(~is_popular.all(1))
        found[wanted] = self._largest(users[wanted], lists[wanted])
        found[is_popular] = -1
        return found

    def _largest(self, users: np.ndarray, lists: np.ndarray) -> np.ndarray:
        """Return the item of the history that adds most, -1 where none adds anything: int64 [n, k]."""
        found = np.empty(lists.shape, dtype=np.int64)
        starts, counts = self._seen.indptr[users], self._seen.counts()[users]
        factors, offsets = self._factors(users), np.concatenate([[0], np.cumsum(counts)])
        for part in self._parts(counts):
            places = np.arange(counts[part].max())
            is_event = places < counts[part, None]
            items = self._seen.items[np.where(is_event, starts[part, None] + places, 0)]
            own = factors[np.where(is_event, offsets[part, None] + places, 0)]
            added = self._added(items, own, lists[part])
            added[torch.from_numpy(~is_event).to(self._device)] = -torch.inf
            most, best = (each.cpu().numpy() for each in added.max(dim=1))
            found[part] = np.where(most > 0, np.take_along_axis(items, best, axis=1), -1)
        return found

    def _factors(self, users: np.ndarray) -> np.ndarray:
        """Return the factors of the users' events, one user after the other: float32 [m, num_blocks]."""
        positions, events = self._places.rows(users)
        whole = self._history
        ages = None if whole.ages is None else whole.ages[events]
        return self._fold_in.factors(History(positions, whole.items[events], whole.weights[events], ages), len(users))

    def _parts(self, counts: np.ndarray) -> Iterator[np.ndarray]:
        """Yield positions of users whose histories are about as long: a part is held at the length of the longest."""
        order = np.argsort(counts, kind="stable")
        width, start = self._width, 0
        while start < len(order):
            lengths = counts[order[start:]]
            sizes = lengths.astype(np.int64) * np.arange(1, len(lengths) + 1) * width
            within = (sizes <= _BLOCK_NUMBERS) & (lengths <= 1.25 * lengths[0] + 4)
            # Both bounds rise along the order.
            stop = start + max(1, int(within.sum()))
            yield order[start:stop]
            start = stop

    def _added(self, items: np.ndarray, factors: np.ndarray, lists: np.ndarray) -> Tensor:
        """Return what each event adds to each score of a list, float32 [b, n, k], for b users of n events."""
        events, scored = (torch.from_numpy(rows.astype(np.int64)).to(self._device) for rows in (items, lists))
        weights = torch.from_numpy(factors).to(self._device)
        total = weights.new_zeros(*events.shape, scored.shape[1])
        for number, adds in enumerate(self._adds):
            if adds:
                sums = torch.bmm(self._rows[number][events], self._items[number][scored].transpose(1, 2))
                total.addcmul_(sums, weights[:, :, number, None])
        return total
