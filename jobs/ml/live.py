"""Measure how the champion's exported lists did on the window: `python -m jobs.ml.live --store URI --run RUN_ID`.

The lists are the last that a champion exported from events before `window.end`, and they are judged on those events of
the window that they were not made from (`crane_core/evaluation/live.py`). Leaves `live.json` and `per_user.parquet`:
recall, NDCG, hit rate and the share of users covered, next to recent popularity for the same users. The live score is
the Recall@20 of the lists divided by that of recent popularity. Below `evaluate.live_warn` it is a warning; below
`evaluate.live_stop` the job fails once the artifact is there, so that no model is registered before somebody looks.

Without lists `live.json` says why, and that is no error: no champion had exported any (`no_export`), they were removed
(`export_gone`), or no user met something new in the window (`no_events`). A refit run has no live score of its own.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from crane_core.config import Evaluate, RunConfig
from crane_core.errors import DataError
from crane_core.refit import is_refit
from crane_core.stages import STAGES, WHOLE
from crane_core.storage.artifacts import ArtifactStore
from crane_core.storage.exports import EXPORT, ExportedLists, exported_before
from jobs.entry_points import run_job
from jobs.runner import Job, Result, produce

logger = logging.getLogger(__name__)


def live(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Make or find the artifact, record its figures, and compare them with the thresholds.

    Raises:
        DataError: the live score is below `evaluate.live_stop`.
    """
    if is_refit(arguments.run):
        return {"status": "skipped", "reason": "A refit run is not judged: its run is."}
    lists = exported_before(config, store)
    if lists:
        store.claims.claim(lists.run, lists.fingerprint)
        # They may have been removed before they were claimed.
        lists = replace(lists, is_gone=not store.has(EXPORT, lists.fingerprint))
    # Looked up once: another export may end meanwhile.
    stage = replace(STAGES["ml.live"], source=lambda *_: lists and lists.facts())
    entry = produce(stage, arguments.run, WHOLE, config, store, partial(run, lists=lists))
    found = store.find(stage.name, entry["fingerprint"])
    assert found is not None
    entry |= {"live": found.facts, "verdict": judge(found.facts, config.evaluate)}
    store.record(arguments.run, stage.name, entry)
    _tell(found.facts, entry["verdict"], config.evaluate)
    return entry


def run(job: Job, lists: ExportedLists | None) -> Result:
    """Do the stage's work; torch is imported only here."""
    from jobs.ml.stages import live as work

    return work.run(job, lists)


def judge(score: dict[str, Any], config: Evaluate) -> str:
    """Return `ok`, `warn` or `stop` for a live score, or `unknown` where there is none or too few users."""
    if score["status"] != "scored" or score["users"] < config.live_min_users or score["ratio"] is None:
        return "unknown"
    if config.live_stop is not None and score["ratio"] < config.live_stop:
        return "stop"
    return "ok" if score["ratio"] >= config.live_warn else "warn"


def _tell(score: dict[str, Any], verdict: str, config: Evaluate) -> None:
    """Log a live score, with a warning below `evaluate.live_warn`, or stop.

    Raises:
        DataError: it is below `evaluate.live_stop`.
    """
    if score["status"] != "scored":
        logger.info("not scored status=%s: %s", score["status"], score["reason"])
        return
    recalls = [score["models"][name]["recall@20"] for name in ("champion", "recent_popularity")]
    told = (
        f"the lists of version {score['version']} reach Recall@20 {recalls[0]:.4f} for {score['users']} users, recent "
        f"popularity {recalls[1]:.4f}"
    )
    if verdict == "stop":
        raise DataError(
            f"From {score['from']} to {score['until']} {told}: a ratio of {score['ratio']:.4f}; evaluate.live_stop is "
            f"{config.live_stop}.",
            "Compare the events of the day with what was served (crane recommend --user ID). A new run with --set "
            "evaluate.live_stop=null, or a lower one, goes on; crane rollback takes the champion back.",
        )
    log = logger.warning if verdict == "warn" else logger.info
    log("live verdict=%s threshold=%s covered=%.4f: %s", verdict, config.live_warn, score["covered"], told)


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ml.live", live, argv)


if __name__ == "__main__":
    raise SystemExit(main())
