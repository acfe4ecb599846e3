"""The refit run of a run: it makes the model that is shipped.

A run is evaluated without the rows of its validation and test periods. Its refit run goes through the same stages, up
to `ml.train`, with every event before `window.end` as training and the choices of the run. The model of the run is its
evaluation twin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crane_core.config import RunConfig
from crane_core.model_config import Choices

SUFFIX = ".refit"
"""End of the id of a refit run; no other run may have such an id."""


def refit_run(run_id: str) -> str:
    """Return the id of the refit run of a run."""
    return f"{run_id}{SUFFIX}"


def is_refit(run_id: str) -> bool:
    """Return whether an id is that of a refit run."""
    return run_id.endswith(SUFFIX)


def both_runs(run_id: str) -> set[str]:
    """Return the ids of a run and its refit run, given either."""
    run = run_id.removesuffix(SUFFIX)
    return {run, refit_run(run)}


def refit_config(config: RunConfig, choices: Choices | None, base_run: str | None) -> RunConfig:
    """Return the configuration of the refit run of a run.

    Args:
        config: of the run.
        choices: of its validation split; None before they are made, for the stages before the trainings.
        base_run: run whose ids are kept.
    """
    etl = config.etl.model_copy(update={"split": "none", "base_run": base_run})
    return config.model_copy(update={"etl": etl, "choices": choices})


def choices_of(behaviour: Mapping[str, Any], trained: Mapping[str, Any]) -> Choices:
    """Return what the validation split of a run has chosen, from the facts of `ml.behaviour` and `ml.train`."""
    head = trained["head"] or {"half_life": None, "history_half_life": None, "weights": None}
    return Choices(
        behaviour_epochs=behaviour["best_epoch"] + 1,
        crane_epochs=trained["best_epoch"] + 1,
        crane_ranking=trained["best_ranking"],
        share=trained["trust"],
        half_life=head["half_life"],
        history_half_life=head["history_half_life"],
        head=head["weights"],
    )
