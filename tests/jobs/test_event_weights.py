"""The weight of an event type reaches the ETL's rows, the profiles and the trained rows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from crane_core.dataset.interactions import load_ids, load_interactions
from crane_core.errors import EXIT_OK
from crane_core.schema import USER_ID
from crane_core.storage.artifacts import ArtifactStore
from jobs.etl import features, interactions, profiles
from jobs.ml import behaviour
from jobs.ml.training import load_embeddings
from jobs.stores import open_store
from tests.worlds.raw_data import at, write_vectors

pytestmark = pytest.mark.spark

NUM_USERS, NUM_ITEMS, NUM_DAYS = 40, 30, 30
STAGES = {
    "etl.interactions": interactions,
    "etl.features": features,
    "etl.profiles": profiles,
    "ml.behaviour": behaviour,
}
SETTINGS = (
    "window.start=2026-01-30",
    "window.end=2026-01-31",
    "lightgcn.embedding_dim=8",
    "train.num_epochs=6",
    "train.batch_size=128",
    "train.learning_rate=0.02",
    "runtime.num_threads=1",
)
Event = tuple[str, str, float, str]
"""User, item, days after 2026-01-01, type."""


@pytest.fixture(scope="module")
def events() -> list[Event]:
    """Users of two groups view items of both groups and buy those of their own; every fifth event is a purchase."""
    generator = np.random.default_rng(0)
    found = []
    for day in np.sort(generator.uniform(0, NUM_DAYS, 1500)):
        user, is_purchase = generator.integers(NUM_USERS), generator.random() < 0.2
        group = user % 2 if is_purchase else generator.integers(2)
        item = 2 * generator.integers(NUM_ITEMS // 2) + group
        found.append((f"u{user}", f"i{item}", float(day), "purchase" if is_purchase else "view"))
    return found


def trained(folder: Path, events: Sequence[Event], weights: str) -> ArtifactStore:
    """Run the stages over the events with `etl.event_weights`."""
    for day in range(NUM_DAYS):
        rows = [
            (user, item, at("2026-01-01") + timedelta(days=t), kind) for user, item, t, kind in events if int(t) == day
        ]
        columns = [pa.array(column) for column in zip(*rows, strict=True)]
        columns[2] = columns[2].cast(pa.timestamp("us", "UTC"))
        path = (
            folder / "raw" / "interactions" / f"dt={at('2026-01-01') + timedelta(days=day):%Y-%m-%d}" / "part-0.parquet"
        )
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table(columns, names=["user_id", "item_id", "event_time", "event_type"]), path)
    vectors = [(f"i{number}", [float(number % 2), 1.0, number / NUM_ITEMS]) for number in range(NUM_ITEMS)]
    write_vectors(folder / "raw", "text", vectors)
    store = str(folder / "store")
    settings = [*SETTINGS, f"runtime.raw={folder / 'raw'}", f"etl.event_weights={weights}"]
    for job in STAGES.values():
        flags = [flag for setting in settings for flag in ("--set", setting)]
        assert job.main(["--store", store, "--run", "weighed", *flags]) == EXIT_OK
    return open_store(store)


def content(store: ArtifactStore, stage: str) -> dict[str, bytes]:
    """Return the arrays and rows that a stage left: file to bytes."""
    artifact = store.artifact("weighed", stage)
    files = [path for path in sorted(artifact.path.rglob("*")) if path.suffix in (".npy", ".safetensors")]
    return {str(path.relative_to(artifact.path)): path.read_bytes() for path in files}


def test_events_of_weight_0_are_set_aside_as_if_they_had_not_happened(tmp_path: Path, events: list[Event]) -> None:
    weighed = trained(tmp_path / "weighed", events, "{view: 0, purchase: 1}")
    purchases = [event for event in events if event[3] == "purchase"]
    alone = trained(tmp_path / "alone", purchases, "{purchase: 1}")
    for stage in ("etl.profiles", "ml.behaviour"):
        assert content(weighed, stage) == content(alone, stage)
        assert content(weighed, stage)
    facts = weighed.artifact("weighed", "etl.interactions").facts
    assert facts["quarantine"]["zero_weight"] == len(events) - len(purchases)


def test_a_larger_weight_pulls_users_towards_what_they_bought(tmp_path: Path, events: list[Event]) -> None:
    equal = trained(tmp_path / "equal", events, "{view: 1, purchase: 1}")
    heavy = trained(tmp_path / "heavy", events, "{view: 1, purchase: 100}")
    log = load_interactions(heavy.artifact("weighed", "etl.interactions"))
    assert log.weights is not None and sorted(set(log.weights.tolist())) == [1, 100]
    assert load_interactions(equal.artifact("weighed", "etl.interactions")).weights is None
    assert content(equal, "etl.profiles") != content(heavy, "etl.profiles")
    assert preference(heavy) > preference(equal) + 0.3


def preference(store: ArtifactStore) -> float:
    """Return by how many standard deviations users score items of their own group above those of the other."""
    source = store.artifact("weighed", "etl.interactions")
    users, items = load_embeddings(store.artifact("weighed", "ml.behaviour"))
    groups = [
        torch.tensor([int(name[1:]) % 2 for name in load_ids(source, table, column).to_pylist()])
        for table, column in (("users", USER_ID), ("items", "item_id"))
    ]
    scores = users @ items.T
    same = groups[0][:, None] == groups[1][None]
    return float((scores[same].mean() - scores[~same].mean()) / scores.std())
