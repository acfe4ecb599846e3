"""Take the promotion of a run back: `python -m jobs.ml.restore --store URI --run RUN_ID`.

A scheduler runs this when a step that had to follow a promotion has failed after all retries. The former champion is
back, with one line in the ledger. Nothing happens when the run's version is not champion, when the alias was moved
since, or when the version was exported before: then it is served already, and only a repeated export has failed.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from crane_core.config import RunConfig
from crane_core.release.champion_lock import lock_champion
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import run_job

logger = logging.getLogger(__name__)


def restore(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Restore the champion before the run's, if the run's is champion."""
    with lock_champion(config.runtime, store, f"restore run={arguments.run}") as lock:
        moves = lock.ledger.moves()
        last = moves[-1] if moves else None
        exported = (store.entry(arguments.run, "ml.export") or {}).get("version")
        mine = (
            last is not None and (last.action, last.run_id) == ("promote", arguments.run) and last.version != exported
        )
        if last is not None and mine:
            lock.take_back(last, f"what had to follow the promotion of version {last.version} failed")
        champion = lock.champion
    logger.info("%s champion=%s", "restored" if mine else "nothing_to_restore", champion)
    return {
        "status": "done" if mine else "skipped",
        "champion": champion,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ml.restore", restore, argv)


if __name__ == "__main__":
    raise SystemExit(main())
