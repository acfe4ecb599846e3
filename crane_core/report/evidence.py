"""The picture of what is found, shown and trusted, by the evidence there is of the items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crane_core.report.page import INK, clean
from crane_core.report.plots import COLOURS, model_label

_MODELS = ("crane", "lightgcn")


def plot_evidence(evidence: Mapping[str, Any], weights: Mapping[str, Any] | None) -> Figure:
    """Plot the share of test interactions found, the share of the lists, and the learned weights, by bucket.

    Args:
        evidence: of `summarise_evidence`.
        weights: `HeadWeights` as JSON values; None where the model's rows stand alone.
    """
    figure, (found, share, trusted) = plt.subplots(1, 3, figsize=(9.2, 2.7))
    edges = evidence["edges"]
    places = range(len(edges))
    for name in _MODELS:
        if name in evidence["models"]:
            values, style = evidence["models"][name], {"color": COLOURS[name], "linewidth": 1.8, "marker": "o"}
            found.plot(places, [_number(value) for value in values["found"]], label=model_label(name), **style)
            share.plot(places, values["share"], **style)
    total = max(sum(evidence["rows"]), 1)
    share.plot(places, [rows / total for rows in evidence["rows"]], color=INK, linewidth=1, linestyle=":", label="test")
    found.set_title("Test interactions found in 20")
    share.set_title("Share of the lists")
    trusted.set_title("Weights of the channels")
    _plot_weights(trusted, edges, weights)
    for axis in (found, share, trusted):
        axis.set_xticks(list(places), [str(edge) for edge in edges], fontsize=7.5)
        axis.set_xlabel("training interactions, from")
        axis.set_ylim(bottom=0)
        clean(axis, "y")
    for axis in (found, share):
        axis.legend(loc="upper left", fontsize=8.5)
    return figure


def _plot_weights(axis: Axes, edges: Sequence[int], weights: Mapping[str, Any] | None) -> None:
    for name, values in (weights or {"channels": {}})["channels"].items():
        if any(values):
            # A bucket of the fit may span several of the picture.
            of_edge = [values[sum(start <= edge for start in weights["edges"]) - 1] for edge in edges]  # type: ignore[index]
            axis.plot(range(len(edges)), of_edge, linewidth=1.6, marker=".", label=name)
    if axis.lines:
        axis.legend(fontsize=7.5)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
