"""What models find and show by the evidence of items, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.evaluation.evidence import EDGES, buckets_of, summarise_evidence


def made() -> Interactions:
    generator = np.random.default_rng(0)
    num_users, num_items = 150, 60
    appeal = 1 / np.arange(1, num_items + 1) ** 1.3
    appeal[-6:] = 0
    train = [
        (user, item) for user in range(num_users) for item in generator.choice(60, 8, False, appeal / appeal.sum())
    ]
    test = [(user, item) for user in range(0, num_users, 2) for item in generator.choice(60, 3, False)]
    lists = [ItemLists.from_pairs(*np.array(pairs).T.astype(np.int32), num_users) for pairs in (train, test)]
    nothing = ItemLists(np.zeros(num_users + 1, dtype=np.int64), np.empty(0, dtype=np.int32))
    return Interactions(num_users, num_items, lists[0], nothing, lists[1], tombstones=np.array([59]))


def test_every_item_is_in_the_bucket_of_its_count() -> None:
    log = made()
    for bucket, count in zip(buckets_of(log, EDGES), log.item_counts(), strict=True):
        assert EDGES[bucket] <= count < (*EDGES, np.inf)[bucket + 1]


def test_found_and_shown_equal_plain_loops() -> None:
    log = made()
    users = np.arange(0, 150, 2)
    lists = np.array([np.random.default_rng(user).permutation(60)[:25] for user in users])
    lists[3, 10:] = -1
    found = summarise_evidence(log, users, {"some": lists})
    counts = log.item_counts()
    for bucket, edge in enumerate(EDGES):
        members = {item for item in range(60) if edge <= counts[item] < (*EDGES, np.inf)[bucket + 1]}
        assert found["items"][bucket] == len(members - {59})
        rows, hits, places = 0, 0, 0
        for number, user in enumerate(users):
            wanted = set(log.test.items[log.test.indptr[user] : log.test.indptr[user + 1]].tolist()) & members
            top = lists[number, :20].tolist()
            rows, hits = rows + len(wanted), hits + len(wanted & set(top))
            places += sum(item in members for item in top)
        assert found["rows"][bucket] == rows
        expected = pytest.approx(hits / rows) if rows else None
        assert found["models"]["some"]["found"][bucket] == expected
        assert found["models"]["some"]["share"][bucket] == pytest.approx(places / (20 * len(users) - 10))
