"""Render the results of the experiments on a dataset as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from crane_core.report.page import FAINT, INK, STYLE, clean, environment, interval, plot_monitors, svg
from crane_core.training.curve import GRADIENT

DEFAULT_COLOUR, COLOUR, VALIDATION_COLOUR = "#d9822b", "#0f5c8c", "#8a94a0"
_FORM_COLOURS = ("#0f5c8c", "#d9822b", "#1d7a4d", "#6b4fa0", "#b3402e", "#66727e")


def render(results: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        results: the value of `Study.run`, with the `seconds` it took.

    Returns:
        HTML that loads nothing from other places.
    """
    with plt.rc_context(STYLE):
        plots = {name: _plots(found) for name, found in results["experiments"].items()}
    template = environment({"power": _power, "percent": _percent, "change": _change}).get_template("experiments.html")
    return template.render(
        dataset=results["dataset"],
        recipe=results["recipe"],
        seeds=results["seeds"],
        seconds_taken=results["seconds"],
        experiments=results["experiments"],
        missing=results["missing"],
        plots=plots,
        made_at=datetime.now(UTC),
        colours={"crane": COLOUR},
    )


def _plots(found: Mapping[str, Any]) -> dict[str, Markup]:
    plots = {}
    measured = [row for row in found["table"] if row["test"] and row["validation"]]
    if measured:
        plots["variants"] = svg(_plot_variants(measured))
    labels = [row["label"] for row in found["table"]]
    colours = dict(zip(labels, _FORM_COLOURS * len(labels), strict=False))
    monitors = plot_monitors(found["curves"], colours, GRADIENT)
    if monitors:
        plots["monitors"] = svg(monitors)
    if any(row["differences"] for row in found.get("thirds", ())):
        plots["thirds"] = svg(_plot_thirds(found["thirds"]))
    if found.get("forms"):
        plots["forms"] = svg(_plot_forms(found["forms"]))
    if any(found.get("points", {}).values()):
        plots["growth"] = svg(_plot_growth(found["points"], found["laws"]))
    if found.get("trials"):
        plots["trials"] = svg(_plot_trials([trial["validation_recall@20"] for trial in found["trials"]]))
    return plots


def _plot_variants(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure, (values, differences) = plt.subplots(1, 2, figsize=(9.2, 0.9 + 0.4 * len(rows)), sharey=True)
    for position, row in enumerate(rows[::-1]):
        colour = DEFAULT_COLOUR if row["default"] else COLOUR
        interval(values, position, row["test"]["recall@20"], colour, "{:.4f}")
        values.plot(
            [row["validation"]["recall@20"]["mean"]], [position], "o", mfc="none", mec=VALIDATION_COLOUR, markersize=6
        )
        if row["difference"]:
            interval(differences, position, row["difference"]["recall@20"], colour, "{:+.4f}")
    values.set_title("Recall@20 on test (hollow: validation)")
    differences.set_title("Difference to the default, same users")
    differences.axvline(0, color=DEFAULT_COLOUR, linewidth=0.9, linestyle=(0, (3, 3)))
    values.set_yticks(range(len(rows)), [row["label"] for row in rows[::-1]])
    values.set_ylim(-0.6, len(rows) - 0.3)
    for axis in (values, differences):
        axis.margins(x=0.15)
        axis.locator_params(axis="x", nbins=5)
        clean(axis, "x")
    return figure


def _plot_thirds(thirds: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axis = plt.subplots(figsize=(9.2, 0.9 + 0.42 * len(thirds)))
    axis.axvline(0, color=DEFAULT_COLOUR, linewidth=0.9, linestyle=(0, (3, 3)))
    for position, third in enumerate(thirds[::-1]):
        for values in third["differences"].values():
            interval(axis, position, values["recall@20"], COLOUR, "{:+.4f}")
    label = next(iter(thirds[0]["differences"]))
    axis.set_title(f"Difference in Recall@20 of {label} to the default, by diversity of interests")
    axis.set_yticks(range(len(thirds)), [third["label"] for third in thirds[::-1]])
    axis.set_ylim(-0.6, len(thirds) - 0.3)
    axis.margins(x=0.15)
    clean(axis, "x")
    return figure


def _plot_forms(forms: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(9.2, 0.9 + 0.3 * len(forms)), sharey=True)
    names = [form["phi"] for form in forms][::-1]
    columns = (
        ("Seconds of one pass", [form["seconds"] for form in forms], "{:.2f}"),
        ("Peak memory, MiB", [form["peak_bytes"] / 2**20 for form in forms], "{:.0f}"),
        ("Error of what RCA adds", [form["error"] for form in forms], "{:.1e}"),
    )
    for axis, (title, values, form) in zip(axes, columns, strict=True):
        found = [np.nan if value is None else value for value in values[::-1]]
        if form.endswith("e}"):
            # Errors range from rounding to tens of percent, too wide for bars.
            axis.plot(found, range(len(names)), "o", color=COLOUR)
            axis.set_xscale("log")
            axis.margins(x=0.6)
        else:
            axis.barh(range(len(names)), found, color=COLOUR, height=0.55)
            axis.margins(x=0.25)
            axis.locator_params(axis="x", nbins=3)
        for position, value in enumerate(found):
            if np.isfinite(value):
                axis.annotate(
                    form.format(value), (value, position), xytext=(6, 0), textcoords="offset points", va="center"
                )
        axis.set_title(title)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(-0.6, len(names) - 0.4)
        clean(axis, "x")
    return figure


def _plot_growth(points: Mapping[str, Sequence[Mapping[str, Any]]], laws: Mapping[str, Any]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.4))
    for axis, name, title, unit in zip(
        axes, ("seconds", "peak_bytes"), ("Seconds", "Peak memory, MiB"), (1.0, 2.0**20), strict=True
    ):
        for colour, (phi, measured) in zip(_FORM_COLOURS * 3, points.items(), strict=False):
            kept = [(point["items"], point[name] / unit) for point in measured if point[name] > 0]
            if not kept:
                continue
            sizes, values = np.array(kept).T
            law = laws[phi][name]
            label = phi if law is None else f"{phi}: items^{law['exponent']:.2f}"
            axis.loglog(sizes, values, "o", color=colour, markersize=5, label=label)
            if law:
                axis.loglog(sizes, law["constant"] * sizes ** law["exponent"] / unit, color=colour, linewidth=1.2)
        axis.set_title(title)
        axis.set_xlabel("items")
        axis.legend(fontsize=8.5)
        clean(axis, "y")
    return figure


def _plot_trials(values: Sequence[float]) -> Figure:
    figure, axis = plt.subplots(figsize=(9.2, 2.4))
    numbers = range(1, len(values) + 1)
    axis.plot(numbers, values, "o", color=COLOUR, markersize=5, alpha=0.6)
    axis.step(numbers, np.maximum.accumulate(values), where="post", color=INK, linewidth=1.4)
    axis.axhline(values[0], color=DEFAULT_COLOUR, linewidth=0.9, linestyle=(0, (3, 3)))
    axis.annotate("first trial", (len(values), values[0]), fontsize=8, color=FAINT, ha="right", va="bottom")
    axis.set_title("Validation Recall@20 by trial, and the best so far")
    axis.set_xlabel("trial")
    axis.locator_params(axis="x", integer=True)
    clean(axis, "y")
    return figure


def _power(law: Mapping[str, float] | None) -> str:
    return "–" if law is None else f"{law['exponent']:.2f}"


def _percent(share: float | None) -> str:
    """Format a share; rounding errors stay visible."""
    if share is None:
        return "–"
    return f"{100 * share:.2f} %" if share >= 1e-4 else f"{100 * share:.1e} %"


def _change(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
