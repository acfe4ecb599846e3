"""A data set with one right answer, for tests of what learns."""

from __future__ import annotations

import numpy as np

from crane_core.dataset import Interactions, ItemLists


def checkerboard(num_groups: int = 4, users_per_group: int = 10, items_per_group: int = 8) -> Interactions:
    """Users meet the items of their own group and no others; two items of each user are held out."""
    parts: list[list[tuple[int, int]]] = [[], [], []]
    for user in range(num_groups * users_per_group):
        group = user // users_per_group
        items = [group * items_per_group + (user + i) % items_per_group for i in range(items_per_group)]
        for split, chosen in enumerate((items[2:], items[:1], items[1:2])):
            parts[split] += [(user, item) for item in chosen]
    num_users, num_items = num_groups * users_per_group, num_groups * items_per_group
    train, validation, test = (ItemLists.from_pairs(*np.array(pairs, dtype=np.int32).T, num_users) for pairs in parts)
    return Interactions(num_users, num_items, train, validation, test)
