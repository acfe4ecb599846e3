"""Make an earlier version champion again: `python -m jobs.ml.rollback --store URI --to VERSION|previous`.

`previous` is the champion before the current one; asked again, the one before that. The same lease, the same smoke test
through the alias and one line in the ledger as for a promotion; the champion stays where it was when the test fails.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from crane_core.errors import ArtifactError
from crane_core.release.ledger import Entry, Ledger
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import load_runtime, run_command
from jobs.ml.desk import Desk, take_desk
from jobs.usage import Usage

logger = logging.getLogger(__name__)

PREVIOUS = "previous"


def rollback(arguments: argparse.Namespace, store: ArtifactStore) -> dict[str, Any]:
    """Move the champion back and test it."""
    usage = Usage()
    with take_desk(load_runtime(arguments), store, f"rollback to={arguments.to}") as desk:
        entry, status = _answered(desk, arguments.to, arguments.request), "found"
        if entry is None:
            version = desk.registry.version(_target(desk.ledger, arguments.to))
            if version.number == desk.champion:
                entry = next(each for each in reversed(desk.ledger.history()) if each.action != "refuse")
            else:
                reason = (
                    f"Rolled back from version {desk.champion} to version {version.number}, "
                    f"asked for as {arguments.to!r}."
                )
                wish = {"to": arguments.to, "request": arguments.request}
                entry = desk.write("rollback", version.number, version.number, version.run_id, reason, wish)
                desk.carry_out(entry)
                status = "done"
        champion = desk.champion
        run = desk.registry.version(champion).run_id if champion else None
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


def _answered(desk: Desk, to: str, request: str) -> Entry | None:
    """The entry that answers this wish already: a retry after a crash must not go back twice."""
    wish = {"to": to, "request": request}
    if desk.finished and desk.finished.numbers == wish:
        return desk.finished
    moves = [entry for entry in desk.ledger.history() if entry.action != "refuse"]
    mine = [entry for entry in moves if request and entry.action == "rollback" and entry.numbers == wish]
    taken_back = {entry.numbers.get("restores") for entry in moves}
    return mine[-1] if mine and mine[-1].seq not in taken_back else None


def _target(ledger: Ledger, to: str) -> str:
    if to != PREVIOUS:
        return to
    earlier = ledger.earlier_champions()
    if not earlier:
        raise ArtifactError(
            f"Model {ledger.model!r} has no champion before {ledger.champion() or 'the first'}.",
            "Give --to VERSION, the number of a version in the registry (crane runs lists them).",
        )
    return earlier[-1]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", default=PREVIOUS, metavar="VERSION|previous", help="version to go back to")
    parser.add_argument(
        "--request", default="", metavar="ID", help="who asks; asked again by the same, nothing is done"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("ml.rollback", rollback, argv, flags=add_flags)


if __name__ == "__main__":
    raise SystemExit(main())
