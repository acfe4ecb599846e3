"""Start the refit run of a run: `python -m jobs.ml.refit --store URI --run RUN_ID`.

It comes after `ml.train` and records the run `RUN_ID.refit`: the configuration of the run, with every event before
`window.end` as training and with the choices that the validation split has made. Each of its stages, `etl.interactions`
to `ml.train`, is the job of that name with the flag `--refit`, or with `--run RUN_ID.refit`. The last line names it;
with `etl.refit=false` there is none.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from crane_core.config import RunConfig
from crane_core.errors import ConfigError
from crane_core.refit import choices_of, is_refit, refit_config, refit_run
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import run_job

logger = logging.getLogger(__name__)


def refit(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Record the refit run with the choices of the run."""
    if is_refit(arguments.run):
        raise ConfigError(f"{arguments.run!r} is a refit run itself.", "Give --run the run that it belongs to.")
    if not config.etl.refit:
        return {"status": "skipped", "reason": "etl.refit is false.", "refit_run": None}
    run = refit_run(arguments.run)
    choices = choices_of(*(store.artifact(arguments.run, stage).facts for stage in ("ml.behaviour", "ml.train")))
    store.restart_run(run, refit_config(config, choices, refit_base(config, store)))
    logger.info("refit run=%s %s", run, " ".join(f"{name}={value}" for name, value in choices))
    return {"status": "done", "refit_run": run, "choices": choices.model_dump(mode="json")}


def refit_base(config: RunConfig, store: ArtifactStore) -> str | None:
    """Return the refit run of `etl.base_run`, whose ids a refit run keeps; None where there is none."""
    if config.etl.base_run is None:
        return None
    base = refit_run(config.etl.base_run)
    return base if store.entry(base, "etl.interactions") else None


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ml.refit", refit, argv)


if __name__ == "__main__":
    raise SystemExit(main())
