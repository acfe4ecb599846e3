"""The plots of the page about a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any

import matplotlib.dates as mdates
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from crane_core.report.page import FAINT, GRID, INK, clean, interval, number

COLOURS = {
    "crane": "#0f5c8c",
    "lightgcn": "#d9822b",
    "item_knn": "#3f8f5f",
    "recent_popularity": "#b0507a",
    "popularity": "#8a94a0",
    "champion": "#6b4fa0",
}
LABELS = {
    "crane": "CRANE",
    "lightgcn": "LightGCN",
    "item_knn": "Item kNN",
    "recent_popularity": "Recent popularity",
    "popularity": "Popularity",
    "champion": "Champion",
}
LABEL_COLOURS = {LABELS[name]: colour for name, colour in COLOURS.items()}


def plot_models(models: Mapping[str, Any]) -> Figure:
    """Plot Recall@20 and NDCG@20 of every model with intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 0.62 + 0.42 * len(models)), sharey=True)
    names = list(models)[::-1]
    for axis, metric, title in zip(axes, ("recall@20", "ndcg@20"), ("Recall@20", "NDCG@20"), strict=True):
        for position, name in enumerate(names):
            interval(axis, position, models[name][metric], COLOURS.get(name, INK), "{:.4f}")
        axis.set_title(title)
        axis.set_yticks(range(len(names)), [model_label(name) for name in names])
        axis.set_ylim(-0.6, len(names) - 0.35)
        axis.set_xlim(left=0)
        axis.margins(x=0.12)
        clean(axis, "x")
    return figure


def plot_differences(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Figure:
    """Plot the differences of CRANE to other models with intervals: rows of label, model and metrics."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 0.62 + 0.42 * len(rows)), sharey=True)
    for axis, metric, title in zip(axes, ("recall@20", "ndcg@20"), ("Recall@20", "NDCG@20"), strict=True):
        axis.axvline(0, color=FAINT, linewidth=0.9, linestyle=(0, (3, 3)))
        for position, (_, name, values) in enumerate(rows[::-1]):
            interval(axis, position, values[metric], COLOURS.get(name, INK), "{:+.4f}")
        axis.set_title(title)
        axis.set_yticks(range(len(rows)), [text for text, _, _ in rows[::-1]])
        axis.set_ylim(-0.6, len(rows) - 0.35)
        axis.margins(x=0.15)
        clean(axis, "x")
    return figure


def plot_live(line: Sequence[tuple[datetime, Mapping[str, Any]]]) -> Figure:
    """Plot Recall@20 and NDCG@20 of the lists in service and of recent popularity, by the end of the window."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 2.5))
    ends = [end for end, _ in line]
    for axis, metric, title in zip(axes, ("recall@20", "ndcg@20"), ("Recall@20", "NDCG@20"), strict=True):
        for model in ("champion", "recent_popularity"):
            values = [score["models"][model][metric] for _, score in line]
            axis.plot(ends, values, "o-", color=COLOURS[model], markersize=3, linewidth=1.6, label=LABELS[model])
        axis.set_title(f"{title} of what was served")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(mdates.AutoDateLocator(minticks=1, maxticks=6))
        axis.xaxis.set_major_formatter(mdates.DateFormatter("%d %b %Y"))
        clean(axis, "y")
    axes[0].legend(loc="lower right", fontsize=8.5)
    return figure


def plot_slices(slices: Mapping[str, Any], models: Sequence[str]) -> Figure:
    """Plot Recall@20 of every model, one row for each slice."""
    figure, axis = plt.subplots(figsize=(9.2, 0.8 + 0.38 * len(slices)))
    names = list(slices)[::-1]
    for position, name in enumerate(names):
        values = {model: number(slices[name][model]["recall@20"]) for model in models}
        axis.plot([min(values.values()), max(values.values())], [position] * 2, color=GRID, linewidth=3, zorder=1)
        for model, value in values.items():
            axis.plot([value], [position], "o", color=COLOURS[model], markersize=7, label=LABELS[model], zorder=2)
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axis.legend(
        unique.values(), unique.keys(), ncols=len(unique), loc="lower left", bbox_to_anchor=(0, 1), fontsize=8.5,
        handletextpad=0.2, columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlabel("Recall@20")
    axis.set_xlim(left=0)
    clean(axis, "x")
    return figure


def plot_curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]], models: Mapping[str, Any], share: Mapping[str, Any]
) -> Figure:
    """Plot the validation and loss curves of both models, and the recall by the share of CRANE's scores."""
    figure, (quality, loss, weight) = plt.subplots(1, 3, figsize=(9.2, 2.7))
    for name, curve in curves.items():
        epochs = [point["epoch"] for point in curve]
        colour = COLOURS.get(name, INK)
        values = [point["recall@20"] for point in curve]
        quality.plot(epochs, values, color=colour, linewidth=1.8, label=model_label(name))
        best = models[name]["best_epoch"]
        if best in epochs:
            quality.plot([best], [values[epochs.index(best)]], "o", color=colour, markersize=6)
        loss.plot(epochs, [point["loss"] for point in curve], color=colour, linewidth=1.8)
    shares, recalls = zip(*share["curve"], strict=True)
    weight.plot(shares, recalls, color=COLOURS["crane"], linewidth=1.8)
    if share["share"] in shares:
        chosen = recalls[shares.index(share["share"])]
        weight.plot([share["share"]], [chosen], "o", color=COLOURS["crane"], markersize=6)
    quality.set_title("Validation Recall@20")
    loss.set_title("Training loss")
    weight.set_title("Validation Recall@20 by share")
    weight.set_xlabel("share of CRANE's scores")
    for axis in (quality, loss):
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in (quality, loss, weight):
        axis.set_ylim(bottom=0)
        clean(axis, "y")
    quality.legend(loc="lower right", fontsize=8.5)
    return figure


def plot_days(days: Mapping[str, int], cutoffs: Any) -> Figure:
    """Plot the events of every day, with the cutoffs of the splits."""
    figure, axis = plt.subplots(figsize=(9.2, 2.1))
    dates = [date.fromisoformat(day) for day in days]
    axis.bar(dates, list(days.values()), color="#9fb8c9", width=1.0)  # type: ignore[arg-type]
    axis.set_title("Events per day")
    for cutoff, label in zip(_cutoffs(cutoffs), ("validation", "test"), strict=False):
        axis.axvline(cutoff, color=COLOURS["crane"], linewidth=1, linestyle=(0, (3, 3)))  # type: ignore[arg-type]
        axis.annotate(
            f" {label}", (cutoff, 1), xycoords=("data", "axes fraction"), fontsize=8, color=COLOURS["crane"], va="top"
        )
    axis.xaxis.set_major_locator(mdates.AutoDateLocator(maxticks=8))
    axis.xaxis.set_major_formatter(mdates.DateFormatter("%d %b %Y"))
    clean(axis, "y")
    return figure


def _cutoffs(cutoffs: Any) -> list[date]:
    values = cutoffs.values() if isinstance(cutoffs, Mapping) else cutoffs or ()
    return [datetime.fromisoformat(value).date() for value in values if isinstance(value, str)]


def plot_fit(fit: Mapping[str, Any]) -> Figure:
    """Plot the losses of the RCA fit, and the mean cosine between items after every recursion."""
    figure, (loss, likeness) = plt.subplots(1, 2, figsize=(9.2, 2.6))
    steps = [point["step"] for point in fit["curve"]]
    for name, colour in (("ranking", COLOURS["crane"]), ("agreement", COLOURS["lightgcn"])):
        if steps and name in fit["curve"][0]:
            loss.plot(steps, [point[name] for point in fit["curve"]], color=colour, linewidth=1.6, label=name)
    loss.set_title("Loss while fitting")
    loss.set_xlabel("step")
    loss.set_ylim(bottom=0)
    if steps:
        loss.legend(fontsize=8.5)
    cosines = fit.get("mean_cosine", [])
    likeness.plot(range(len(cosines)), cosines, "o-", color=COLOURS["crane"], linewidth=1.6)
    likeness.set_title("Mean cosine between items (towards 1: over-refined)")
    likeness.set_xlabel("recursion (0: before the first)")
    likeness.set_xticks(range(len(cosines)))
    likeness.set_ylim(min(0.0, *cosines, 0.0), 1.02)
    clean(loss, "y")
    clean(likeness, "y")
    return figure


def model_label(name: str) -> str:
    """Return the name of a model as it is printed."""
    return LABELS.get(name, name)
