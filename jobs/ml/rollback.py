"""Make an earlier version champion again: `python -m jobs.ml.rollback --store URI --to VERSION|previous`.

`previous` is the champion before the current one; the next time, the one before that. As for a promotion, there is the
champion lock, a smoke test through the alias and one line in the ledger. If the test fails, the champion stays.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from crane_core.errors import ArtifactError
from crane_core.release.champion_lock import ChampionLock, lock_champion
from crane_core.release.damage import run_lost
from crane_core.release.ledger import Draft, Entry
from crane_core.release.registry import PRUNED_TAG
from crane_core.release.version import Version
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import load_runtime, run_command
from jobs.usage import Usage

logger = logging.getLogger(__name__)

PREVIOUS = "previous"


def rollback(arguments: argparse.Namespace, store: ArtifactStore) -> dict[str, Any]:
    """Move the champion back and test it."""
    usage = Usage()
    with lock_champion(load_runtime(arguments), store, f"rollback to={arguments.to}") as lock:
        entry, status = _done_before(lock, arguments.to, arguments.request), "found"
        if entry is None:
            version = lock.registry.version(_target(lock, store, arguments.to))
            if version.number == lock.champion:
                entry = lock.ledger.moves()[-1]
            else:
                _check_run(store, version)
                reason = (
                    f"Rolled back from version {lock.ledger.champion()} to version {version.number}, "
                    f"asked for as {arguments.to!r}."
                )
                request = {"to": arguments.to, "request": arguments.request}
                draft = Draft("rollback", version.number, version.number, version.run_id, reason, request)
                entry = lock.write(draft)
                lock.carry_out(entry)
                status = "done"
        champion = lock.champion
        run = lock.registry.version(champion).run_id if champion else None
    logger.info("%s champion=%s reason=%s", status, champion, entry.reason)
    return {
        "status": status,
        "champion": champion,
        "champion_run": run,
        "previous": entry.champion_before,
        "reason": entry.reason,
        "ledger": entry.seq,
        **usage.entry(),
    }


def _done_before(lock: ChampionLock, to: str, request: str) -> Entry | None:
    """Return the entry of an earlier attempt at this request: a retry after a crash must not go back twice."""
    numbers = {"to": to, "request": request}
    if lock.finished and lock.finished.numbers == numbers:
        return lock.finished
    moves = lock.ledger.moves()
    mine = [entry for entry in moves if request and entry.action == "rollback" and entry.numbers == numbers]
    taken_back = {entry.numbers.get("restores") for entry in moves}
    return mine[-1] if mine and mine[-1].seq not in taken_back else None


def _target(lock: ChampionLock, store: ArtifactStore, to: str) -> str:
    """Return the version to go back to: of the champions before, the last one that the registry and the store have."""
    if to != PREVIOUS:
        return to
    ledger, known = lock.ledger, {version.number: version for version in lock.registry.versions()}
    earlier = ledger.earlier_champions()
    for number in reversed(earlier):
        if number in known and run_lost(store, known[number]) is None:
            return number
        logger.warning("passed_over version=%s: it was removed from the registry, or its run from the store", number)
    gone = f" that is still there (version {', '.join(earlier)} was removed)" if earlier else ""
    raise ArtifactError(
        f"Model {ledger.model!r} has no champion before {ledger.champion() or 'the first'}{gone}.",
        "Give --to VERSION, the number of a version in the registry (crane runs lists them), or promote another run: "
        "crane promote --run RUN.",
    )


def _check_run(store: ArtifactStore, version: Version) -> None:
    """Refuse a version whose recommendations could not be written.

    Raises:
        ArtifactError: its run was removed from the store.
    """
    if lost := run_lost(store, version):
        since = version.tags.get(PRUNED_TAG)
        raise ArtifactError(
            f"The run {lost!r} of version {version.number} is not in {store.storage.uri} any more"
            + (f": it was pruned at {since}." if since else "."),
            "Give --to a version whose run crane runs lists; promote.keep_versions says how many champions stay.",
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", default=PREVIOUS, metavar="VERSION|previous", help="version to go back to")
    parser.add_argument(
        "--request", default="", metavar="ID", help="name of this request; with the same name nothing is done again"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("ml.rollback", rollback, argv, flags=add_flags)


if __name__ == "__main__":
    raise SystemExit(main())
