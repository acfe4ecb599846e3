"""From cells to tables and to the one sentence that answers an experiment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crane_core.experiments.trials import Cell, PerUser
from crane_core.numerics.bootstrap import bootstrap, paired_bootstrap
from crane_core.report.page import signed

METRICS = ("recall@20", "ndcg@20")
NUM_RESAMPLES = 1000
THIRDS = ("Narrow interests", "Middle", "Diverse interests")


@dataclass(frozen=True)
class Measured:
    """The cells of one variant.

    Attributes:
        label: of the variant.
        is_default: whether it is the recipe the others are compared with.
        cells: seed to cell, those that are made.
        missing: seeds without a cell.
    """

    label: str
    is_default: bool
    cells: Mapping[int, Cell]
    missing: Sequence[int]

    def epochs(self) -> list[dict[str, float]]:
        """The curve of the first seed's training; empty where no cell holds one."""
        return next((self.cells[seed].facts.get("epochs", []) for seed in sorted(self.cells)), [])


def rows(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The table of an experiment, JSON values.

    Means over seeds of per-user metrics, with bootstrap intervals over users; the difference to the default is over
    the same users and the seeds both have. A variant without a cell has None where a number would be.
    """
    default = next((each for each in measured if each.is_default), None)
    return [_row(each, default) for each in measured]


def _row(each: Measured, default: Measured | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "label": each.label,
        "default": each.is_default,
        "seeds": sorted(each.cells),
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
    if not each.cells:
        return row
    cells = list(each.cells.values())
    row |= {split: intervals(averaged(cells, split)) for split in ("validation", "test")}
    row |= {
        "by_seed": [cell.recall("test") for cell in cells],
        "seconds": float(np.mean([cell.seconds for cell in cells])),
        "peak_bytes": max(cell.peak_bytes for cell in cells),
        "content_seconds": _mean_fact(cells, "content_seconds"),
        "trust": _mean_fact(cells, "trust"),
        "alone": _mean([cell.facts["validation"]["recall@20"] for cell in cells if "validation" in cell.facts]),
        "profile_spread": cells[0].facts.get("profile_spread", {}),
        "test_alone": intervals(averaged(cells, "alone")) if all(cell.part("alone") for cell in cells) else None,
    }
    shared = sorted(set(each.cells) & set(default.cells)) if default else []
    if default and shared and not each.is_default:
        pair = [averaged([side.cells[seed] for seed in shared], "test") for side in (each, default)]
        row["difference"] = difference(*pair)
    return row


def averaged(cells: Sequence[Cell], part: str, keep: np.ndarray | None = None) -> PerUser:
    """Metrics of each user, averaged over cells of the same users.

    Args:
        cells: of the same dataset.
        part: see `Cell.part`; every cell has it.
        keep: users to restrict to, bool [num_users].

    Returns:
        The metrics that all cells have.
    """
    tables = [found for cell in cells if (found := cell.part(part))]
    assert len(tables) == len(cells)
    users = tables[0]["users"]
    assert all(np.array_equal(table["users"], users) for table in tables)
    inside = slice(None) if keep is None else keep[users]
    names = [name for name in tables[0] if name != "users" and all(name in table for table in tables)]
    return {"users": users[inside]} | {
        name: np.mean([table[name] for table in tables], axis=0)[inside] for name in names
    }


def difference(challenger: PerUser, reference: PerUser) -> dict[str, dict[str, float]]:
    """Paired difference challenger - reference of every metric."""
    found = paired_bootstrap(_metrics(challenger), _metrics(reference), NUM_RESAMPLES, 0)
    return {name: interval.as_dict() for name, interval in found.items()}


def intervals(table: PerUser) -> dict[str, dict[str, float]] | None:
    """Means of `METRICS` over users with their intervals; None without a user."""
    if not len(table["users"]):
        return None
    return {name: interval.as_dict() for name, interval in bootstrap(_metrics(table), NUM_RESAMPLES, 0).items()}


def _metrics(table: PerUser) -> dict[str, np.ndarray]:
    return {name: table[name] for name in METRICS}


def _mean_fact(cells: Sequence[Cell], name: str) -> float | None:
    return _mean([cell.facts[name] for cell in cells if name in cell.facts])


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def answer(table: Sequence[Mapping[str, Any]]) -> str:
    """What the table says: the choice by validation and its test difference, and what differs by more than chance."""
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
        sentences.append("Chance is that of the users alone: one seed says nothing of that of training.")
    unmeasured = len(table) - len(known)
    if unmeasured:
        sentences.append(f"{unmeasured} of {len(table)} variants are not measured yet.")
    return " ".join(sentences)


def best_by_validation(table: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of the highest validation Recall@20, the default where it ties."""
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
    """The variants compared within thirds of the test users, from narrow to diverse interests.

    Args:
        measured: the variants, one of them the default.
        entropy: float64 [num_users].
        items: int [num_users], training items.
    """
    made = [each for each in measured if each.cells]
    default = next((each for each in made if each.is_default), None)
    if default is None:
        return []
    users = next(iter(default.cells.values())).test["users"]
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
            values[each.label] = intervals(averaged(list(each.cells.values()), "test", keep))
            shared = sorted(set(each.cells) & set(default.cells))
            if shared and not each.is_default:
                pair = [averaged([side.cells[seed] for seed in shared], "test", keep) for side in (each, default)]
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
    """Whether any third of the users is served better by another profile."""
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
    """The exponents, one sentence."""
    parts = [
        f"{phi} as items^{law['seconds']['exponent']:.2f}"
        for phi, law in laws.items()
        if law.get("seconds") is not None
    ]
    return f"Time grows for {', '.join(parts)}." if parts else "No answer yet: fewer than three sizes are measured."


def forms_answer(forms: Sequence[Mapping[str, Any]]) -> str:
    """The fastest form, and the errors of those that approximate."""
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
    """JSON values with None for what is no number."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
