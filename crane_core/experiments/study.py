"""Run experiments within a budget: cells and measurements that are there are found, the others are made in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from crane_core.config import Phi
from crane_core.errors import ConfigError, DataError
from crane_core.evaluation.slices import interest_entropy
from crane_core.experiments import summary as answers
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
from crane_core.experiments.plans import NAMES, SEARCH, Experiment, Variant, changed, plan
from crane_core.experiments.summary import Measured
from crane_core.experiments.trials import Cells

_FIT_ONLY = {"phi", "num_steps", "batch_size", "learning_rate", "temperature", "agreement_weight"}

Show = Callable[[str, str], None]
"""Gets what the line is about and the line."""


class Budget:
    """Time that may be spent.

    Args:
        minutes: None for no bound.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def allows(self, seconds: float) -> bool:
        """Whether work that is expected to take so long may start."""
        return self._end is None or time.monotonic() + seconds < self._end


@dataclass
class Pace:
    """How long a kind of work takes."""

    seconds: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.seconds) / len(self.seconds) if self.seconds else 0.0


def chosen(names: Sequence[str] | None) -> list[str]:
    """The experiments to run, in their order; all but the search when None.

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


class Study:
    """Experiments on one dataset.

    Args:
        dataset: with features.
        recipe: the default all variants are compared with.
        seeds: every variant is trained with each of them.
        cells: where trainings and measurements are kept.
        budget: no work starts that is expected to exceed it.
        show: gets progress.
        model: whose recipe is searched for; all other experiments are CRANE's.

    Raises:
        DataError: the dataset has no features and the model needs them, or not those the recipe names.
        ConfigError: no seed, or one that is out of range.
    """

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        seeds: Sequence[int],
        cells: Cells,
        budget: Budget,
        show: Show,
        model: str = "crane",
    ) -> None:
        if model in NEED_FEATURES and not dataset.features:
            raise DataError(
                f"{dataset.name} has no item features, and every experiment is about them.",
                "Deliver {modality}_feat.npy files, one row per item, or choose another folder.",
            )
        unknown = sorted(set(recipe.features.modalities) - set(dataset.features))
        if unknown:
            raise DataError(
                f"{dataset.name} has no features {', '.join(unknown)}.",
                f"Set features.modalities to some of {', '.join(sorted(dataset.features))}.",
            )
        dataset.require_splits()
        if not seeds:
            raise ConfigError("No seed was given.", "Give --seeds one number or more, for example --seeds 0 1 2.")
        for seed in seeds:
            recipe.with_seed(seed)
        self.dataset = dataset
        self.recipe = recipe
        self.seeds = list(dict.fromkeys(seeds))
        self.cells = cells
        self.measurements = Measurements(cells)
        self.budget = budget
        self.show = show
        self.model = model
        self.plan = plan(recipe, dataset.features)
        self._pace = Pace()
        self._same_weights: SameWeights | None = None

    def run(self, names: Sequence[str], num_trials: int) -> dict[str, Any]:
        """Run experiments; what they found and what is missing, JSON values.

        The first seed of everything comes first, then what is measured without training, then the other seeds: a
        budget that ends early leaves an answer to every question instead of all of one.
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
            "experiments": {result["name"]: answers.finite(result) for result in results},
            "missing": [missing for result in results for missing in result["missing"]],
        }

    def _train(self, experiments: Sequence[Experiment], seeds: Sequence[int]) -> None:
        """Make the cells that are not there, each once, the default first."""
        if not (seeds and experiments):
            return
        cells: dict[str, tuple[str, str, Recipe, int]] = {}
        for seed in seeds:
            for experiment in experiments:
                for variant in sorted(experiment.variants, key=lambda each: not self._is_default(each)):
                    recipe = changed(self.recipe, variant.changes)
                    key = self.cells.key(self.dataset, experiment.model, recipe, seed)
                    cells.setdefault(key, (f"{experiment.name}: {variant.label}", experiment.model, recipe, seed))
        open_cells = [entry for entry in cells.values() if not self.cells.find(self.dataset, *entry[1:])]
        self.show("cells", f"needed={len(cells)} found={len(cells) - len(open_cells)} to_make={len(open_cells)}")
        for done, (label, model, recipe, seed) in enumerate(open_cells):
            if not self.budget.allows(self._pace.mean):
                self.show("cells", f"stopped by the budget made={done} missing={len(open_cells) - done}")
                return
            started = time.monotonic()
            cell = self.cells.cell(self.dataset, model, recipe, seed)
            self._pace.seconds.append(time.monotonic() - started)
            recall, left = cell.recall("validation"), self._pace.mean * (len(open_cells) - done - 1)
            self.show(
                "cells",
                f"{done + 1}/{len(open_cells)} {label} seed={seed} validation_recall@20={recall:.4f} "
                f"seconds={self._pace.seconds[-1]:.1f} left={left:.0f}s",
            )

    def _is_default(self, variant: Variant) -> bool:
        return changed(self.recipe, variant.changes) == self.recipe

    def _result(self, experiment: Experiment) -> dict[str, Any]:
        measured = [self._measured(variant, experiment.model) for variant in experiment.variants]
        table = answers.rows(measured)
        result = {
            "name": experiment.name,
            "title": experiment.title,
            "question": experiment.question,
            "note": experiment.note,
            "table": table,
            "answer": answers.answer(table) if table else "",
            "curves": {each.label: each.epochs() for each in measured},
            "missing": [f"{experiment.name}: {each.label}, seed {seed}" for each in measured for seed in each.missing],
        }
        extra = {"phi": self._forms, "cost": self._growth}.get(experiment.name)
        if extra:
            result |= extra(result)
        if experiment.name == "profiles":
            train = self.dataset.interactions.train
            thirds = answers.by_diversity(
                measured,
                interest_entropy(self.dataset.joint(self.recipe.features), train),
                train.counts(),
            )
            text = f"{result['answer']} {answers.diversity_answer(thirds)}".rstrip()
            result |= {"thirds": thirds, "answer": text}
        return result

    def _measured(self, variant: Variant, model: str) -> Measured:
        recipe = changed(self.recipe, variant.changes)
        found = {seed: self.cells.find(self.dataset, model, recipe, seed) for seed in self.seeds}
        return Measured(
            variant.label,
            recipe == self.recipe,
            {seed: cell for seed, cell in found.items() if cell},
            [seed for seed, cell in found.items() if not cell],
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
            "answer": f"{result['answer']} {answers.forms_answer(forms)}".rstrip(),
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
                    # Twice the items take at most four times as long.
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
            "answer": answers.growth_answer(laws),
            "missing": missing,
        }

    def _search(self, num_trials: int) -> dict[str, Any]:
        # Optuna takes a second to import, and only a search needs it.
        from crane_core.experiments.search import Search, as_yaml, folder_of

        folder = folder_of(self.cells, self.model)
        with held(folder, lambda: self.show("search", f"waits for another process that searches in {folder}")):
            search = Search(self.dataset, self.recipe, self.seeds[0], self.cells, self.model)
            search.run(num_trials, self.budget.allows, lambda line: self.show("search", line))
            trials, best = search.record(), search.best()
        variants = [Variant("default")]
        if best is not None and best != self.recipe:
            tree, base = best.model_dump(), self.recipe.model_dump()
            differences = {
                f"{section}.{name}": value
                for section, fields in tree.items()
                for name, value in fields.items()
                if value != base[section][name]
            }
            variants.append(Variant("best by validation", differences))
        experiment = Experiment(
            SEARCH,
            "Search for a better recipe" + (f" of {self.model}" if self.model != "crane" else ""),
            "Which recipe within the search space has the highest validation Recall@20?",
            tuple(variants),
            f"TPE, seed {self.seeds[0]}; a trial sees no test interaction. The test figures below were read once the "
            "search had ended.",
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
    """The highest load and the cores, where others kept more cores busy than there are while something was measured."""
    worst = max(measurements, key=lambda each: each["load"], default=None)
    if worst is None or worst["load"] <= worst["cores"]:
        return None
    return {"load": worst["load"], "cores": worst["cores"]}
