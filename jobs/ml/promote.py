"""Judge a run's model and make it champion if it is better: `python -m jobs.ml.promote --store URI --run RUN_ID`.

Reads the evidence again from the registry, measures the champion on the same users, asks the gate, writes the ledger,
moves the alias `champion` and tests the model through it. All of this happens under the champion lock, so promotions
from any number of machines run one after the other. A refusal is a result and not an error: exit code 0. After a failed
smoke test the former champion is back, and the exit code is 4.

With `--announced` nobody has chosen the version: a schedule judges the newest candidate. Each older candidate that was
never judged then gets a line in the ledger which says that it was passed over. A version that was champion and is not
any more stays where it is: whoever rolled it back has judged it.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from typing import Any

from crane_core.config import RunConfig
from crane_core.errors import ConfigError
from crane_core.release.champion_lock import ChampionLock, lock_champion
from crane_core.release.description import describe
from crane_core.release.gate import advice
from crane_core.release.judge import Judge
from crane_core.release.ledger import ANCHOR_TAG, MOVES, Draft, Entry
from crane_core.release.registry import CANDIDATE_TAG, open_registry
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import run_job
from jobs.stores import report_uri

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
        history = lock.ledger.history()
        entry = _earlier_decision(history, number, judge.rule)
        if entry is None and arguments.announced:
            entry = _taken_out(history, number)
        if entry:
            status = "found"
        else:
            champion = lock.ledger.champion()
            decision, numbers = judge.decide(champion)
            if decision.promoted:
                draft = Draft("promote", number, number, arguments.run, decision.reason, numbers)
            else:
                draft = Draft("refuse", number, champion, arguments.run, decision.reason, numbers)
            entry = lock.write(draft)
        promoted = entry.champion == number
        if promoted:
            lock.carry_out(entry)
        _tag(lock, entry, number, "promoted" if promoted else "refused")
        if status == "done":
            report = report_uri(store, arguments.run)
            lock.registry.describe(number, describe(judge.version, entry.numbers, entry.reason, report))
        passed_over = _pass_over(lock, number) if arguments.announced else []
    logger.info("%s version=%s reason=%s", "promoted" if promoted else "refused", number, entry.reason)
    return {
        "status": status,
        "decision": "promoted" if promoted else "refused",
        "reason": entry.reason,
        "remedy": "" if promoted else advice(entry.numbers.get("checks", ()), entry.champion is None),
        "version": number,
        "champion": entry.champion,
        "previous": entry.champion_before,
        "ledger": entry.seq,
        "passed_over": passed_over,
    }


def _tag(lock: ChampionLock, entry: Entry, number: str, decision: str) -> None:
    """Write a decision on its version."""
    lock.registry.tag(
        number,
        {
            f"{ANCHOR_TAG}{entry.seq}": entry.hash,
            "crane.decision": decision,
            "crane.decision_reason": entry.reason,
            "crane.decision_numbers": json.dumps(entry.numbers),
        },
    )


def _pass_over(lock: ChampionLock, judged: str) -> list[str]:
    """Write a line for every candidate older than a version that nobody has judged; return their numbers."""
    known = {entry.version for entry in lock.ledger.history()}
    older = [
        version
        for version in lock.registry.versions()
        if CANDIDATE_TAG in version.tags and version.number not in known and int(version.number) < int(judged)
    ]
    for version in older:
        reason = f"Passed over: version {judged} was announced before anybody judged version {version.number}."
        draft = Draft("pass", version.number, lock.ledger.champion(), version.run_id, reason, {"judged": judged})
        _tag(lock, lock.write(draft), version.number, "passed over")
        logger.info("passed_over version=%s run=%s", version.number, version.run_id)
    return [version.number for version in older]


def _taken_out(history: list[Entry], number: str) -> Entry | None:
    """Return the entry by which a version ceased to be champion in favour of another, None if there is none.

    A restore is none: it takes back a promotion that was not finished, and a new attempt judges it again.
    """
    made = next((place for place, e in enumerate(history) if e.champion == number and e.action in MOVES), None)
    last = next((e for e in reversed(history) if e.version == number), None)
    if made is None or last is None or last.action == "restore":
        return None
    return next((e for e in history[made:] if e.champion != number and e.action in MOVES), None)


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


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--announced", action="store_true", help="a schedule asks, for the newest candidate; older ones are passed over"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ml.promote", promote, argv, flags=add_flags)


if __name__ == "__main__":
    raise SystemExit(main())
