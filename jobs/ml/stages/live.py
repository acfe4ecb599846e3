"""Measure how exported lists did on a window: the work of `jobs.ml.live`."""

from __future__ import annotations

import json
from typing import Any

from crane_core.dataset.interactions import load_interactions
from crane_core.evaluation.baselines import choose_half_life
from crane_core.evaluation.live import Period, load_judged, score_lists, write_per_user
from crane_core.storage.artifacts import Artifact
from crane_core.storage.exports import EXPORT, ExportedLists
from jobs.runner import Job, Result

SHOWN = ("recall@20", "ndcg@20", "hit@20")
"""Metrics that the record of the run keeps, for the report, the ledger and MLflow."""


def run(job: Job, lists: ExportedLists | None) -> Result:
    """Judge the lists on the events of the window that they do not know."""
    end = job.config.window.end
    if lists is None:
        return _absent(job, "no_export", f"No champion had exported lists that end before {end:%Y-%m-%d %H:%M}.")
    export = None if lists.is_gone else job.store.find(EXPORT, lists.fingerprint)
    if export is None:
        return _absent(job, "export_gone", f"The lists of version {lists.version} were removed from the store.")
    export.verify()
    return _score(job, lists, export)


def _score(job: Job, lists: ExportedLists, export: Artifact) -> Result:
    config, source = job.config, job.input("etl.interactions")
    period = Period.of(lists.window_end, config.window.start, config.window.end)
    half_life = choose_half_life(load_interactions(source), config.head.half_lives)
    judged = load_judged(source, period, half_life)
    if len(judged.user_ids) == 0:
        return _absent(job, "no_events", f"Nobody met a new item from {period.start} to {period.end}.")
    report, per_user = score_lists(export, judged, config.evaluate)
    write_per_user(job.out / "per_user.parquet", judged, per_user)
    facts: dict[str, Any] = {
        "status": "scored",
        **lists.facts(),
        "from": period.start.isoformat(),
        "until": period.end.isoformat(),
        "half_life": half_life,
        **{name: report[name] for name in ("users", "covered", "events", "new_items")},
    }
    (job.out / "live.json").write_text(json.dumps(facts | report))
    means = {name: {metric: found[metric]["mean"] for metric in SHOWN} for name, found in report["models"].items()}
    champion, popular = (means[name]["recall@20"] for name in ("champion", "recent_popularity"))
    return Result(facts | {"models": means, "ratio": champion / popular if popular else None})


def _absent(job: Job, status: str, reason: str) -> Result:
    """Leave an artifact that says why there is no score."""
    facts = {"status": status, "reason": reason}
    (job.out / "live.json").write_text(json.dumps(facts))
    return Result(facts)
