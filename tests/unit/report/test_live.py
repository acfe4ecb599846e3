"""The line of live scores: which runs are on it, and the chapter of the page."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from crane_core.config_file import load_config
from crane_core.report.live import NUM_RUNS, live_scores
from crane_core.report.run import render
from crane_core.storage.artifacts import ArtifactStore
from crane_core.storage.local import LocalStorage
from tests.worlds.raw_data import at

FIRST = at("2026-01-02")
INTERVAL = {"mean": 0.25, "low": 0.2, "high": 0.3}


def figures(recall: float) -> dict[str, Any]:
    """Return what the record of a run keeps of a score."""
    means = {"recall@20": recall, "ndcg@20": recall / 2, "hit@20": recall}
    return {"status": "scored", "version": "3", "models": {"champion": means, "recent_popularity": means}}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(LocalStorage(tmp_path / "store"), tmp_path / "cache")


def record(store: ArtifactStore, run: str, day: int, live: dict[str, Any] | None, finished: str = "2026-05-01") -> None:
    end = FIRST + timedelta(days=day)
    store.start_run(run, load_config(None, [f"window.start={end - timedelta(days=1)}", f"window.end={end}"]))
    if live:
        entry = {"status": "done", "fingerprint": run, "finished_at": finished, "live": live, "verdict": "warn"}
        store.record(run, "ml.live", entry)


def ends(store: ArtifactStore) -> dict:
    return {
        run: load_config(None, [], store.recorded_config(run)).window.end for run in store.run_ids()
    }  # fmt: skip


def test_the_line_has_the_last_sixty_windows_up_to_the_run(store: ArtifactStore) -> None:
    for day in range(NUM_RUNS + 5):
        record(store, f"day-{day}", day, figures(day / 1000))
    line = live_scores(store, f"day-{NUM_RUNS + 2}", ends(store))
    assert [end for end, _ in line] == [FIRST + timedelta(days=day) for day in range(3, NUM_RUNS + 3)]
    assert [score["models"]["champion"]["recall@20"] for _, score in line] == [day / 1000 for day in range(3, 63)]


def test_one_point_for_a_window_and_none_for_runs_without_a_score(store: ArtifactStore) -> None:
    record(store, "first", 0, figures(0.1), "2026-05-01")
    record(store, "again", 0, figures(0.2), "2026-05-02")
    record(store, "unscored", 1, {"status": "no_export", "reason": "There was none."})
    record(store, "before-scores", 2, None)
    record(store, "late", 3, figures(0.3), "2026-05-02")
    record(store, "late.refit", 3, figures(0.9), "2026-05-09")
    record(store, "mine", 3, figures(0.4), "2026-05-01")
    recalls = [score["models"]["champion"]["recall@20"] for _, score in live_scores(store, "mine", ends(store))]
    assert recalls == [0.2, 0.4]


@pytest.mark.parametrize("scored", [True, False])
def test_the_page_shows_the_score_and_the_line(store: ArtifactStore, scored: bool) -> None:
    record(store, "before", 0, figures(0.1))
    means = dict.fromkeys(("recall@20", "ndcg@20", "hit@20"), INTERVAL)
    score = figures(0.2) | {"models": dict.fromkeys(("champion", "recent_popularity"), means)}
    score |= {"window_end": "2026-01-02T00:00:00+00:00", "from": "2026-01-02T00:00:00+00:00"}
    score |= {"until": "2026-01-03T00:00:00+00:00", "users": 1234, "events": 4321, "covered": 0.5, "new_items": 0.125}
    score |= {"covered_users": None}
    absent = {"status": "no_export", "reason": "No champion had exported <lists>."}
    record(store, "run", 1, figures(0.2) if scored else absent)
    folder = store.cache / "live"
    folder.mkdir(parents=True)
    (folder / "live.json").write_text(json.dumps(score if scored else absent))
    store.publish(folder, {"stage": "ml.live", "fingerprint": "run", "facts": {}, "seconds": 1.0, "peak_bytes": 1})
    page = render(store, "run", load_config(None, [], store.recorded_config("run")), [])
    assert "How the exported lists did" in page and "Recall@20 of what was served" in page
    assert ("1,234 users" in page and "12.5 % of the events" in page and "threshold for a warning" in page) is scored
    assert ("No champion had exported &lt;lists&gt;." in page) is not scored
    assert f"still has: {2 if scored else 1}" in page
