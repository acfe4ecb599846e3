"""Templates, number formats and plot style of the HTML pages; plots become inline SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup

matplotlib.use("agg")
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, GRID = "#26323d", "#66727e", "#e4e8ec"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#c5ccd3",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "grid.color": GRID,
    "legend.frameon": False,
    "svg.hashsalt": "crane",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.wspace": 0.06,
}


_MONITORS = {
    "effective_rank": "Effective rank of the users",
    "mean_cosine": "Mean cosine of two users",
    "cosine_variance": "Variance of these cosines",
}


def environment(filters: Mapping[str, Callable[..., Any]]) -> jinja2.Environment:
    """Load the shipped templates with the filters of all pages, and those of one page."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("crane_core.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "figure": figure,
        "signed": signed,
        "either": _either,
        "metric": metric,
        "count": _count,
        "seconds": seconds,
        "bytes": _bytes,
        "share": _share,
        **filters,
    }
    return made


def interval(axis: Axes, position: float, value: Mapping[str, float], colour: str, form: str) -> None:
    """Draw a mean with its interval as one row of a plot, the mean written above it in `form`."""
    mean, low, high = (number(value[name]) for name in ("mean", "low", "high"))
    axis.plot([low, high], [position, position], color=colour, linewidth=2.2, solid_capstyle="round", alpha=0.45)
    axis.plot([mean], [position], "o", color=colour, markersize=6)
    axis.annotate(
        form.format(mean).replace("-", "−"),
        (mean, position),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
        path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
    )


def clean(axis: Axes, grid: str) -> None:
    """Draw grid lines along one axis and no ticks."""
    axis.grid(axis=grid, linewidth=0.8)  # type: ignore[arg-type]
    axis.tick_params(length=0)
    axis.spines["left" if grid == "x" else "bottom"].set_visible(True)
    if grid == "y":
        axis.spines["left"].set_visible(False)


def plot_monitors(
    curves: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, str], gradient: str
) -> Figure | None:
    """Plot the monitors of trainings, a panel for each monitor and a line for each training; None without any monitor.

    Args:
        curves: label to the entries of its epochs; an entry may lack monitors.
        colours: label to the colour of its line.
        gradient: prefix of the entries that are gradient norms; the rest is the term of the loss.
    """
    names = {
        name: title for name, title in _MONITORS.items() if any(name in each for e in curves.values() for each in e)
    }
    terms = {name for entries in curves.values() for entry in entries for name in entry if name.startswith(gradient)}
    names |= {name: f"Gradient norm: {name.removeprefix(gradient)}" for name in sorted(terms)}
    if not names:
        return None
    rows = -(-len(names) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(9.2, 2.3 * rows), squeeze=False)
    for axis, (name, title) in zip(axes.flat, names.items(), strict=False):
        for label, entries in curves.items():
            points = [(entry["epoch"], entry[name]) for entry in entries if name in entry]
            if points:
                axis.plot(*zip(*points, strict=True), color=colours.get(label, INK), linewidth=1.4, label=label)
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if name in terms and any(line.get_ydata().max() > 0 for line in axis.lines):
            axis.set_yscale("log")
        clean(axis, "y")
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8.5)
    return figure


def svg(figure: Figure) -> Markup:
    """Return a figure as inline SVG, and close it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :].replace("<svg", '<svg role="img"', 1))


def number(value: float | None) -> float:
    """Return a number of a JSON file, where null stands for NaN."""
    return math.nan if value is None else float(value)


def figure(value: float | None, digits: int = 4) -> str:
    """Format with fixed decimals; a dash where there is no number."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _either(value: float | None) -> str:
    """Format a count without decimals, any other number with them."""
    if value is not None and abs(value) >= 2 and value == int(value):
        return _count(int(value))
    return figure(value).replace("-", "−")


def metric(name: str) -> str:
    """Return the name of a metric as it is printed."""
    return name.replace("recall", "Recall").replace("ndcg", "NDCG")


def signed(value: float | None) -> str:
    """Format a difference with four decimals and its sign."""
    return "–" if value is None or not math.isfinite(value) else f"{value:+.4f}".replace("-", "−")


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _share(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def seconds(value: float | None) -> str:
    """Format a duration in seconds or minutes."""
    if value is None:
        return "–"
    return f"{value:.1f} s" if value < 90 else f"{value / 60:.1f} min"


def _bytes(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
