"""The live scores of a run and of those before it, from the records of their runs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from crane_core.refit import is_refit
from crane_core.storage.artifacts import ArtifactStore

NUM_RUNS = 60
"""Runs on the line: two months of daily ones."""


def live_scores(
    store: ArtifactStore, run_id: str, window_ends: Mapping[str, datetime]
) -> list[tuple[datetime, dict[str, Any]]]:
    """Return the live scores of the last runs up to one run, by the end of their windows.

    Of several runs whose windows end together the one that finished its score last counts, and the run itself before
    all others. Runs that have been removed from the store are missing.

    Args:
        store: holds the records.
        run_id: the last run.
        window_ends: run to the end of its window, of all runs of the store.

    Returns:
        End of the window and figures, as `jobs.ml.live` records them, oldest first; at most `NUM_RUNS`.
    """
    last = window_ends[run_id]
    runs = [run for run, end in window_ends.items() if end <= last and not is_refit(run)]
    ends = sorted({window_ends[run] for run in runs})[-NUM_RUNS:]
    found: dict[datetime, tuple[bool, str, dict[str, Any]]] = {}
    for run in runs:
        end = window_ends[run]
        entry = store.entry(run, "ml.live") if end in ends else None
        if entry is None or entry.get("live", {}).get("status") != "scored":
            continue
        candidate = (run == run_id, entry["finished_at"], entry["live"])
        if end not in found or candidate[:2] > found[end][:2]:
            found[end] = candidate
    return [(end, score) for end, (_, _, score) in sorted(found.items())]
