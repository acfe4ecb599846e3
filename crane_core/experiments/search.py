"""Search for a better recipe of a model: TPE (Bergstra et al., 2011) by validation Recall@20.

The trials train on the dataset without its test split. They are kept as those of the experiments are, so that a killed
training continues from its checkpoint. A SQLite file records the finished ones, so that a killed search continues after
its last trial. The recipe of a trial depends only on the seed and on the trials before it, so that interruptions do not
change the search.

    {root}/search/{model}/trials.db     the trials
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from crane_core.config import Phi
from crane_core.errors import ArtifactError, TrainingError
from crane_core.experiments.data import Dataset, fingerprint
from crane_core.experiments.models import VERSION, Recipe
from crane_core.experiments.plans import SECTIONS, changed
from crane_core.experiments.trials import Trials

logger = logging.getLogger(__name__)

Space = dict[str, BaseDistribution]
"""`section.field` to its range."""

_RATES: Space = {
    "train.learning_rate": FloatDistribution(3e-4, 1e-2, log=True),
    "lightgcn.regularisation": FloatDistribution(1e-5, 1e-1, log=True),
}
_LAYERS: Space = {"lightgcn.num_layers": IntDistribution(1, 4)}
_SOFTMAX: Space = {
    "crane.ranking_temperature": FloatDistribution(0.05, 0.5, log=True),
    "crane.user_balance": FloatDistribution(0.0, 1.0),
    "crane.num_negatives": IntDistribution(256, 4096, log=True),
}
_CRANE: Space = {
    **_RATES,
    **_LAYERS,
    **_SOFTMAX,
    "crane.contrast_weight": FloatDistribution(1e-5, 1e-1, log=True),
    "crane.contrast_temperature": FloatDistribution(0.1, 1.0, log=True),
    "crane.edge_dropout": FloatDistribution(0.0, 0.5),
    "refine.num_recursions": IntDistribution(0, 5),
    "refine.phi": CategoricalDistribution(get_args(Phi)),
    "knn.k": IntDistribution(5, 20),
    "profiles.aggregate": CategoricalDistribution(("sum", "mean")),
}

SPACES: dict[str, Space] = {
    "crane": _CRANE,
    "crane_joint": _CRANE,
    "lightgcn": {**_RATES, **_LAYERS},
    "lightgcn_softmax": {**_RATES, **_LAYERS, **_SOFTMAX},
    "lightgcn_fused": {**_RATES, **_LAYERS, **_SOFTMAX},
    "bpr_mf": _RATES,
    "freedom": {
        **_LAYERS,
        "freedom.learning_rate": FloatDistribution(3e-4, 1e-2, log=True),
        "freedom.k": IntDistribution(5, 20),
        "freedom.edge_dropout": FloatDistribution(0.0, 0.9),
        "freedom.feature_weight": FloatDistribution(1e-5, 1e-1, log=True),
    },
    "mgcn": {
        **_LAYERS,
        "mgcn.learning_rate": FloatDistribution(3e-4, 1e-2, log=True),
        "mgcn.regularisation": FloatDistribution(1e-5, 1e-1, log=True),
        "mgcn.contrast_weight": FloatDistribution(1e-4, 1e-1, log=True),
        "mgcn.temperature": FloatDistribution(0.1, 1.0, log=True),
        "mgcn.k": IntDistribution(5, 20),
    },
}
"""Ranges of the fields to search, for every model that can be searched. Rates and weights cover the values published
for LightGCN and MGCN; recursions and neighbours have the ranges of the experiments of the same names. Item kNN and the
content baseline choose from grids of their own, and popularity has no settings."""

_STARTUP_TRIALS = 8


class Search:
    """A search that starts from one recipe and resumes after its last finished trial.

    Only one process at a time may search in `folder_of` a model: the caller holds its lock.

    Args:
        dataset: its test split is dropped first.
        recipe: recipe of the first trial, and the values of the fields that are not searched.
        seed: seed of the proposals and of every training.
        trials: folder of trials; the SQLite file lies below its root.
        model: one of `SPACES`.

    Raises:
        ArtifactError: the SQLite file is damaged.
    """

    def __init__(self, dataset: Dataset, recipe: Recipe, seed: int, trials: Trials, model: str = "crane") -> None:
        self.dataset = dataset.without_test()
        self.recipe = recipe
        self.seed = seed
        self.trials = trials
        self.model = model
        self.space = SPACES[model]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = {name: optuna.distributions.distribution_to_json(each) for name, each in self.space.items()}
        name = fingerprint(VERSION, model, self.dataset.fingerprint, recipe.model_dump(mode="json"), seed, space)
        path = folder_of(trials, model) / "trials.db"
        path.parent.mkdir(parents=True, exist_ok=True)
        _check(path)
        self.study = optuna.create_study(
            storage=f"sqlite:///{path}", study_name=name, direction="maximize", load_if_exists=True
        )
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            # A killed process left it. The same proposal comes again, because only finished trials count.
            self.study.tell(trial.number, state=TrialState.FAIL)

    def run(self, num_trials: int, allows: Callable[[float], bool], show: Callable[[str], None]) -> None:
        """Try recipes until there are `num_trials` of them or the budget ends.

        Args:
            num_trials: number of trials, those of earlier runs included.
            allows: returns whether there is time for work of so many seconds.
            show: takes a line of progress for every trial.
        """
        took: list[float] = []
        while (done := len(self.finished())) < num_trials:
            if not allows(sum(took) / len(took) if took else 0.0):
                show(f"stopped by the budget trials={done} of={num_trials}")
                return
            started = time.monotonic()
            value, parameters = self._try(done)
            took.append(time.monotonic() - started)
            left = sum(took) / len(took) * (num_trials - done - 1)
            show(
                f"trial={done + 1} of={num_trials} validation_recall@20={value:.4f} "
                f"best={self.study.best_value:.4f} seconds={took[-1]:.1f} left={left:.0f}s"
            )
            logger.info("trial number=%d value=%.5f parameters=%s", done, value, parameters)

    def _try(self, done: int) -> tuple[float, dict[str, Any]]:
        seed = int(np.random.SeedSequence([self.seed, done]).generate_state(1)[0])
        self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=_STARTUP_TRIALS, seed=seed)
        if done == 0 and not self.study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
            self.study.enqueue_trial(_inside(self.recipe, self.space))
        proposal = self.study.ask(self.space)
        try:
            trial = self.trials.find_or_make(self.dataset, self.model, self.recipe_of(proposal.params), self.seed)
            value = trial.recall("validation")
            proposal.set_user_attr("seconds", trial.seconds)
        except TrainingError as error:
            # A training that diverges is a result too: TPE must learn to avoid such recipes.
            proposal.set_user_attr("error", error.found)
            value = 0.0
        self.study.tell(proposal, value)
        return value, proposal.params

    def recipe_of(self, parameters: dict[str, Any]) -> Recipe:
        """Return the recipe with the parameters of a trial."""
        return changed(self.recipe, parameters)

    def finished(self) -> list[FrozenTrial]:
        """Return the finished trials, oldest first."""
        return self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])

    def best(self) -> Recipe | None:
        """Return the recipe of the highest validation recall, the oldest among equals; None before the first trial."""
        trials = self.finished()
        return self.recipe_of(max(trials, key=lambda trial: (trial.value, -trial.number)).params) if trials else None

    def record(self) -> list[dict[str, Any]]:
        """Return every finished trial as JSON values."""
        return [
            {"number": number, "validation_recall@20": trial.value, "parameters": trial.params, **trial.user_attrs}
            for number, trial in enumerate(self.finished(), start=1)
        ]


def folder_of(trials: Trials, model: str) -> Path:
    """Return the folder of the search of a model."""
    return trials.root / "search" / model


def as_yaml(recipe: Recipe, model: str = "crane") -> str:
    """Return the recipe as a configuration file of a run, with the own section of FREEDOM or MGCN for these models."""
    sections = {*SECTIONS, *({model} & set(Recipe.model_fields))}
    return yaml.safe_dump(recipe.model_dump(mode="json", include=sections), sort_keys=False)


def _check(path: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            ((found,),) = connection.execute("PRAGMA quick_check(1)")
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise ArtifactError(
            f"{path} is damaged: {found}.",
            "Delete this file: the search then starts again and reuses its finished trainings.",
        )


def _inside(recipe: Recipe, space: Space) -> dict[str, Any]:
    """Return the recipe's values of the searched fields; the sampler chooses those outside the space."""
    tree = recipe.model_dump()
    values = {path: tree[path.partition(".")[0]][path.partition(".")[2]] for path in space}
    return {path: value for path, value in values.items() if _admits(space[path], value)}


def _admits(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return distribution.low <= value <= distribution.high
