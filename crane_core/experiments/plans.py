"""What the experiments ask and vary: each a list of variants of one recipe, the recipe itself among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from crane_core.config import Phi, RunConfig, Train, load_config
from crane_core.errors import ConfigError
from crane_core.experiments.models import Recipe

NAMES = ("form", "training", "rca", "neighbours", "profiles", "phi", "contrast", "cost", "modalities")
"""The experiments of every run; `search` is run when it is asked for."""

SEARCH = "search"

SECTIONS = tuple(name for name in Recipe.model_fields if name in RunConfig.model_fields)
"""The sections a recipe shares with the configuration of a run."""


@dataclass(frozen=True)
class Variant:
    """One way to do it.

    Attributes:
        label: how tables and plots name it.
        changes: `section.field` to value, what differs from the recipe.
    """

    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A question and the variants that answer it.

    Attributes:
        name: on the command line.
        title: heading.
        question: what is asked, one sentence.
        variants: none for what is measured without training.
        note: what the reader must know to read the answer.
        model: what the variants are variants of.
    """

    name: str
    title: str
    question: str
    variants: tuple[Variant, ...] = ()
    note: str = ""
    model: str = "crane"


def load_recipe(source: str | None, overrides: list[str]) -> Recipe:
    """The recipe of a preset or YAML file with `section.field=value` overrides; the defaults without either.

    Raises:
        ConfigError: see `crane_core.config.load_config`; or an override that no experiment reads.
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
    """The recipe with `section.field` replaced, validated."""
    tree = recipe.model_dump()
    for path, value in changes.items():
        section, _, name = path.partition(".")
        tree[section][name] = value
    return Recipe.model_validate(tree)


def plan(recipe: Recipe, modalities: Iterable[str]) -> dict[str, Experiment]:
    """The experiments by name, around a recipe.

    The recipe's own value is a point of every grid, so each experiment holds the recipe itself once.

    Args:
        recipe: the default every variant is compared with.
        modalities: of the dataset.
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
            note="Random rows with the modalities and the width of this recipe; every item attends to all items.",
        ),
        _modalities(recipe, modalities),
    )
    return {experiment.name: experiment for experiment in experiments}


def _training(recipe: Recipe) -> Experiment:
    starts = sorted(get_args(Train.model_fields["joint_start"].annotation), key=lambda s: s != recipe.train.joint_start)
    variants = [Variant("staged", {"train.mode": "staged"})]
    variants += [Variant(f"joint, {start}", {"train.mode": "joint", "train.joint_start": start}) for start in starts]
    return Experiment(
        "training",
        "Staged against joint training",
        "What does it cost, and what does it save, to fit RCA before CRANE instead of in every step?",
        tuple(variants),
        "Staged, RCA is fitted once and its rows are frozen. Joint, as in the paper, RCA learns by CRANE's own loss, "
        "from the fitted weights or from scratch, and the item graph is built anew from the current rows.",
    )


def _form(recipe: Recipe) -> Experiment:
    paper = {"semantic_items": "content", "semantic_users": "profiles", "own_content": False, "trust": "none"}
    variants: dict[str, dict[str, Any]] = {
        "as configured": {},
        "no own content": {"own_content": False},
        "h = content, no gate, as in the paper": paper,
        "the same, learned by BPR": paper | {"loss": "bpr"},
        "no gate": {"trust": "none"},
        "learned by BPR": {"loss": "bpr"},
        "interactions weigh alike": {"user_balance": 0.0},
    }
    distinct: dict[str, Variant] = {}
    for label, changes in variants.items():
        variant = Variant(label, {f"train.{name}": value for name, value in changes.items()})
        distinct.setdefault(changed(recipe, variant.changes).model_dump_json(), variant)
    return Experiment(
        "form",
        "The form of CRANE against the paper's",
        "What do the departures from the paper bring?",
        tuple(distinct.values()),
        "How much of the gain over LightGCN is owed to the loss alone: compare with lightgcn_softmax in the bench.",
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
        "Is the intensity in a summed profile signal, and for whom?",
        tuple(variants),
        "Interests are as diverse as the entropy of a user's training items over clusters of the item features. Users "
        "with more items can reach a higher entropy: the table says how many items the users of each third have.",
    )


def _phi(recipe: Recipe) -> Experiment:
    variants = [Variant(phi, {"refine.phi": phi}) for phi in get_args(Phi)]
    return Experiment(
        "phi",
        "Correlation function of RCA",
        "Which form of attention is worth its time, memory and error?",
        tuple(variants),
        "Time, memory and error are of one pass of all users and items through the same weights. The error is that of "
        "what the recursions add to the rows, in the Frobenius norm: softmax, tanh and linear against themselves in "
        "float64, a sparse form against softmax in float64.",
    )


def _contrast(recipe: Recipe) -> Experiment:
    train = recipe.train
    changes: list[tuple[str, str, Any]] = [
        ("β", "train.contrast_weight", beta) for beta in _grid((0.0, 1e-4, 1e-3, 1e-2, 1e-1), train.contrast_weight)
    ]
    changes += [("τ", "train.temperature", tau) for tau in _grid((0.1, 0.2, 0.5, 1.0), train.temperature)]
    default = {"train.contrast_weight": train.contrast_weight, "train.temperature": train.temperature}
    variants = [Variant(f"β = {train.contrast_weight:g}, τ = {train.temperature:g}")]
    variants += [
        Variant(f"{sign} = {value:g}", {path: value}) for sign, path, value in changes if value != default[path]
    ]
    for name in ("contrast_negatives", "ranking_negatives"):
        options = get_args(Train.model_fields[name].annotation)
        variants += [
            Variant(f"{name}: {option}", {f"train.{name}": option})
            for option in options
            if option != getattr(train, name)
        ]
    return Experiment(
        "contrast",
        "Contrast of the two views",
        "How strong should the contrast be, at which temperature, and against which negatives?",
        tuple(variants),
        "Negatives of the contrast are other distinct nodes of the batch, of the ranking random items.",
    )


def _modalities(recipe: Recipe, modalities: Iterable[str]) -> Experiment:
    names = sorted(recipe.features.modalities or modalities)
    variants = [Variant("all: " * (len(names) > 1) + " + ".join(names))]
    if len(names) > 1:
        variants += [Variant(name, {"features.modalities": (name,)}) for name in names]
    note = "" if len(names) > 1 else "There is one modality, so there is nothing to compare."
    return Experiment("modalities", "Modalities", "What does each modality bring alone?", tuple(variants), note)


def _grid(values: Iterable[Any], own: Any) -> list[Any]:
    """The values and the recipe's own, ascending."""
    return sorted({*values, own})
