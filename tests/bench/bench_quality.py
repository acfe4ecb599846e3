"""CRANE beside the baselines and the published references on one folder: accuracy, intervals, seconds.

    python -m tests.bench.bench_quality --data lfm2k --models crane lightgcn mgcn --seeds 0 1 2 --budget-minutes 60

Every model is trained for every seed by the same loop and ranks the whole catalog for every user with a test item,
training items masked. First the measure itself is checked against plain loops. A finished trial, one model and seed, is
kept and found the next time, by `crane experiments --out` of the same folder too; a training the budget cuts off goes
on from its checkpoint. A seed counts when every model has finished it. The last line on stdout is one JSON object;
progress goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import ValidationError

from crane_core.allowed import remedy_of
from crane_core.config_file import EXAMPLE, upgraded
from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.errors import EXIT_OK, EXIT_UNEXPECTED, ConfigError, CraneError
from crane_core.evaluation.baselines import popularity
from crane_core.evaluation.cold import summarise_cold
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import rank_users
from crane_core.evaluation.slices import interest_entropy, slices_of_test
from crane_core.experiments.data import Dataset, load_dataset
from crane_core.experiments.models import MODELS, NEED_FEATURES, VERSION, Recipe
from crane_core.experiments.summary import METRICS, NUM_RESAMPLES, averaged, difference, intervals
from crane_core.experiments.trials import Trial, Trials
from crane_core.graph.faiss_search import use_threads

logger = logging.getLogger("bench_quality")

K = 20
PACKAGES = ("torch", "numpy", "scipy", "faiss-cpu")


class BudgetSpent(BaseException):
    """The time is over, wherever the training is; checkpoints make that safe at any moment."""


def check_measure(interactions: Interactions) -> list[str]:
    """What is wrong with the measure: a list worked by hand, and popularity against plain loops on this dataset."""
    problems = []
    relevant = ItemLists.from_pairs(np.zeros(3, int), np.array([1, 2, 9]), 1)
    by_hand = user_metrics(np.array([[4, 1, 2]]), relevant, np.array([0]), (3,))
    second, third = 1 / math.log2(3), 1 / math.log2(4)
    expected = {"recall@3": 2 / 3, "ndcg@3": (second + third) / (1 + second + third)}
    for name, value in expected.items():
        if not math.isclose(by_hand[name][0], value):
            problems.append(f"{name} of a list worked by hand is {by_hand[name][0]}, expected {value}")
    users = np.flatnonzero(interactions.test.counts() > 0)
    found = user_metrics(
        rank_users(popularity(interactions), interactions.train, users, K), interactions.test, users, (K,)
    )
    plain = _plain_popularity(interactions, users)
    for name, values in found.items():
        gap = float(np.abs(values - plain[name]).max(initial=0))
        if not gap < 1e-9:
            problems.append(f"{name} of popularity differs from plain loops by up to {gap}")
    return problems


def _plain_popularity(interactions: Interactions, users: np.ndarray) -> dict[str, np.ndarray]:
    counts = [0] * interactions.num_items
    for item in interactions.train.items.tolist():
        counts[item] += 1
    order = sorted(range(interactions.num_items), key=lambda item: (-counts[item], item))
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for user in users.tolist():
        seen, wanted = (
            set(lists.items[lists.indptr[user] : lists.indptr[user + 1]].tolist())
            for lists in (interactions.train, interactions.test)
        )
        shown = [item for item in order[: K + len(seen)] if item not in seen][:K]
        gains = [1 / math.log2(place + 2) for place, item in enumerate(shown) if item in wanted]
        best = sum(1 / math.log2(place + 2) for place in range(min(K, len(wanted))))
        values[METRICS[0]].append(len(gains) / len(wanted))
        values[METRICS[1]].append(sum(gains) / best)
    return {name: np.array(column) for name, column in values.items()}


def summarise(
    trials: dict[str, list[Trial]], interactions: Interactions, entropy: np.ndarray | None = None
) -> dict[str, Any]:
    """Tables of the models.

    Args:
        trials: model to its trials, the same seeds for every model.
        interactions: of the dataset.
        entropy: of the users' interests, see `evaluation.slices`.

    Returns:
        `models`, `differences`, `slices` and `cold_items`, JSON values. Intervals are over users, whose metrics are
        first averaged over the seeds.
    """
    tables = {model: averaged(made, "test") for model, made in trials.items()}
    models = {
        model: (intervals(tables[model]) or {})
        | {
            "seconds": float(np.mean([trial.seconds for trial in made])),
            "validation": [trial.steering for trial in made],
            "seeds": [_training(trial) for trial in made],
        }
        for model, made in trials.items()
    }
    others = [model for model in tables if model != "crane"] if "crane" in tables else []
    cold = {model: averaged(made, "cold") for model, made in trials.items()}
    return {
        "models": models,
        "differences": {model: difference(tables["crane"], tables[model]) for model in others},
        "slices": {name: _slice(name, lists, trials) for name, lists in slices_of_test(interactions, entropy).items()},
        "cold_items": summarise_cold(interactions, cold, NUM_RESAMPLES, seed=0),
    }


def _training(trial: Trial) -> dict[str, Any]:
    """What a training says about itself; None for what the model does not have."""
    epochs = {name: trial.facts.get(name) for name in ("best_epoch", "num_epochs", "trust")}
    return {"validation_recall@20": trial.steering, "seconds": trial.seconds, **epochs}


def _slice(name: str, lists: ItemLists, trials: dict[str, list[Trial]]) -> dict[str, Any]:
    """Number of users of a slice of the test, and metrics of each model; None where a trial does not hold it."""
    inside = lists.counts() > 0
    # A slice of users is read off the test; one of items is a part of its own.
    part = {"cold_items": "cold", "head_items": "head_items", "tail_items": "tail_items"}.get(name, "test")
    found: dict[str, Any] = {"users": int(inside.sum())}
    for model, made in trials.items():
        known = found["users"] and all(trial.part(part) for trial in made)
        table = averaged(made, part, inside) if known else {}
        found[model] = {metric: float(table[metric].mean()) for metric in METRICS} if table else None
    return found


def read_recipe(source: str | None, modalities: Sequence[str], overrides: Sequence[str]) -> Recipe:
    """The recipe of a YAML file, or the default one, with `section.field=value` changes, values as YAML.

    Raises:
        ConfigError: not of that form, an unknown field, or a value out of range.
    """
    tree: dict[str, Any] = {}
    if source:
        try:
            tree = yaml.safe_load(Path(source).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"--config {source} cannot be read: {error}.", "Give a YAML file of sections.") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"--config {source} holds no sections.", "Give a YAML file of sections.")
    if modalities:
        tree.setdefault("features", {})["modalities"] = list(modalities)
    for override in overrides:
        path, sign, value = override.partition("=")
        section, dot, name = path.partition(".")
        if not (sign and dot and section and name):
            raise ConfigError(f"--set {override!r} is not of the form section.field=value.", EXAMPLE)
        tree.setdefault(section, {})[name] = yaml.safe_load(value)
    try:
        return Recipe.model_validate(upgraded(tree))
    except ValidationError as error:
        remedy = remedy_of(error, Recipe, "--set {field}=VALUE")
        raise ConfigError(f"The recipe is not valid: {error}.", remedy) from error


@contextlib.contextmanager
def budget(seconds: float) -> Iterator[None]:
    """Raise `BudgetSpent` in the main thread after some seconds, > 0."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise BudgetSpent

    former = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, former)


def fill(
    trials: Trials, dataset: Dataset, recipe: Recipe, wanted: Sequence[tuple[str, int]], seconds: float
) -> dict[tuple[str, int], Trial]:
    """Find or make trials, each a model and a seed, in order until the time is over.

    Returns:
        The finished trials; a trial that is there costs nothing and is never left out.
    """
    made = [name for name in wanted if trials.find(dataset, name[0], recipe, name[1])]
    logger.info("trials found=%d of=%d budget=%.0fs", len(made), len(wanted), seconds)
    started = time.monotonic()
    with contextlib.suppress(BudgetSpent), budget(seconds):
        for model, seed in wanted:
            if (model, seed) in made:
                continue
            logger.info("trial model=%s seed=%d", model, seed)
            trial = trials.find_or_make(dataset, model, recipe, seed)
            made.append((model, seed))
            logger.info(
                "trial model=%s seed=%d done=%d of=%d recall@20=%.4f ndcg@20=%.4f spent=%.0fs",
                model,
                seed,
                len(made),
                len(wanted),
                *(trial.test[name].mean() for name in METRICS),
                time.monotonic() - started,
            )
    # The time may have ended between the writing of a trial and the noting of it.
    found = {(model, seed): trials.find(dataset, model, recipe, seed) for model, seed in wanted}
    return {name: trial for name, trial in found.items() if trial}


def run(arguments: argparse.Namespace, command: str) -> int:
    recipe = read_recipe(arguments.config, arguments.modalities, arguments.set)
    dataset = load_dataset(arguments.data)
    if arguments.noise:
        dataset = dataset.with_noise(seed=0)
    if NEED_FEATURES & set(arguments.models):
        dataset.modalities(recipe.features)
    if arguments.cold:
        dataset = dataset.with_cold_items(arguments.cold, seed=0)
    interactions = dataset.interactions
    dataset.require_splits()
    problems = check_measure(interactions)
    if problems:
        logger.error("the measure is wrong: %s", "; ".join(problems))
        return EXIT_UNEXPECTED
    trials = Trials(arguments.work / dataset.name)
    wanted = [(model, seed) for seed in arguments.seeds for model in arguments.models]
    done = fill(trials, dataset, recipe, wanted, 60 * arguments.budget_minutes)
    missing = [f"{model} seed {seed}" for model, seed in wanted if (model, seed) not in done]
    seeds = [seed for seed in arguments.seeds if all((model, seed) in done for model in arguments.models)]
    if missing:
        logger.warning("the budget ran out; missing: %s", ", ".join(missing))
    if not seeds:
        logger.error("no seed is complete for all of %s: raise --budget-minutes", ", ".join(arguments.models))
        return EXIT_UNEXPECTED
    entropy = interest_entropy(dataset.joint(recipe.features), interactions.train) if dataset.features else None
    result = {
        "benchmark": "quality",
        "command": command,
        "device": f"cpu {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
            "code": VERSION,
        },
        "data": dataset.facts() | {"modalities": sorted(recipe.features.modalities or dataset.features)},
        "recipe": recipe.model_dump(mode="json"),
        "seeds": seeds,
        "missing": missing,
        **summarise(
            {model: [done[model, seed] for seed in seeds] for model in arguments.models}, interactions, entropy
        ),
    }
    print(json.dumps(result))
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_quality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder in MMRec layout")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget-minutes", type=float, default=60.0)
    parser.add_argument("--modalities", nargs="+", default=[], help="all that are found when left out")
    parser.add_argument(
        "--config", help="YAML file with the recipe, such as a search leaves; the default when left out"
    )
    parser.add_argument("--noise", action="store_true", help="replace the features by noise")
    parser.add_argument("--cold", type=float, default=0.0, help="share of the items that lose their training rows")
    parser.add_argument("--set", action="append", default=[], metavar="section.field=value")
    parser.add_argument("--work", type=Path, default=Path(".crane/bench/quality"), help="where trials are kept")
    parser.add_argument("--num-threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    try:
        if arguments.num_threads < 1 or not arguments.budget_minutes > 0:
            raise ConfigError("--num-threads and --budget-minutes must be above 0.", "Give both a number above 0.")
        if not 0 <= arguments.cold < 1:
            raise ConfigError(f"--cold is {arguments.cold}.", "Give a share from 0 to below 1, for example 0.1.")
        torch.set_num_threads(arguments.num_threads)
        use_threads(arguments.num_threads)
        return run(arguments, shlex.join(["python", "-m", "tests.bench.bench_quality", *argv]))
    except CraneError as error:
        logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
