"""Take the promotion of a run back: `python -m jobs.ml.restore --store URI --run RUN_ID`.

For a scheduler, when something that had to follow a promotion has failed for good. The former champion is back, with
one line in the ledger. Nothing happens when the run's version is not champion, somebody has moved the alias since, or
the version has been exported already: what fails when it is done again is no reason to take back what is served.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from crane_core.config import RunConfig
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import run_job
from jobs.ml.desk import take_desk

logger = logging.getLogger(__name__)


def restore(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Restore the champion before the run's, if the run's is champion."""
    with take_desk(config.runtime, store, f"restore run={arguments.run}") as desk:
        moves = [entry for entry in desk.ledger.history() if entry.action != "refuse"]
        last = moves[-1] if moves else None
        exported = (store.entry(arguments.run, "ml.export") or {}).get("version")
        mine = (
            last is not None and (last.action, last.run_id) == ("promote", arguments.run) and last.version != exported
        )
        if last is not None and mine:
            desk.take_back(last, f"what had to follow the promotion of version {last.version} failed")
        champion = desk.champion
    logger.info("%s champion=%s", "restored" if mine else "nothing_to_restore", champion)
    return {
        "status": "done" if mine else "skipped",
        "champion": champion,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ml.restore", restore, argv)


if __name__ == "__main__":
    raise SystemExit(main())
