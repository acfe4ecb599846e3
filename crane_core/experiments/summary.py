"""Summarise trials: the table of an experiment, and the text that answers its question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crane_core.experiments.trials import PerUser, Trial
from crane_core.numerics.bootstrap import bootstrap, paired_bootstrap
from crane_core.report.page import signed

METRICS = ("recall@20", "ndcg@20")
NUM_RESAMPLES = 1000
THIRDS = ("Narrow interests", "Middle", "Diverse interests")


@dataclass(frozen=True)
class Measured:
    """The trials of one variant.

    Attributes:
        label: name of the variant.
        is_default: whether it is the recipe that the others are compared with.
        trials: seed to finished trial.
        missing: seeds without a finished trial.
    """

    label: str
    is_default: bool
    trials: Mapping[int, Trial]
    missing: Sequence[int]

    def epochs(self) -> list[dict[str, float]]:
        """Return the training curve of the lowest seed; empty if its trial has none."""
        return next((self.trials[seed].facts.get("epochs", []) for seed in sorted(self.trials)), [])


def rows(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return the table of an experiment, JSON values.

    Metrics of a user are averaged over seeds; intervals are bootstrapped over users. The difference to the default is
    paired by user, over the seeds that both have. A variant without a trial has None in place of numbers.
    """
    default = next((each for each in measured if each.is_default), None)
    return [_row(each, default) for each in measured]


def _row(each: Measured, default: Measured | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "label": each.label,
        "default": each.is_default,
        "seeds": sorted(each.trials),
        "missing": list(each.missing),
        "validation": None,
        "test": None,
        "difference": None,
        "by_seed": None,
        "seconds": None,
        "content_seconds": None,
        "peak_bytes": None,
        "trust": None,
        "alone": None,
        "test_alone": None,
        "profile_spread": {},
    }
    if not each.trials:
        return row
    trials = list(each.trials.values())
    row |= {split: intervals(averaged(trials, split)) for split in ("validation", "test")}
    row |= {
        "by_seed": [trial.recall("test") for trial in trials],
        "seconds": float(np.mean([trial.seconds for trial in trials])),
        "peak_bytes": max(trial.peak_bytes for trial in trials),
        "content_seconds": _mean_fact(trials, "content_seconds"),
        "trust": _mean_fact(trials, "trust"),
        "alone": _mean([trial.facts["validation"]["recall@20"] for trial in trials if "validation" in trial.facts]),
        "profile_spread": trials[0].facts.get("profile_spread", {}),
        "test_alone": intervals(averaged(trials, "alone")) if all(trial.part("alone") for trial in trials) else None,
    }
    shared = sorted(set(each.trials) & set(default.trials)) if default else []
    if default and shared and not each.is_default:
        pair = [averaged([side.trials[seed] for seed in shared], "test") for side in (each, default)]
        row["difference"] = difference(*pair)
    return row


def averaged(trials: Sequence[Trial], part: str, keep: np.ndarray | None = None) -> PerUser:
    """Return the metrics of each user, averaged over trials of the same users.

    Args:
        trials: trials on one dataset.
        part: name of a part that every trial has, see `Trial.part`.
        keep: mask of the users to keep, bool [num_users]; all if None.

    Returns:
        The metrics that all trials have.
    """
    tables = [found for trial in trials if (found := trial.part(part))]
    assert len(tables) == len(trials)
    users = tables[0]["users"]
    assert all(np.array_equal(table["users"], users) for table in tables)
    inside = slice(None) if keep is None else keep[users]
    names = [name for name in tables[0] if name != "users" and all(name in table for table in tables)]
    return {"users": users[inside]} | {
        name: np.mean([table[name] for table in tables], axis=0)[inside] for name in names
    }


def difference(challenger: PerUser, reference: PerUser) -> dict[str, dict[str, float]]:
    """Return the paired difference challenger - reference of every metric."""
    found = paired_bootstrap(_metrics(challenger), _metrics(reference), NUM_RESAMPLES, 0)
    return {name: interval.as_dict() for name, interval in found.items()}


def intervals(table: PerUser) -> dict[str, dict[str, float]] | None:
    """Return means of `METRICS` over users with their intervals; None without a user."""
    if not len(table["users"]):
        return None
    return {name: interval.as_dict() for name, interval in bootstrap(_metrics(table), NUM_RESAMPLES, 0).items()}


def _metrics(table: PerUser) -> dict[str, np.ndarray]:
    return {name: table[name] for name in METRICS}


def _mean_fact(trials: Sequence[Trial], name: str) -> float | None:
    return _mean([trial.facts[name] for trial in trials if name in trial.facts])


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def answer(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the answer that a table gives: validation's choice, its test difference, significant differences."""
    known = [row for row in table if row["validation"] and row["test"]]
    default = next((row for row in known if row["default"]), None)
    if default is None or len(known) < 2:
        return f"No answer yet: {len(known)} of {len(table)} variants are measured."
    chosen = best_by_validation(known)
    if chosen is default:
        first = f"Validation prefers the default, {default['label']}."
    else:
        gain = chosen["validation"]["recall@20"]["mean"] - default["validation"]["recall@20"]["mean"]
        first = (
            f"Validation prefers {chosen['label']} ({signed(gain)} Recall@20 against the default); on test it differs "
            f"by {_written(chosen['difference'])}, {_verdict(chosen['difference'])}."
        )
    compared = [row for row in known if row["difference"]]
    better, worse = (
        [row["label"] for row in compared if sense * _beyond_chance(row["difference"]) > 0] for sense in (1, -1)
    )
    if not better and not worse:
        second = "No variant differs from the default by more than chance in test Recall@20."
    else:
        parts = [
            f"{word} than the default: {', '.join(names)}"
            for word, names in (("better", better), ("worse", worse))
            if names
        ]
        second = f"By more than chance in test Recall@20, {'; '.join(parts)}."
    sentences = [first, second]
    if min(len(row["seeds"]) for row in known) == 1:
        sentences.append(
            "The intervals cover variation between users only. One seed cannot show variation between trainings."
        )
    unmeasured = len(table) - len(known)
    if unmeasured:
        sentences.append(f"{unmeasured} of {len(table)} variants are not measured yet.")
    return " ".join(sentences)


def best_by_validation(table: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the row with the highest validation Recall@20, the default among equals."""
    return max(table, key=lambda row: (row["validation"]["recall@20"]["mean"], row["default"]))


def _written(values: Mapping[str, Mapping[str, float]]) -> str:
    found = values["recall@20"]
    return f"{signed(found['mean'])} [{signed(found['low'])}, {signed(found['high'])}]"


def _verdict(values: Mapping[str, Mapping[str, float]]) -> str:
    sense = _beyond_chance(values)
    return {1: "better by more than chance", -1: "worse by more than chance", 0: "which may be chance"}[sense]


def _beyond_chance(values: Mapping[str, Mapping[str, float]]) -> int:
    found = values["recall@20"]
    return 1 if found["low"] > 0 else -1 if found["high"] < 0 else 0


def by_diversity(measured: Sequence[Measured], entropy: np.ndarray, items: np.ndarray) -> list[dict[str, Any]]:
    """Compare the variants within thirds of the test users, from narrow to diverse interests.

    Args:
        measured: the variants, one of them the default.
        entropy: entropy of each user's interests, float64 [num_users]; NaN leaves the user out.
        items: number of training items of each user, int [num_users].
    """
    made = [each for each in measured if each.trials]
    default = next((each for each in made if each.is_default), None)
    if default is None:
        return []
    users = next(iter(default.trials.values())).test["users"]
    users = users[np.isfinite(entropy[users])]
    order = users[np.argsort(entropy[users], kind="stable")]
    table = []
    for label, third in zip(THIRDS, np.array_split(order, 3), strict=True):
        if not len(third):
            continue
        keep = np.zeros(len(entropy), dtype=bool)
        keep[third] = True
        values, differences = {}, {}
        for each in made:
            values[each.label] = intervals(averaged(list(each.trials.values()), "test", keep))
            shared = sorted(set(each.trials) & set(default.trials))
            if shared and not each.is_default:
                pair = [averaged([side.trials[seed] for seed in shared], "test", keep) for side in (each, default)]
                differences[each.label] = difference(*pair)
        table.append(
            {
                "label": label,
                "users": len(third),
                "entropy": [float(entropy[third].min()), float(entropy[third].max())],
                "median_items": float(np.median(items[third])),
                "values": values,
                "differences": differences,
            }
        )
    return table


def diversity_answer(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the thirds of the users in which another profile differs by more than chance, as text."""
    found = [
        f"{row['label'].lower()}: {label} {_verdict(values)} ({_written(values)})"
        for row in table
        for label, values in row["differences"].items()
        if _beyond_chance(values)
    ]
    if not any(row["differences"] for row in table):
        return ""
    if not found:
        return "In no third of the users, by diversity of interests, is the difference more than chance."
    return "By diversity of interests, " + "; ".join(found) + "."


def growth_answer(laws: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the exponents as a sentence."""
    parts = [
        f"{phi} as items^{law['seconds']['exponent']:.2f}"
        for phi, law in laws.items()
        if law.get("seconds") is not None
    ]
    return f"Time grows for {', '.join(parts)}." if parts else "No answer yet: fewer than three sizes are measured."


def forms_answer(forms: Sequence[Mapping[str, Any]]) -> str:
    """Return the fastest form and the errors of the approximate forms as a sentence."""
    if not forms:
        return ""
    fastest, slowest = (pick(forms, key=lambda form: form["seconds"]) for pick in (min, max))
    sparse = [form for form in forms if form["against"] != form["phi"] and form["error"] is not None]
    text = f"The fastest pass is {fastest['phi']}"
    if slowest["seconds"] > 0 and fastest is not slowest:
        text += f", {slowest['seconds'] / max(fastest['seconds'], 1e-9):.1f} times as fast as {slowest['phi']}"
    for form in sparse:
        text += f"; {form['phi']} misses what softmax adds by {100 * form['error']:.1f} %"
    return text + "."


def finite(value: Any) -> Any:
    """Replace NaN and infinity in JSON values by None."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
