"""Make an earlier version champion again: `python -m jobs.ml.rollback --store URI --run RUN_ID --to VERSION|previous`.

`previous` is the champion before the current one; asked again, the one before that. One line in the ledger, the same
smoke test through the alias as a promotion, and the champion stays where it was when that fails.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from typing import Any

from crane_core.config import RunConfig
from crane_core.errors import ArtifactError
from crane_core.ledger import SMOKE_TAG, Entry, Ledger, hand_over, settle
from crane_core.registry import Registry, open_registry
from crane_core.store import ArtifactStore
from jobs.ml.promote import smoke_through_alias
from jobs.runner import peak_bytes, run_job

logger = logging.getLogger(__name__)

PREVIOUS = "previous"


def rollback(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Move the champion back and test it."""
    started = time.monotonic()
    registry = open_registry(config.runtime, store.storage.uri)
    ledger = Ledger(store.storage, registry.name)
    entry, status = None, "done"
    while entry is None:
        ledger.verify(registry.ledger_anchors())
        champion = settle(ledger, registry)
        seen, history = ledger.size(), ledger.history()
        unfinished = _unfinished(history, arguments.run, arguments.to, registry)
        if unfinished:
            entry = unfinished
            break
        target = registry.version(_target(ledger, arguments.to)).number
        if target == champion:
            status, entry = "found", history[-1]
            break
        reason = f"Rolled back from version {champion} to version {target}, asked for as {arguments.to!r}."
        entry = ledger.append(seen, "rollback", target, target, arguments.run, reason, {"to": arguments.to})
    if status == "done":
        version = registry.version(entry.version)
        hand_over(ledger, registry, entry, lambda: smoke_through_alias(registry, version))
    return {
        "status": status,
        "champion": entry.champion,
        "previous": entry.champion_before,
        "reason": entry.reason,
        "ledger": entry.seq,
        "seconds": round(time.monotonic() - started, 3),
        "peak_bytes": peak_bytes(),
    }


def _target(ledger: Ledger, to: str) -> str:
    if to != PREVIOUS:
        return to
    earlier = ledger.earlier_champions()
    if not earlier:
        raise ArtifactError(
            f"Model {ledger.model!r} has no champion before {ledger.champion() or 'the first'}.",
            "Name a version with --to VERSION.",
        )
    return earlier[-1]


def _unfinished(history: list[Entry], run_id: str, to: str, registry: Registry) -> Entry | None:
    """The same request, written to the ledger and not confirmed: a retry after a crash must not go back twice."""
    last = history[-1] if history else None
    if last is None or last.action != "rollback" or (last.run_id, last.numbers.get("to")) != (run_id, to):
        return None
    confirmed = registry.version(last.version).tags.get(SMOKE_TAG) == str(last.seq)
    return None if confirmed else last


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", default=PREVIOUS, metavar="VERSION|previous", help="version to go back to")


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ml.rollback", rollback, argv, flags=add_flags)


if __name__ == "__main__":
    raise SystemExit(main())
