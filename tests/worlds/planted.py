"""Data sets with a known answer, for tests of models and searches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from crane_core.config import Refine
from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.dataset.modalities import Modality
from crane_core.graph.exact import search
from crane_core.graph.item_graph import build_graph
from crane_core.model.content import Content
from crane_core.model.propagation import SymmetricGraph


def checkerboard(num_groups: int = 4, users_per_group: int = 10, items_per_group: int = 8) -> Interactions:
    """Make users who have all items of their own group and no others; two items of each are held out."""
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
    """Make content of the checkerboard in two modalities: the group of an item or user, with noise."""
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
    """Users who mostly have items of their own group, the more popular ones more often.

    Attributes:
        interactions: validation and test have warm and cold items; no cold item is in both.
        groups: int [num_items], the group of each item.
    """

    interactions: Interactions
    groups: np.ndarray


def communities(seed: int, num_groups: int = 4, users_per_group: int = 60, items_per_group: int = 60) -> Communities:
    """Make 240 users and 240 items. A fifth of the items is cold, one half for validation and one half for test.

    A user has ten warm training items of the own group and four of other groups. Three warm and two cold items of the
    own group are held out for validation, and as many for test.
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


REFINE = Refine(embedding_dim=8, num_steps=60, batch_size=64, num_landmarks=64, learning_rate=0.01, chunk_size=7)
"""A refiner small enough for `planted_modalities`."""


def planted_modalities(noise: float = 2.0) -> list[Modality]:
    """Make two modalities of the checkerboard: the group of an item, with noise. Every fifth item lacks the second."""
    interactions = checkerboard()
    generator = np.random.default_rng(0)
    groups = np.arange(interactions.num_items) // 8
    modalities = []
    for number, dim in enumerate((6, 5)):
        centers = generator.normal(size=(4, dim)) * 2
        items = (centers[groups] + noise * generator.normal(size=(len(groups), dim))).astype(np.float32)
        present = np.ones(len(items), dtype=bool) if number == 0 else np.arange(len(items)) % 5 > 0
        items[~present] = 0
        users = interactions.train.users()
        profiles = np.zeros((interactions.num_users, dim), dtype=np.float32)
        np.add.at(profiles, users, items[interactions.train.items])
        counts = np.bincount(users, weights=present[interactions.train.items], minlength=interactions.num_users)
        modalities.append(Modality(f"m{number}", items, present, profiles, counts.astype(np.int32)))
    return modalities


def halves(modalities: list[Modality], dtype: str) -> list[Modality]:
    """Round the items to half precision and store them in another number type."""
    rounded = [each.items.astype(np.float16).astype(dtype) for each in modalities]
    return [dataclasses.replace(each, items=items) for each, items in zip(modalities, rounded, strict=True)]


def make_rows(kind: str) -> np.ndarray:
    """Make random rows, or rows that are hard for a search, such as near ties or duplicates: float32 [150, 8]."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(150, 8)).astype(np.float32)
    if kind == "clustered":
        return rows[:10].repeat(15, axis=0) + 0.01 * rows
    if kind == "near_ties":
        return rows[:3].repeat(50, axis=0) + 1e-4 * rows
    if kind == "duplicates":
        return rows[generator.integers(5, size=150)]
    if kind == "some_duplicates":
        rows[40:80] = rows[0]
    if kind == "zeros":
        rows[::3] = 0
    return rows


def item_lists(*rows: list[int]) -> ItemLists:
    """Make item lists of users 0, 1, .., one argument for each."""
    users = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return ItemLists.from_pairs(users, np.array([i for row in rows for i in row], dtype=np.int32), len(rows))
