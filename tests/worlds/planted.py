"""Data sets with a known answer, for tests of what learns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.graph.exact import search
from crane_core.graph.item_graph import build_graph
from crane_core.model.content import Content
from crane_core.model.propagation import SymmetricGraph


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


def checkerboard_content(seed: int = 0) -> Content:
    """Two modalities of the checkerboard's items and users that know the group through noise."""
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(4, 2, 5))
    items, users = (
        torch.nn.functional.normalize(torch.from_numpy(centers[groups] + 0.3 * noise).float(), dim=2)
        for groups, noise in (
            (np.arange(32) // 8, generator.normal(size=(32, 2, 5))),
            (np.arange(40) // 10, generator.normal(size=(40, 2, 5))),
        )
    )
    neighbours, _ = search(items.flatten(1).numpy(), range(32), 4)
    graph = SymmetricGraph(build_graph(neighbours.astype(np.int32)), torch.device("cpu"))
    return Content(items, graph, users)


@dataclass(frozen=True)
class Communities:
    """Users who mostly meet the items of their own group, popular ones first.

    Attributes:
        interactions: validation and test hold warm and cold items, and no cold item is in both.
        groups: int [num_items], the group of each item.
    """

    interactions: Interactions
    groups: np.ndarray


def communities(seed: int, num_groups: int = 4, users_per_group: int = 60, items_per_group: int = 60) -> Communities:
    """240 users and 240 items, a fifth of them cold, a tenth each for validation and test.

    A user meets ten warm items of the own group and four of others, and is held out three warm items and two cold ones
    of the own group for validation, and as many for test.
    """
    generator = np.random.default_rng(seed)
    num_users, num_items = num_groups * users_per_group, num_groups * items_per_group
    groups, place = np.divmod(np.arange(num_items), items_per_group)
    tenth = 10 * place // items_per_group
    is_cold = tenth >= 8
    parts: list[list[tuple[int, int]]] = [[], [], []]
    for user in range(num_users):
        own = groups == user // users_per_group
        wanted = np.where(own & ~is_cold, 1 / (5 + place), 0)
        near = generator.choice(num_items, 16, replace=False, p=wanted / wanted.sum())
        far = generator.choice(np.flatnonzero(~own & ~is_cold), 4, replace=False)
        new = [generator.choice(np.flatnonzero(own & (tenth == part)), 2, replace=False) for part in (9, 8)]
        for split, chosen in enumerate(([*near[:10], *far], [*near[10:13], *new[0]], [*near[13:], *new[1]])):
            parts[split] += [(user, int(item)) for item in chosen]
    train, validation, test = (ItemLists.from_pairs(*np.array(pairs, dtype=np.int32).T, num_users) for pairs in parts)
    return Communities(Interactions(num_users, num_items, train, validation, test), groups)
