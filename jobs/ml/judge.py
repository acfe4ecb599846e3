"""Ask the gate about a run's model and change nothing: `python -m jobs.ml.judge --store URI --run RUN_ID`.

Shows a person the decision that `jobs.ml.promote` would make now. Writes no ledger entry, no tag and no alias.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from crane_core.config import RunConfig
from crane_core.release.judge import Judge
from crane_core.release.ledger import Ledger
from crane_core.release.registry import open_registry
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import run_job

logger = logging.getLogger(__name__)


def judge(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Decide, without carrying the decision out."""
    registry = open_registry(config.runtime, store.storage.uri)
    asked = Judge(config, store, arguments.run, registry)
    decision, _ = asked.decide(Ledger(store.storage, registry.name).champion())
    logger.info("judged version=%s promoted=%s reason=%s", asked.version.number, decision.promoted, decision.reason)
    return {
        "status": "done",
        "decision": "promoted" if decision.promoted else "refused",
        "reason": decision.reason,
        "version": asked.version.number,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ml.judge", judge, argv)


if __name__ == "__main__":
    raise SystemExit(main())
