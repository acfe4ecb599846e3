"""Run the experiments on one dataset: trials, one page, one JSON file.

{out}/report.html, results.json     the results, rewritten by every run
{out}/search/{model}/best.yaml      the best recipe of a search; `crane run --config` accepts that of CRANE
{out}/cells, measurements, work     what the next run reuses, like search/{model}/trials.db
{out}/log                           the log of the trainings
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crane_core.errors import ConfigError
from crane_core.experiments.data import load_dataset
from crane_core.experiments.plans import SEARCH, load_recipe
from crane_core.experiments.report import render
from crane_core.experiments.study import Budget, Setting, Study, chosen
from crane_core.experiments.summary import best_by_validation
from crane_core.experiments.trials import Trials
from crane_core.graph.faiss_search import use_threads
from jobs.commands import paths
from jobs.commands.steps import Steps

HEARTBEAT_SECONDS = 15.0


@dataclass(frozen=True)
class Request:
    """The flags of `crane experiments`.

    Attributes:
        data: folder in MMRec layout with features.
        only: names of experiments; all but the search when None.
        seeds: of every variant.
        minutes: no work starts that is expected to end later; None for no bound.
        num_trials: recipes a search tries in all.
        out: folder for everything; one below `.crane` when None.
        config: preset or file with the default recipe.
        overrides: `section.field=value`, applied last.
        num_threads: of torch and faiss.
        model: whose recipe the search is for.
    """

    data: Path
    only: list[str] | None
    seeds: list[int]
    minutes: float | None
    num_trials: int
    out: Path | None
    config: str | None
    overrides: list[str]
    num_threads: int
    model: str


def experiments(request: Request) -> dict[str, Any]:
    """Run experiments, write the page, and return paths and headline numbers.

    Raises:
        ConfigError: an unknown experiment, model, section or value, or `out` is a file.
        DataError: the folder cannot be read or has no features.
    """
    names, recipe = chosen(request.only), load_recipe(request.config, request.overrides)
    if request.model != "crane":
        _check_model(request.model, names)
    if request.num_threads < 1:
        raise ConfigError(f"--threads {request.num_threads} leaves none to work with.", "Give --threads 1 or more.")
    budget, steps = Budget(request.minutes), Steps()
    torch.set_num_threads(request.num_threads)
    use_threads(request.num_threads)
    dataset = load_dataset(request.data)
    out = (request.out or paths.HOME / "experiments" / dataset.name).absolute()
    trials = Trials(out)
    study = Study(Setting(dataset, recipe, request.seeds, request.model), trials, budget, steps.show)
    steps.show("experiments", f"{' '.join(names)} data={request.data} out={out}")
    with _logging(out / "log", steps):
        results = study.run(names, request.num_trials)
    results["seconds"] = round(steps.seconds, 1)
    files = _write(results, trials, request.model)
    return {
        **{name: str(out / path) for name, path in files.items()},
        "dataset": dataset.name,
        "complete": not results["missing"],
        "missing": results["missing"],
        "seconds": results["seconds"],
        "experiments": {name: _headline(found) for name, found in results["experiments"].items()},
    }


def _write(results: dict[str, Any], trials: Trials, model: str) -> dict[str, str]:
    """Write the page, the results and the best recipe of a search; return what each is to its path."""
    files = {"report": "report.html", "results": "results.json"}
    trials.storage.write(files["report"], render(results).encode())
    trials.storage.write(files["results"], json.dumps(results, indent=1).encode())
    best = results["experiments"].get(SEARCH, {}).get("best")
    if best:
        files["best"] = f"search/{model}/best.yaml"
        trials.storage.write(files["best"], best.encode())
    return files


def _check_model(model: str, names: list[str]) -> None:
    # Optuna takes a second to import.
    from crane_core.experiments.search import SPACES

    if model not in SPACES:
        raise ConfigError(
            f"--model: there is no recipe of {model!r} to search.", f"Give --model one of {', '.join(SPACES)}."
        )
    if names != [SEARCH]:
        raise ConfigError(
            f"--model {model} was given, and only the search knows it.",
            f"Give --only {SEARCH} with it, or drop --model.",
        )


def _headline(found: dict[str, Any]) -> dict[str, Any]:
    measured = [row for row in found["table"] if row["validation"] and row["test"]]
    headline: dict[str, Any] = {"answer": found["answer"]}
    if measured:
        best = best_by_validation(measured)
        headline |= {"best_by_validation": best["label"], "test": best["test"], "difference": best["difference"]}
    if "laws" in found:
        headline["exponents"] = {
            phi: {name: value and round(value["exponent"], 3) for name, value in law.items()}
            for phi, law in found["laws"].items()
        }
    return headline


class _Heartbeat(logging.Handler):
    """Show a line of the log at most every `HEARTBEAT_SECONDS`, and every warning at once."""

    def __init__(self, steps: Steps) -> None:
        super().__init__(logging.INFO)
        self.steps = steps
        self._last = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now - self._last >= HEARTBEAT_SECONDS or record.levelno >= logging.WARNING:
            self._last = now
            self.steps.show("working", record.getMessage())


@contextlib.contextmanager
def _logging(path: Path, steps: Steps) -> Iterator[None]:
    """Log the library to a file, and show a line of it on the terminal from time to time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = logging.FileHandler(path)
    everything.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    library = logging.getLogger("crane_core")
    before = library.handlers, library.level, library.propagate
    library.handlers, library.propagate = [everything, _Heartbeat(steps)], False
    library.setLevel(logging.INFO)
    try:
        yield
    finally:
        library.handlers, level, library.propagate = before
        library.setLevel(level)
        everything.close()
