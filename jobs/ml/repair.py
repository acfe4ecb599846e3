"""Go back to a champion that answers, in a registry that was changed by hand: `python -m jobs.ml.repair --store URI`.

The alias `champion` is put where the ledger says. If that version was removed from the registry, or its evidence or
files were removed or changed, the last earlier champion that is whole becomes champion again, with one line in the
ledger and a smoke test. Where there is none, the line says so, and the next promotion is judged as the first one is. No
line is ever rewritten. Where all is well, nothing is written.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from crane_core.release.champion_lock import lock_champion
from crane_core.release.damage import damage_of
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import load_runtime, run_command

logger = logging.getLogger(__name__)


def repair(arguments: argparse.Namespace, store: ArtifactStore) -> dict[str, Any]:
    """Find a champion that can be served, and move the alias to it."""
    with lock_champion(load_runtime(arguments), store, "repair") as lock:
        champion = lock.ledger.champion()
        damage = damage_of(lock.registry, champion) if champion is not None else ""
        if damage:
            lock.go_back(store, damage)
        champion, size = lock.ledger.champion(), lock.ledger.size()
    logger.info("%s champion=%s", "repaired" if damage else "whole", champion)
    return {"status": "repaired" if damage else "whole", "champion": champion, "found": damage, "ledger": size}


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("ml.repair", repair, argv)


if __name__ == "__main__":
    raise SystemExit(main())
