"""Judge a run's model and make it champion if it is better: `python -m jobs.ml.promote --store URI --run RUN_ID`.

Reads the evidence again from the registry, measures the champion on the same users, asks the gate, writes the ledger,
moves the alias `champion` and tests the model through it. All of this happens under the champion lock, so promotions
from any number of machines run one after the other. A refusal is a result and not an error: exit code 0. After a failed
smoke test the former champion is back, and the exit code is 4.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from typing import Any

from crane_core.config import RunConfig
from crane_core.errors import ConfigError
from crane_core.release.champion_lock import lock_champion
from crane_core.release.judge import Judge
from crane_core.release.ledger import ANCHOR_TAG, Draft, Entry
from crane_core.release.registry import open_registry
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import run_job

logger = logging.getLogger(__name__)


def promote(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Decide, and carry the decision out."""
    if config.runtime.backfill:
        raise ConfigError(
            "A backfill moves no alias.", "Promote a run of crane_retrain, or give --set runtime.backfill=false."
        )
    judge = Judge(config, store, arguments.run, open_registry(config.runtime, store.storage.uri))
    number, status = judge.version.number, "done"
    with lock_champion(config.runtime, store, f"promote run={arguments.run} version={number}") as lock:
        entry = _earlier_decision(lock.ledger.history(), number, judge.rule)
        if entry:
            status = "found"
        else:
            champion = lock.champion
            decision, numbers = judge.decide(champion)
            if decision.promoted:
                draft = Draft("promote", number, number, arguments.run, decision.reason, numbers)
            else:
                draft = Draft("refuse", number, champion, arguments.run, decision.reason, numbers)
            entry = lock.write(draft)
        promoted = entry.action != "refuse"
        if promoted:
            lock.carry_out(entry)
        lock.registry.tag(
            number,
            {
                f"{ANCHOR_TAG}{entry.seq}": entry.hash,
                "crane.decision": "promoted" if promoted else "refused",
                "crane.decision_reason": entry.reason,
                "crane.decision_numbers": json.dumps(entry.numbers),
            },
        )
    logger.info("%s version=%s reason=%s", "promoted" if promoted else "refused", number, entry.reason)
    return {
        "status": status,
        "decision": "promoted" if promoted else "refused",
        "reason": entry.reason,
        "version": number,
        "champion": entry.champion,
        "previous": entry.champion_before,
        "ledger": entry.seq,
    }


def _earlier_decision(history: list[Entry], number: str, rule: dict[str, Any]) -> Entry | None:
    """Return the decision that still holds: the version is champion, or this rule refused it beside this champion."""
    if not history:
        return None
    champion = history[-1].champion
    if champion == number:
        return next(e for e in reversed(history) if e.version == number and e.action in ("promote", "rollback"))
    last = next((e for e in reversed(history) if e.version == number), None)
    if last and last.action == "refuse" and last.champion == champion and last.numbers.get("rule") == rule:
        return last
    return None


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ml.promote", promote, argv)


if __name__ == "__main__":
    raise SystemExit(main())
