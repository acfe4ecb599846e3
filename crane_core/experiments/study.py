"""Run experiments within a time budget. Trials and measurements that exist are reused, the others are made."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from crane_core.config import Phi
from crane_core.errors import ConfigError, DataError
from crane_core.evaluation.slices import interest_entropy
from crane_core.experiments import summary
from crane_core.experiments.cost import (
    MOST_SECONDS,
    Measurements,
    SameWeights,
    catalog_sizes,
    fit_power_law,
    measure_growth,
)
from crane_core.experiments.data import Dataset, held
from crane_core.experiments.models import NEED_FEATURES, Recipe
from crane_core.experiments.plans import NAMES, SEARCH, Experiment, Variant, changed, experiment_plan
from crane_core.experiments.summary import Measured
from crane_core.experiments.trials import Trials

_FIT_ONLY = {"phi", "num_steps", "batch_size", "learning_rate", "temperature", "agreement_weight"}

Show = Callable[[str, str], None]
"""Takes the topic of a line of progress and the line."""


class Budget:
    """Limit on the time of a run.

    Args:
        minutes: from now on; None for no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def allows(self, seconds: float) -> bool:
        """Return whether work that is expected to take so long may start."""
        return self._end is None or time.monotonic() + seconds < self._end


@dataclass
class Pace:
    """Seconds that one kind of work has taken."""

    seconds: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.seconds) / len(self.seconds) if self.seconds else 0.0


def chosen(names: Sequence[str] | None) -> list[str]:
    """Return the experiments to run, in their order; all but the search if None.

    Raises:
        ConfigError: there is no such experiment.
    """
    unknown = [name for name in names or () if name not in (*NAMES, SEARCH)]
    if unknown:
        raise ConfigError(
            f"--only: there is no experiment {', '.join(map(repr, unknown))}.",
            f"Give --only some of {', '.join((*NAMES, SEARCH))}.",
        )
    return [name for name in (*NAMES, SEARCH) if name in (names or NAMES)]


@dataclass(frozen=True)
class Setting:
    """Dataset, recipe, seeds and model that all experiments of a study share.

    Attributes:
        dataset: with features, if the model needs them.
        recipe: the default that all variants are compared with.
        seeds: every variant is trained with each of them.
        model: the model whose recipe is searched for; all other experiments are CRANE's.
    """

    dataset: Dataset
    recipe: Recipe
    seeds: Sequence[int]
    model: str = "crane"

    def check(self) -> None:
        """Check that the experiments can run.

        Raises:
            DataError: the dataset lacks features that the model needs or the recipe names, or a split.
            ConfigError: no seed, or one that is out of range.
        """
        dataset = self.dataset
        if self.model in NEED_FEATURES and not dataset.features:
            raise DataError(
                f"{dataset.name} has no item features, and every experiment is about them.",
                "Deliver {modality}_feat.npy files, one row per item, or choose another folder.",
            )
        unknown = sorted(set(self.recipe.features.modalities) - set(dataset.features))
        if unknown:
            raise DataError(
                f"{dataset.name} has no features {', '.join(unknown)}.",
                f"Set features.modalities to some of {', '.join(sorted(dataset.features))}.",
            )
        dataset.require_splits()
        if not self.seeds:
            raise ConfigError("No seed was given.", "Give --seeds one number or more, for example --seeds 0 1 2.")
        for seed in self.seeds:
            self.recipe.with_seed(seed)


class Study:
    """Experiments on one dataset.

    Args:
        setting: what all experiments have in common.
        trials: folder of trials and measurements.
        budget: no work starts that is expected to exceed it.
        show: takes progress.

    Raises:
        DataError, ConfigError: see `Setting.check`.
    """

    def __init__(self, setting: Setting, trials: Trials, budget: Budget, show: Show) -> None:
        setting.check()
        self.dataset = setting.dataset
        self.recipe = setting.recipe
        self.seeds = list(dict.fromkeys(setting.seeds))
        self.model = setting.model
        self.trials = trials
        self.measurements = Measurements(trials)
        self.budget = budget
        self.show = show
        self.plan = experiment_plan(self.recipe, self.dataset.features)
        self._pace = Pace()
        self._same_weights: SameWeights | None = None

    def run(self, names: Sequence[str], num_trials: int) -> dict[str, Any]:
        """Run experiments. Return their results and what is missing, JSON values.

        First every variant is trained with the first seed, then come the measurements without training, then the
        other seeds. So each question has an answer when the budget ends early.
        """
        experiments = [self.plan[name] for name in names if name != SEARCH]
        self._train(experiments, self.seeds[:1])
        if "phi" in names:
            self._measure_forms()
        if "cost" in names:
            self._measure_growth()
        self._train(experiments, self.seeds[1:])
        results = [self._result(experiment) for experiment in experiments]
        if SEARCH in names:
            results.append(self._search(num_trials))
        return {
            "dataset": self.dataset.facts(),
            "recipe": self.recipe.model_dump(mode="json"),
            "seeds": self.seeds,
            "experiments": {result["name"]: summary.finite(result) for result in results},
            "missing": [missing for result in results for missing in result["missing"]],
        }

    def _train(self, experiments: Sequence[Experiment], seeds: Sequence[int]) -> None:
        """Make the missing trials, each once, the default first."""
        if not (seeds and experiments):
            return
        needed: dict[str, tuple[str, str, Recipe, int]] = {}
        for seed in seeds:
            for experiment in experiments:
                for variant in sorted(experiment.variants, key=lambda each: not self._is_default(each)):
                    recipe = changed(self.recipe, variant.changes)
                    key = self.trials.key(self.dataset, experiment.model, recipe, seed)
                    needed.setdefault(key, (f"{experiment.name}: {variant.label}", experiment.model, recipe, seed))
        missing = [entry for entry in needed.values() if not self.trials.find(self.dataset, *entry[1:])]
        self.show("trials", f"needed={len(needed)} found={len(needed) - len(missing)} to_make={len(missing)}")
        for done, (label, model, recipe, seed) in enumerate(missing):
            if not self.budget.allows(self._pace.mean):
                self.show("trials", f"stopped by the budget made={done} missing={len(missing) - done}")
                return
            started = time.monotonic()
            trial = self.trials.find_or_make(self.dataset, model, recipe, seed)
            self._pace.seconds.append(time.monotonic() - started)
            recall, left = trial.recall("validation"), self._pace.mean * (len(missing) - done - 1)
            self.show(
                "trials",
                f"{done + 1}/{len(missing)} {label} seed={seed} validation_recall@20={recall:.4f} "
                f"seconds={self._pace.seconds[-1]:.1f} left={left:.0f}s",
            )

    def _is_default(self, variant: Variant) -> bool:
        return changed(self.recipe, variant.changes) == self.recipe

    def _result(self, experiment: Experiment) -> dict[str, Any]:
        measured = [self._measured(variant, experiment.model) for variant in experiment.variants]
        table = summary.rows(measured)
        result = {
            "name": experiment.name,
            "title": experiment.title,
            "question": experiment.question,
            "note": experiment.note,
            "table": table,
            "answer": summary.answer(table) if table else "",
            "curves": {each.label: each.epochs() for each in measured},
            "missing": [f"{experiment.name}: {each.label}, seed {seed}" for each in measured for seed in each.missing],
        }
        extra = {"phi": self._forms, "cost": self._growth}.get(experiment.name)
        if extra:
            result |= extra(result)
        if experiment.name == "profiles":
            train = self.dataset.interactions.train
            thirds = summary.by_diversity(
                measured,
                interest_entropy(self.dataset.joint(self.recipe.features), train),
                train.counts(),
            )
            text = f"{result['answer']} {summary.diversity_answer(thirds)}".rstrip()
            result |= {"thirds": thirds, "answer": text}
        return result

    def _measured(self, variant: Variant, model: str) -> Measured:
        recipe = changed(self.recipe, variant.changes)
        found = {seed: self.trials.find(self.dataset, model, recipe, seed) for seed in self.seeds}
        return Measured(
            variant.label,
            recipe == self.recipe,
            {seed: trial for seed, trial in found.items() if trial},
            [seed for seed, trial in found.items() if not trial],
        )

    def _form_identity(self, phi: Phi) -> tuple[Any, ...]:
        sections = {"features", "profiles", "refine"}
        return "form", self.dataset.fingerprint, self.recipe.model_dump(mode="json", include=sections), phi

    def _measure_forms(self) -> None:
        for phi in get_args(Phi):
            if self.measurements.find(*self._form_identity(phi)) or not self.budget.allows(0):
                continue
            if self._same_weights is None:
                self.show("phi", "fit one set of weights for every form")
                self._same_weights = SameWeights(self.dataset, self.recipe)
            weights = self._same_weights
            found = self.measurements.take(lambda: weights.measure(phi), *self._form_identity(phi))  # noqa: B023
            self.show("phi", f"{phi} seconds={found['seconds']:.2f} peak_bytes={found['peak_bytes']}")

    def _forms(self, result: dict[str, Any]) -> dict[str, Any]:
        found = {phi: self.measurements.find(*self._form_identity(phi)) for phi in get_args(Phi)}
        forms = [form for form in found.values() if form]
        missing = [f"phi: pass with {phi}" for phi, form in found.items() if not form]
        return {
            "forms": forms,
            "busy": _busy(forms),
            "answer": f"{result['answer']} {summary.forms_answer(forms)}".rstrip(),
            "missing": [*result["missing"], *missing],
        }

    def _growth_identity(self, phi: Phi, size: int) -> tuple[Any, ...]:
        settings = self.recipe.refine.model_dump(mode="json", exclude=_FIT_ONLY)
        return "growth", self._num_modalities, settings, phi, size

    @property
    def _num_modalities(self) -> int:
        return len(self.recipe.features.modalities or self.dataset.features)

    def _measure_growth(self) -> None:
        sizes = catalog_sizes(self.dataset.interactions.num_items)
        for phi in get_args(Phi):
            last = 0.0
            for size in sizes:
                found = self.measurements.find(*self._growth_identity(phi, size))
                if found is None:
                    # The time grows at most with the square of the items, and each size has twice the items.
                    expected = 4 * last
                    if expected > MOST_SECONDS or not self.budget.allows(expected):
                        break
                    found = self.measurements.take(
                        lambda: measure_growth(phi, size, self._num_modalities, self.recipe),  # noqa: B023
                        *self._growth_identity(phi, size),
                    )
                    self.show("cost", f"{phi} items={size} seconds={found['seconds']:.3f}")
                last = found["seconds"]

    def _growth(self, result: dict[str, Any]) -> dict[str, Any]:
        sizes = catalog_sizes(self.dataset.interactions.num_items)
        points: dict[str, list[dict[str, Any]]] = {}
        laws, missing = {}, []
        for phi in get_args(Phi):
            found = [self.measurements.find(*self._growth_identity(phi, size)) for size in sizes]
            points[phi] = [point for point in found if point]
            laws[phi] = {
                name: vars(law) if law else None
                for name in ("seconds", "peak_bytes")
                for law in [fit_power_law([p["items"] for p in points[phi]], [p[name] for p in points[phi]])]
            }
            last = points[phi][-1]["seconds"] if points[phi] else 0.0
            if len(points[phi]) < len(sizes) and 4 * last <= MOST_SECONDS:
                missing.append(f"cost: {phi} from {sizes[len(points[phi])]} items")
        return {
            "points": points,
            "laws": laws,
            "busy": _busy([point for found in points.values() for point in found]),
            "sizes": sizes,
            "most_seconds": MOST_SECONDS,
            "shape": {"modalities": self._num_modalities, "dim": self.recipe.refine.embedding_dim},
            "answer": summary.growth_answer(laws),
            "missing": missing,
        }

    def _search(self, num_trials: int) -> dict[str, Any]:
        # Optuna takes a second to import, and only a search needs it.
        from crane_core.experiments.search import Search, as_yaml, folder_of

        folder = folder_of(self.trials, self.model)
        with held(folder, lambda: self.show("search", f"waits for another process that searches in {folder}")):
            search = Search(self.dataset, self.recipe, self.seeds[0], self.trials, self.model)
            search.run(num_trials, self.budget.allows, lambda line: self.show("search", line))
            trials, best = search.record(), search.best()
        variants = [Variant("default")]
        if best is not None and best != self.recipe:
            tree, base = best.model_dump(), self.recipe.model_dump()
            differences = {
                f"{section}.{name}": value
                for section, fields in tree.items()
                if fields
                for name, value in fields.items()
                if value != base[section][name]
            }
            variants.append(Variant("best by validation", differences))
        experiment = Experiment(
            SEARCH,
            "Search for a better recipe" + (f" of {self.model}" if self.model != "crane" else ""),
            "Which recipe within the search space has the highest validation Recall@20?",
            tuple(variants),
            f"TPE, seed {self.seeds[0]}; a trial sees no test interaction. The test figures below were computed "
            "after the search.",
            self.model,
        )
        self._train([experiment], self.seeds)
        result = self._result(experiment)
        if len(trials) < num_trials:
            result["missing"] = [f"search: {num_trials - len(trials)} of {num_trials} trials", *result["missing"]]
        if len(variants) == 1:
            result["answer"] = (
                f"No trial of {len(trials)} beats the default on validation." if trials else "No trial yet."
            )
        return result | {
            "trials": trials,
            "space": {name: str(distribution) for name, distribution in search.space.items()},
            "model": self.model,
            "best": as_yaml(best, self.model) if best else None,
            "changes": dict(variants[-1].changes),
        }


def _busy(measurements: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the highest load and the cores if the load exceeded the cores in a measurement, else None."""
    worst = max(measurements, key=lambda each: each["load"], default=None)
    if worst is None or worst["load"] <= worst["cores"]:
        return None
    return {"load": worst["load"], "cores": worst["cores"]}
