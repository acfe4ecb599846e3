"""Check the configuration of a run and list the parts of its mapped stages.

The JSON on stdout maps every mapped stage to the names of its parts, for a scheduler to spread out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from crane_core.config import RunConfig
from crane_core.stages import STAGES, WHOLE
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import run_job


def plan(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Return each mapped stage with the names of its parts."""
    # Its jobs come one after the other; in between, only this says that the run is under way.
    store.claims.keep(arguments.run)
    return {name: list(parts) for name, stage in STAGES.items() if (parts := stage.parts(config)) != (WHOLE,)}


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("plan", plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
