"""The live score against literal figures and against a plain computation from lists and log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from crane_core.config import Evaluate
from crane_core.evaluation.live import Period, load_judged, score_lists, write_per_user
from tests.worlds.live import Event, artifact_of, write_exported, write_source
from tests.worlds.raw_data import at

CONFIG = Evaluate(ks=(2, 20), num_bootstrap=100)
START, END = at("2026-01-10"), at("2026-01-11")
TRAINED = at("2026-01-05")
LOG: list[Event] = [
    ("a", "i1", at("2026-01-01")),
    ("b", "i1", at("2026-01-02")),
    ("b", "i2", at("2026-01-03")),
    ("c", "i3", at("2026-01-06")),
    ("a", "i3", at("2026-01-10 08:00")),
    ("a", "i9", at("2026-01-10 09:00")),
    ("c", "i1", at("2026-01-10 10:00")),
    ("z", "i2", at("2026-01-10 23:59")),
    ("b", "i3", at("2026-01-11")),
]
LISTS = {"a": ["i2", "i3"], "b": ["i3"], "c": ["i2", "i7", "i1"]}
POPULAR = ["i1", "i2", "i3"]


def scored(
    folder: Path,
    log: Sequence[Event],
    lists: dict,
    popular: Sequence[str],
    period: Period,
    half_life: float | None = None,
    weights: Sequence[float] = (),
) -> tuple[dict, dict]:
    """Return the report, and for each user the row of `per_user.parquet`."""
    facts = write_source(folder / "log", log, TRAINED, weights)
    write_exported(folder / "export", lists, popular)
    judged = load_judged(artifact_of(folder / "log", facts), period, half_life)
    report, per_user = score_lists(artifact_of(folder / "export", {}), judged, CONFIG)
    write_per_user(folder / "per_user.parquet", judged, per_user)
    rows = pq.read_table(folder / "per_user.parquet").to_pylist()
    return report, {row.pop("user_id"): row for row in rows}


def test_a_day_by_hand(tmp_path: Path) -> None:
    report, users = scored(tmp_path, LOG, LISTS, POPULAR, Period.of(START, START, END))
    assert set(users) == {"a", "c", "z"}, "who has no event in the period is not judged"
    assert {user: row["covered"] for user, row in users.items()} == {"a": True, "c": True, "z": False}
    ideal = 1 + 1 / math.log2(3)
    # One of two items at place 2; i9 is new, and no list can have it.
    assert users["a"]["champion.recall@2"] == 0.5 and users["a"]["num_relevant"] == 2
    assert users["a"]["champion.ndcg@2"] == pytest.approx(1 / math.log2(3) / ideal)
    # i7, which the log does not know, takes place 2.
    assert (users["c"]["champion.recall@2"], users["c"]["champion.hit@20"]) == (0.0, 1.0)
    assert users["c"]["champion.ndcg@20"] == pytest.approx(1 / math.log2(4))
    # Somebody new saw the popular list.
    assert users["z"]["champion.ndcg@20"] == pytest.approx(1 / math.log2(3))
    # Popular on 10 January are i1 (2), i2 and i3 (1 each); a has met i1, and c has met i3.
    assert users["a"]["recent_popularity.ndcg@2"] == pytest.approx(1 / math.log2(3) / ideal)
    assert users["c"]["recent_popularity.ndcg@2"] == 1.0
    assert users["z"]["recent_popularity.ndcg@20"] == pytest.approx(1 / math.log2(3))
    assert (report["users"], report["events"], report["covered"]) == (3, 4, pytest.approx(2 / 3))
    assert report["new_items"] == 0.25
    assert report["models"]["champion"]["recall@20"]["mean"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert report["covered_users"]["champion"]["recall@20"] == pytest.approx(0.75)
    assert report["differences"]["recent_popularity"]["recall@2"]["mean"] == pytest.approx((0.5 - 0.5 - 1 + 0) / 3)


def test_lists_are_judged_on_what_they_cannot_know() -> None:
    day = timedelta(days=1)
    assert Period.of(START, START, END) == Period(START, START, END)
    # The champion has stayed: its lists are older, the events are those of the window.
    assert Period.of(START - 3 * day, START, END) == Period(START - 3 * day, START, END)
    # A window that begins long before: only what the lists were not made from.
    assert Period.of(START, START - 30 * day, END) == Period(START, START, END)


def test_what_lies_between_the_export_and_the_window_is_neither_judged_nor_known(tmp_path: Path) -> None:
    period = Period.of(at("2026-01-04"), START, END)
    report, users = scored(tmp_path, LOG, LISTS, POPULAR, period)
    assert set(users) == {"a", "c", "z"} and report["new_items"] == 0.5, "i3 was met after the lists were made"
    # c has met i3 since; the list of before knows only i1 and i2.
    assert users["c"]["recent_popularity.ndcg@2"] == 1.0 and users["a"]["recent_popularity.recall@20"] == 0.0


def test_recent_popularity_halves_and_weighs(tmp_path: Path) -> None:
    log = [("a", "old", at("2026-01-01")), ("b", "old", at("2026-01-01")), ("c", "new", at("2026-01-04"))]
    log += [("d", "new", START), ("e", "old", START)]
    period = Period.of(START, START, END)
    for name, half_life, weights, first in (
        ("none", None, (), "old"),
        ("days", 2.0, (), "new"),
        ("weights", None, (1.0, 1.0, 2.5, 1.0, 1.0), "new"),
    ):
        _, users = scored(tmp_path / name, log, {}, ["old"], period, half_life, weights)
        found = {user: row["recent_popularity.recall@2"] for user, row in users.items()}
        assert found == {"d": 1.0 if first == "new" else 0.0, "e": 1.0 if first == "old" else 0.0}, name


@pytest.mark.parametrize("seed", range(5))
def test_any_log_equals_the_plain_computation(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    pairs = np.flatnonzero(random.random(20 * 30) < 0.3)
    log = [
        (f"u{pair // 30}", f"i{pair % 30}", at("2026-01-01") + timedelta(hours=int(hour)))
        for pair, hour in zip(random.permutation(pairs), random.integers(0, 24 * 11, len(pairs)), strict=True)
    ]
    lists = {f"u{user}": [f"i{item}" for item in random.permutation(30)[:8]] for user in range(0, 20, 2)}
    popular = [f"i{item}" for item in random.permutation(30)[:8]]
    made = at("2026-01-09") if seed % 2 else START
    report, users = scored(tmp_path, log, lists, popular, Period.of(made, START, END), 3.0)
    expected = plainly(log, lists, popular, made)
    assert set(users) == set(expected)
    for user, row in expected.items():
        for name, value in row.items():
            assert users[user][name] == pytest.approx(value, abs=1e-12), (user, name)
    for model in ("champion", "recent_popularity"):
        mean = np.mean([row[f"{model}.recall@20"] for row in expected.values()])
        assert report["models"][model]["recall@20"]["mean"] == pytest.approx(mean)
    assert report["covered"] == pytest.approx(np.mean([user in lists for user in expected]))


def plainly(log: Sequence[Event], lists: dict, popular: Sequence[str], made: datetime) -> dict[str, dict[str, float]]:
    """Return metrics of each user, from sets and loops."""
    counts: dict[str, float] = {}
    for _, item, time in log:
        if time < made:
            age = (made - time) / timedelta(days=1)
            counts[item] = counts.get(item, 0.0) + 0.5 ** (age / 3.0)
    order = sorted(counts, key=lambda item: (-counts[item], item))
    found = {}
    for user in {user for user, _, time in log if START <= time < END}:
        relevant = {item for who, item, time in log if who == user and START <= time < END}
        met = {item for who, item, time in log if who == user and time < made}
        shown = {
            "champion": lists.get(user, popular),
            "recent_popularity": [item for item in order if item not in met][:8],
        }
        found[user] = {
            f"{model}.{metric}": value
            for model, ranked in shown.items()
            for metric, value in (
                ("recall@20", len(relevant & set(ranked)) / len(relevant)),
                ("hit@2", float(bool(relevant & set(ranked[:2])))),
                (
                    "ndcg@20",
                    sum(1 / math.log2(place + 2) for place, item in enumerate(ranked) if item in relevant)
                    / sum(1 / math.log2(place + 2) for place in range(min(20, len(relevant)))),
                ),
            )
        }
    return found
