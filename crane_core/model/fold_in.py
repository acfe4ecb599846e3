"""Fold-in: the row of a user, made of a history by sums over rows of its items.

A part of the row, a block, is `constant + sum_j v_j h_j / (sum_j v_j)^power`, where `h_j` is the item's row here and
`v_j` is what its event counts: its weight, halved every `half_life` days of its age. So a user whom the model has never
met gets a row by one gather and one sum, and every item of the history has its own part of each score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp

ROWS, CONSTANT = "history_rows", "history_constant"
"""Names of the arrays in `embeddings.safetensors`."""
FOLD_IN = "history.json"
"""File of an export with all but the arrays."""


@dataclass(frozen=True)
class Block:
    """Neighbouring coordinates of a user's row that are made by one kind of sum.

    Attributes:
        width: number of coordinates.
        half_life: days in which an event of the history loses half of its weight; None for no decay.
        power: of the sum of the weights that the sum of the rows is divided by: 0 is a sum, 1 a mean.
    """

    width: int
    half_life: float | None = None
    power: float = 0.0


@dataclass(frozen=True)
class History:
    """Events of some users, grouped by user.

    Attributes:
        users: int [m] positions of the users, ascending.
        items: int [m] rows of the items.
        weights: float [m], above 0.
        ages: float [m] days; None where there are no times, and then nothing decays.
    """

    users: np.ndarray
    items: np.ndarray
    weights: np.ndarray
    ages: np.ndarray | None = None


@dataclass(frozen=True)
class FoldIn:
    """Makes a user's row of a history.

    Attributes:
        rows: float32 [num_items, d], the row that each item of a history adds.
        constant: float32 [d], of every user.
        blocks: of the coordinates, in their order.
        weight: of an event whose weight is not known: the mean of the training interactions.
        end: instant at which the training interactions end and ages are 0; None where the data have no times.
    """

    rows: np.ndarray
    constant: np.ndarray
    blocks: tuple[Block, ...]
    weight: float = 1.0
    end: datetime | None = None

    def fold(self, history: History, num_users: int) -> np.ndarray:
        """Return the rows of the users: float32 [num_users, d]; without events a user's row is the constant."""
        factors = self.factors(history, num_users)
        folded = np.tile(self.constant, (num_users, 1))
        for part, columns in zip(factors.T, self._columns(), strict=True):
            shape = num_users, len(self.rows)
            folded[:, columns] += sp.csr_array(
                (part, (history.users, history.items)), shape=shape
            ) @ np.ascontiguousarray(self.rows[:, columns])
        return folded

    def factors(self, history: History, num_users: int) -> np.ndarray:
        """Return what the row of each event's item is multiplied by in each block: float32 [m, num_blocks]."""
        found = np.empty((len(history.items), len(self.blocks)), dtype=np.float32)
        for number, block in enumerate(self.blocks):
            values = history.weights.astype(np.float64)
            if block.half_life is not None and history.ages is not None:
                values = values * 0.5 ** (history.ages / block.half_life)
            if block.power:
                sums = np.bincount(history.users, weights=values, minlength=num_users)
                values = values / np.maximum(sums[history.users], np.finfo(np.float64).tiny) ** block.power
            found[:, number] = values
        return found

    def of_items(self, items: np.ndarray) -> FoldIn:
        """Return the same with the rows of some items, int [n], in their order."""
        return replace(self, rows=self.rows[items])

    def times(self, factor: float) -> FoldIn:
        """Return what makes the same rows, multiplied by a number."""
        return replace(self, rows=self.rows * np.float32(factor), constant=self.constant * np.float32(factor))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by their names in a file."""
        return {ROWS: self.rows, CONSTANT: self.constant}

    def facts(self) -> dict[str, Any]:
        """Return all but the arrays as JSON values."""
        edges = self._columns()
        return {
            "weight": self.weight,
            "end": self.end and self.end.isoformat(),
            "blocks": [
                {"columns": [part.start, part.stop], "half_life": block.half_life, "power": block.power}
                for part, block in zip(edges, self.blocks, strict=True)
            ],
        }

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> FoldIn:
        """Return what `arrays` and `facts` describe.

        Raises:
            ValueError: they do not fit together; also KeyError and TypeError.
        """
        rows, constant = arrays[ROWS], arrays[CONSTANT]
        edges = [each["columns"] for each in facts["blocks"]]
        if [0, *(stop for _, stop in edges)] != [*(start for start, _ in edges), rows.shape[1]]:
            raise ValueError(f"blocks of the columns {edges} for {rows.shape[1]} columns")
        if constant.shape != rows.shape[1:]:
            raise ValueError(f"a constant of shape {constant.shape} for {rows.shape[1]} columns")
        blocks = tuple(
            Block(stop - start, each["half_life"], float(each["power"]))
            for (start, stop), each in zip(edges, facts["blocks"], strict=True)
        )
        end = facts["end"] and datetime.fromisoformat(facts["end"])
        return cls(rows, constant, blocks, float(facts["weight"]), end)

    def _columns(self) -> list[slice]:
        edges = np.cumsum([0, *(block.width for block in self.blocks)]).tolist()
        return [slice(start, stop) for start, stop in pairwise(edges)]


def summed(rows: np.ndarray, half_life: float | None, power: float = 0.0) -> FoldIn:
    """Return the fold-in of users whose rows are decayed sums of the items' rows, float32 [num_items, d].

    The sums are divided by this power of the sum of the weights.
    """
    constant = np.zeros(rows.shape[1], dtype=np.float32)
    return FoldIn(rows.astype(np.float32, copy=False), constant, (Block(rows.shape[1], half_life, power),))


def same_for_all(constant: np.ndarray, num_items: int) -> FoldIn:
    """Return the fold-in of coordinates that are the same for all users, float32 [d]."""
    return FoldIn(np.zeros((num_items, len(constant)), dtype=np.float32), constant, (Block(len(constant)),))


def side_by_side(parts: Sequence[FoldIn]) -> FoldIn:
    """Return the fold-in of rows that stand side by side; weight and end are those of the first."""
    return replace(
        parts[0],
        rows=np.concatenate([part.rows for part in parts], axis=1),
        constant=np.concatenate([part.constant for part in parts]),
        blocks=tuple(block for part in parts for block in part.blocks),
    )
