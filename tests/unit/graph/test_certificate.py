"""The certificate of the item graph: recall by hand, strata, and lift."""

import numpy as np

from crane_core.dataset.interactions import ItemLists
from crane_core.graph.certificate import certify, co_interaction_lift, stratified_sample


def test_certificate_counts_what_is_missing() -> None:
    neighbours = np.array([[1, 2], [0, 2], [0, 3], [2, 9]], dtype=np.int32)
    truth = np.array([[1, 2], [0, 2], [0, 1], [2, 1]], dtype=np.int32)
    certificate = certify(neighbours, {"head": (np.array([0, 1]), truth[:2]), "tail": (np.array([2, 3]), truth[2:])}, 0)
    assert certificate["recall"]["mean"] == 0.75
    assert certificate["recall"]["low"] < 0.75 < certificate["recall"]["high"]
    assert certificate["strata"]["head"]["recall"] == 1.0
    assert certificate["strata"]["tail"]["recall"] == 0.5


def test_sample_covers_every_stratum() -> None:
    counts = np.array([0] * 10 + [1] * 40 + [50] * 10)
    sample = stratified_sample(counts, 15, seed=0)
    assert {name: len(rows) for name, rows in sample.items()} == {"head": 5, "tail": 5, "cold": 5}
    assert (counts[sample["cold"]] == 0).all()
    assert (counts[sample["head"]] == 50).all()
    assert len(stratified_sample(np.array([3]), 15, seed=0)["head"]) == 1


def test_lift_tells_a_graph_of_behaviour_from_garbage() -> None:
    users, items = np.divmod(np.arange(40 * 10), 10)
    items = (items + 10 * (users % 4)).astype(np.int32)
    train = ItemLists.from_pairs(users, items, 40)
    within = np.array([[(i // 10) * 10 + (i + 1) % 10] for i in range(40)], dtype=np.int32)
    across = np.array([[(i + 10) % 40] for i in range(40)], dtype=np.int32)
    assert co_interaction_lift(within, train, 40, seed=0)["lift"] > 3
    assert co_interaction_lift(across, train, 40, seed=0)["neighbours"] == 0
