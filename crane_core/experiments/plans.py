"""Experiment plan: for each experiment its question and the variants of one recipe that it compares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from crane_core.config import Phi, RunConfig
from crane_core.config_file import load_config
from crane_core.errors import ConfigError
from crane_core.experiments.models import Recipe
from crane_core.model_config import CraneSettings

NAMES = ("form", "training", "rca", "neighbours", "profiles", "phi", "contrast", "cost", "modalities")
"""Experiments of every run; `search` runs only on request."""

SEARCH = "search"

SECTIONS = tuple(name for name in Recipe.model_fields if name in RunConfig.model_fields)
"""Sections that a recipe shares with the configuration of a run."""


@dataclass(frozen=True)
class Variant:
    """One variant of a recipe.

    Attributes:
        label: its name in tables and plots.
        changes: `section.field` to value, the differences to the recipe.
    """

    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A question and the variants that answer it.

    Attributes:
        name: its name on the command line.
        title: its heading on the page.
        question: one sentence.
        variants: none if it is measured without training.
        note: what a reader must know to understand the answer.
        model: the model that every variant trains.
    """

    name: str
    title: str
    question: str
    variants: tuple[Variant, ...] = ()
    note: str = ""
    model: str = "crane"


def load_recipe(source: str | None, overrides: list[str]) -> Recipe:
    """Return the recipe of a preset or YAML file, or the default one, with `section.field=value` overrides.

    Raises:
        ConfigError: see `crane_core.config_file.load_config`; or an override of a section that no experiment reads.
    """
    for override in overrides:
        section = override.partition(".")[0]
        if section not in SECTIONS:
            raise ConfigError(
                f"--set {override!r}: experiments read no section {section!r}.",
                f"Name one of the sections {', '.join(SECTIONS)}.",
            )
    config = load_config(source, [*overrides, "window.start=2000-01-01", "window.end=2000-01-02"])
    return Recipe(**{name: getattr(config, name) for name in SECTIONS})


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe with values of `section.field` replaced, validated."""
    tree = recipe.model_dump()
    for path, value in changes.items():
        section, _, name = path.partition(".")
        tree[section][name] = value
    return Recipe.model_validate(tree)


def experiment_plan(recipe: Recipe, modalities: Iterable[str]) -> dict[str, Experiment]:
    """Return the experiments by name.

    The recipe's own value is added to every grid, so that each experiment includes the recipe itself once.

    Args:
        recipe: the default that every variant is compared with.
        modalities: names of the modalities of the dataset.
    """
    experiments = (
        _form(recipe),
        _training(recipe),
        _rca(recipe),
        _neighbours(recipe),
        _profiles(recipe),
        _phi(recipe),
        _contrast(recipe),
        Experiment(
            "cost",
            "Cost of RCA by the size of the catalog",
            "How do time and memory of RCA grow with the number of items?",
            note="Rows are random, with the modalities and the width of this recipe; every item attends to all items.",
        ),
        _modalities(recipe, modalities),
    )
    return {experiment.name: experiment for experiment in experiments}


def _training(recipe: Recipe) -> Experiment:
    starts = sorted(
        get_args(CraneSettings.model_fields["joint_start"].annotation), key=lambda s: s != recipe.crane.joint_start
    )
    variants = [Variant("staged", {"crane.mode": "staged"})]
    variants += [Variant(f"joint, {start}", {"crane.mode": "joint", "crane.joint_start": start}) for start in starts]
    return Experiment(
        "training",
        "Staged against joint training",
        "What does fitting RCA once before CRANE, instead of in every step, cost and save?",
        tuple(variants),
        "Staged, RCA is fitted once and its rows are frozen. Joint, as in the paper, RCA learns by CRANE's own loss, "
        "from the fitted weights or from scratch, and the item graph is built anew from the current rows.",
    )


def _form(recipe: Recipe) -> Experiment:
    paper = {"semantic_items": "content", "semantic_users": "profiles", "own_content": False, "semantic_weight": "none"}
    variants: dict[str, dict[str, Any]] = {
        "as configured": {},
        "no own content": {"own_content": False},
        "h = content, no gate, as in the paper": paper,
        "the same, learned by BPR": paper | {"loss": "bpr"},
        "no gate": {"semantic_weight": "none"},
        "learned by BPR": {"loss": "bpr"},
        "interactions weigh alike": {"user_balance": 0.0},
    }
    distinct: dict[str, Variant] = {}
    for label, changes in variants.items():
        variant = Variant(label, {f"crane.{name}": value for name, value in changes.items()})
        distinct.setdefault(changed(recipe, variant.changes).model_dump_json(), variant)
    return Experiment(
        "form",
        "The form of CRANE against the paper's",
        "What do the departures from the paper bring?",
        tuple(distinct.values()),
        "The model lightgcn_softmax of the benchmark shows which part of the gain over LightGCN comes from the loss.",
    )


def _rca(recipe: Recipe) -> Experiment:
    depths = _grid(range(6), recipe.refine.num_recursions)
    variants = [Variant(f"R = {r}" if r else "R = 0, projection", {"refine.num_recursions": r}) for r in depths]
    return Experiment(
        "rca",
        "RCA against plain projection",
        "Is the recursion worth its cost, and how deep should it go?",
        tuple(variants),
        "R = 0 concatenates the projected modalities and learns the fusion alone.",
    )


def _neighbours(recipe: Recipe) -> Experiment:
    variants = [Variant(f"k = {k}", {"knn.k": k}) for k in _grid((5, 10, 15, 20), recipe.knn.k)]
    return Experiment(
        "neighbours", "Neighbours in the item graph", "How many neighbours should an item have?", tuple(variants)
    )


def _profiles(recipe: Recipe) -> Experiment:
    variants = [Variant(aggregate, {"profiles.aggregate": aggregate}) for aggregate in ("sum", "mean")]
    return Experiment(
        "profiles",
        "User profiles by sum or by mean",
        "Does the length of a summed profile carry information, and for which users?",
        tuple(variants),
        "Diversity of interests is the entropy of a user's training items over clusters of the item features. Users "
        "with more items can reach a higher entropy, so the table shows the number of items in each third.",
    )


def _phi(recipe: Recipe) -> Experiment:
    variants = [Variant(phi, {"refine.phi": phi}) for phi in get_args(Phi)]
    return Experiment(
        "phi",
        "Correlation function of RCA",
        "Which form of attention is worth its time, memory and error?",
        tuple(variants),
        "Time, memory and error are measured in one pass of all users and items through the same weights. The error is "
        "that of the rows' change by the recursions, in the Frobenius norm: softmax, tanh and linear are compared with "
        "themselves in float64, a sparse form with softmax in float64.",
    )


def _contrast(recipe: Recipe) -> Experiment:
    crane = recipe.crane
    changes: list[tuple[str, str, Any]] = [
        ("β", "crane.contrast_weight", beta) for beta in _grid((0.0, 1e-4, 1e-3, 1e-2, 1e-1), crane.contrast_weight)
    ]
    changes += [
        ("τ", "crane.contrast_temperature", tau) for tau in _grid((0.1, 0.2, 0.5, 1.0), crane.contrast_temperature)
    ]
    default = {"crane.contrast_weight": crane.contrast_weight, "crane.contrast_temperature": crane.contrast_temperature}
    variants = [Variant(f"β = {crane.contrast_weight:g}, τ = {crane.contrast_temperature:g}")]
    variants += [
        Variant(f"{sign} = {value:g}", {path: value}) for sign, path, value in changes if value != default[path]
    ]
    for name in ("contrast_negatives", "ranking_negatives"):
        options = get_args(CraneSettings.model_fields[name].annotation)
        variants += [
            Variant(f"{name}: {option}", {f"crane.{name}": option})
            for option in options
            if option != getattr(crane, name)
        ]
    return Experiment(
        "contrast",
        "Contrast of the two views",
        "How strong should the contrast be, at which temperature, and against which negatives?",
        tuple(variants),
        "Negatives of the contrast are the other distinct nodes of the batch; those of the ranking are random items.",
    )


def _modalities(recipe: Recipe, modalities: Iterable[str]) -> Experiment:
    names = sorted(recipe.features.modalities or modalities)
    variants = [Variant("all: " * (len(names) > 1) + " + ".join(names))]
    if len(names) > 1:
        variants += [Variant(name, {"features.modalities": (name,)}) for name in names]
    note = "" if len(names) > 1 else "There is one modality, so there is nothing to compare."
    return Experiment("modalities", "Modalities", "What does each modality bring alone?", tuple(variants), note)


def _grid(values: Iterable[Any], own: Any) -> list[Any]:
    """Return the values and the recipe's own, ascending."""
    return sorted({*values, own})
