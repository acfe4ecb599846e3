"""One self-contained HTML page about a run: the data, the models, the decision and what it all cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

import matplotlib.dates as mdates
import numpy as np
import pyarrow.parquet as pq
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from crane_core.config import RunConfig
from crane_core.dataset.interactions import load_ids, load_interactions
from crane_core.dataset.modalities import PROFILE_SPREAD
from crane_core.errors import ArtifactError
from crane_core.release.ledger import Entry
from crane_core.report.page import FAINT, GRID, INK, STYLE, clean, environment, interval, number, plot_monitors, svg
from crane_core.schema import ITEM_ID, TITLE, USER_ID
from crane_core.stages import STAGES
from crane_core.storage.artifacts import Artifact, ArtifactStore
from crane_core.training.monitors import OVERWHELMED

COLOURS = {
    "crane": "#0f5c8c",
    "lightgcn": "#d9822b",
    "item_knn": "#3f8f5f",
    "popularity": "#8a94a0",
    "champion": "#6b4fa0",
}
LABELS = {
    "crane": "CRANE",
    "lightgcn": "LightGCN",
    "item_knn": "Item kNN",
    "popularity": "Popularity",
    "champion": "Champion",
}
_LABEL_COLOURS = {LABELS[name]: colour for name, colour in COLOURS.items()}
_SLICES = {
    "head_items": "Popular items (top fifth)",
    "tail_items": "Other items",
    "cold_items": "Cold items (never interacted with)",
    "active_users": "Active users (top quarter)",
    "quiet_users": "Quiet users (bottom quarter)",
    "diverse_users": "Diverse users (top quarter by entropy of interests)",
    "focused_users": "Focused users (bottom quarter)",
    "cold_users": "Cold users (no history)",
}


@dataclass
class Section:
    """One part of the page.

    Attributes:
        title: heading.
        missing: why there is nothing to show, None when there is.
        data: what the template shows.
        plots: name to inline SVG.
    """

    title: str
    missing: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    plots: dict[str, Markup] = field(default_factory=dict)


def render(store: ArtifactStore, run_id: str, config: RunConfig, ledger: Sequence[Entry]) -> str:
    """The page.

    A stage that has not finished, or whose artifact is damaged, leaves a note in its place.

    Args:
        store: holds the run.
        run_id: the run.
        config: its configuration.
        ledger: entries of the run's model, oldest first.

    Returns:
        HTML that loads nothing from anywhere.
    """
    run = _Run(store, run_id, config, ledger)
    with plt.rc_context(STYLE):
        sections = {
            name: _section(title, build, run)
            for name, title, build in (
                ("decision", "Decision", _decision),
                ("quality", "Recommendation quality", _quality),
                ("slices", "Where it is better, where it is worse", _slices),
                ("training", "Training", _training),
                ("data", "Data", _data),
                ("graph", "Item graph certificate", _graph),
                ("refine", "RCA fit and monitors", _refine),
                ("samples", "What three users see", _samples),
                ("cost", "Time and memory", _cost),
            )
        }
    template = environment({"label": _label}).get_template("report.html")
    return template.render(
        run_id=run_id,
        window=config.window,
        sections=sections,
        headline=_headline(run, sections),
        settings=config.identity(),
        lineage=_lineage(run),
        ledger=list(reversed(ledger))[:10],
        made_at=datetime.now(UTC),
        colours=COLOURS,
        overwhelmed=OVERWHELMED,
        profile_spread=PROFILE_SPREAD,
    )


class _Run:
    """Artifacts and entries of a run, found when asked for."""

    def __init__(self, store: ArtifactStore, run_id: str, config: RunConfig, ledger: Sequence[Entry]) -> None:
        self.store = store
        self.run_id = run_id
        self.config = config
        self.ledger = ledger

    def artifact(self, stage: str, part: str = "") -> Artifact:
        entry = self.store.entry(self.run_id, stage, part)
        if entry and entry["status"] == "skipped":
            raise ArtifactError(
                f"{stage} made nothing: {entry['reason']}", "Run crane promote --run RUN first (crane runs lists them)."
            )
        return self.store.artifact(self.run_id, stage, part)

    def json(self, stage: str, name: str, part: str = "") -> Any:
        return json.loads(self.artifact(stage, part).file(name).read_text())

    def entry(self, stage: str) -> dict[str, Any] | None:
        return self.store.entry(self.run_id, stage)

    def judgement(self) -> Entry | None:
        """The ledger entry of the run's decision."""
        entry = self.entry("ml.promote")
        return next((each for each in self.ledger if entry and each.seq == entry["ledger"]), None)


def _section(title: str, build: Callable[[_Run, Section], None], run: _Run) -> Section:
    section = Section(title)
    try:
        build(run, section)
    except ArtifactError as error:
        section.missing = str(error.found)
    return section


def _headline(run: _Run, sections: Mapping[str, Section]) -> dict[str, Any]:
    judged, registered = run.judgement(), run.entry("ml.register")
    reason = judged.reason.partition(": ")[2] if judged else "The run has not been through the promotion gate."
    entry = run.entry("ml.promote")
    quality = sections["quality"].data
    return {
        "verdict": entry["decision"] if entry else "not judged",
        "reason": reason[:1].upper() + reason[1:],
        "version": registered["version"] if registered else None,
        "models": quality.get("models", {}),
        "users": quality.get("users"),
        "differences": quality.get("differences", {}),
        "seconds": sections["cost"].data.get("total_seconds"),
    }


def _decision(run: _Run, section: Section) -> None:
    entry = run.judgement()
    if entry is None:
        raise ArtifactError(f"Run {run.run_id!r} has not been judged.", f"Run crane promote --run {run.run_id} first.")
    numbers = entry.numbers
    section.data = {"entry": entry, "checks": numbers.get("checks", []), "standings": numbers.get("standings", {})}


def _quality(run: _Run, section: Section) -> None:
    metrics = run.json("ml.evaluate", "metrics.json")
    models = metrics["models"]
    judged = run.judgement()
    numbers = judged.numbers if judged else {}
    rows = [(f"CRANE − {_label(name)}", name, values) for name, values in metrics["differences"].items()]
    if numbers.get("differences"):
        rows.insert(0, (f"CRANE − champion (version {numbers['champion']})", "champion", numbers["differences"]))
    names = [f"{kind}@{k}" for kind in ("recall", "ndcg") for k in run.config.evaluate.ks]
    section.data = {
        "users": metrics["users"],
        "models": models,
        "columns": names,
        "differences": metrics["differences"],
        "rows": rows,
        "cold": metrics.get("cold", {}),
        "champion": (numbers.get("standings") or {}).get("champion"),
    }
    section.plots["models"] = svg(_plot_models(models))
    section.plots["differences"] = svg(_plot_differences(rows))


def _plot_models(models: Mapping[str, Any]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 0.62 + 0.42 * len(models)), sharey=True)
    names = list(models)[::-1]
    for axis, metric, title in zip(axes, ("recall@20", "ndcg@20"), ("Recall@20", "NDCG@20"), strict=True):
        for position, name in enumerate(names):
            interval(axis, position, models[name][metric], COLOURS.get(name, INK), "{:.4f}")
        axis.set_title(title)
        axis.set_yticks(range(len(names)), [_label(name) for name in names])
        axis.set_ylim(-0.6, len(names) - 0.35)
        axis.set_xlim(left=0)
        axis.margins(x=0.12)
        clean(axis, "x")
    return figure


def _plot_differences(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 0.62 + 0.42 * len(rows)), sharey=True)
    for axis, metric, title in zip(axes, ("recall@20", "ndcg@20"), ("Recall@20", "NDCG@20"), strict=True):
        axis.axvline(0, color=FAINT, linewidth=0.9, linestyle=(0, (3, 3)))
        for position, (_, name, values) in enumerate(rows[::-1]):
            interval(axis, position, values[metric], COLOURS.get(name, INK), "{:+.4f}")
        axis.set_title(title)
        axis.set_yticks(range(len(rows)), [label for label, _, _ in rows[::-1]])
        axis.set_ylim(-0.6, len(rows) - 0.35)
        axis.margins(x=0.15)
        clean(axis, "x")
    return figure


def _slices(run: _Run, section: Section) -> None:
    metrics = run.json("ml.evaluate", "metrics.json")
    models = [name for name in metrics["models"] if name in COLOURS]
    slices = {
        _SLICES.get(name, name.replace("_", " ")): values
        for name, values in metrics["slices"].items()
        if values["users"]
    }
    empty = [_SLICES.get(name, name) for name, values in metrics["slices"].items() if not values["users"]]
    # Runs evaluated by an older version have no figures of cold items, or not all of them.
    cold = metrics.get("cold_items")
    cold = cold and {"among_cold": None, **cold}
    section.data = {"models": models, "slices": slices, "empty": empty, "cold_items": cold}
    if slices:
        section.plots["slices"] = svg(_plot_slices(slices, models))


def _plot_slices(slices: Mapping[str, Any], models: Sequence[str]) -> Figure:
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


def _training(run: _Run, section: Section) -> None:
    curves, models = {}, {}
    for name, stage in (("crane", "ml.train"), ("lightgcn", "ml.behaviour")):
        artifact = run.artifact(stage)
        curves[name] = json.loads(artifact.file("curve.json").read_text())
        models[name] = artifact.facts | {"seconds": artifact.manifest["seconds"]}
    trust = run.json("ml.train", "trust.json")
    section.data = {"models": models, "trust": trust}
    section.plots["curves"] = svg(_plot_curves(curves, models, trust))
    monitors = plot_monitors({_label(name): curve for name, curve in curves.items()}, _LABEL_COLOURS)
    if monitors:
        section.plots["monitors"] = svg(monitors)


def _plot_curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]], models: Mapping[str, Any], trust: Mapping[str, Any]
) -> Figure:
    figure, (quality, loss, weight) = plt.subplots(1, 3, figsize=(9.2, 2.7))
    for name, curve in curves.items():
        epochs = [point["epoch"] for point in curve]
        colour = COLOURS.get(name, INK)
        values = [point["recall@20"] for point in curve]
        quality.plot(epochs, values, color=colour, linewidth=1.8, label=_label(name))
        best = models[name]["best_epoch"]
        if best in epochs:
            quality.plot([best], [values[epochs.index(best)]], "o", color=colour, markersize=6)
        loss.plot(epochs, [point["loss"] for point in curve], color=colour, linewidth=1.8)
    shares, recalls = zip(*trust["curve"], strict=True)
    weight.plot(shares, recalls, color=COLOURS["crane"], linewidth=1.8)
    if trust["share"] in shares:
        chosen = recalls[shares.index(trust["share"])]
        weight.plot([trust["share"]], [chosen], "o", color=COLOURS["crane"], markersize=6)
    quality.set_title("Validation Recall@20")
    loss.set_title("Training loss")
    weight.set_title("Validation Recall@20 by trust")
    weight.set_xlabel("share of CRANE's scores")
    for axis in (quality, loss):
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in (quality, loss, weight):
        axis.set_ylim(bottom=0)
        clean(axis, "y")
    quality.legend(loc="lower right", fontsize=8.5)
    return figure


def _data(run: _Run, section: Section) -> None:
    quality = run.json("etl.interactions", "quality.json")
    section.data = {"quality": quality, "modalities": {}}
    if run.entry("etl.features"):
        facts = run.artifact("etl.features").facts
        section.data |= {"modalities": facts.get("modalities", {})}
    days = quality.get("events_per_day", {})
    if len(days) > 1:
        section.plots["days"] = svg(_plot_days(days, quality.get("cutoffs")))


def _plot_days(days: Mapping[str, int], cutoffs: Any) -> Figure:
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


def _graph(run: _Run, section: Section) -> None:
    artifact = run.artifact("ml.graph")
    certificate = json.loads(artifact.file("certificate.json").read_text())
    section.data = {
        "certificate": certificate,
        "facts": artifact.facts,
        "min_recall": run.config.knn.min_recall,
    }


def _refine(run: _Run, section: Section) -> None:
    artifact = run.artifact("ml.refine")
    fit = json.loads(artifact.file("fit.json").read_text())
    section.data = {
        "fit": fit,
        "facts": artifact.facts,
        "config": run.config.refine,
        "first": fit["curve"][0] if fit["curve"] else None,
        "last": fit["curve"][-1] if fit["curve"] else None,
    }
    section.plots["fit"] = svg(_plot_fit(fit))


def _plot_fit(fit: Mapping[str, Any]) -> Figure:
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


def _samples(run: _Run, section: Section) -> None:
    export, source = run.artifact("ml.export"), run.artifact("etl.interactions")
    train = load_interactions(source).train
    user_ids, item_ids = load_ids(source, "users", USER_ID), load_ids(source, "items", ITEM_ID)
    titles = load_ids(source, "items", TITLE)
    active = np.argsort(train.counts(), kind="stable")
    picked = [int(active[int(share * (len(active) - 1))]) for share in (0.25, 0.5, 0.9)]
    names = dict(zip(item_ids.to_pylist(), titles.to_pylist(), strict=True))
    wanted = [user_ids[user].as_py() for user in picked]
    table = pq.read_table(export.file("recommendations"), filters=[(USER_ID, "in", wanted), ("rank", "<=", 5)])
    rows = table.to_pylist()
    users = []
    for user, name in zip(picked, wanted, strict=True):
        history = train.items[train.indptr[user] : train.indptr[user + 1]][:5]
        ids = [item_ids[int(item)].as_py() for item in history]
        users.append(
            {
                "id": name,
                "num_items": int(train.counts()[user]),
                "history": [names[item] or item for item in ids],
                "top": [
                    names.get(row[ITEM_ID]) or row[ITEM_ID]
                    for row in sorted(rows, key=lambda row: row["rank"])
                    if row[USER_ID] == name
                ],
            }
        )
    entry = run.entry("ml.export") or {}
    section.data = {"users": users, "version": entry.get("version"), "champion_run": entry.get("champion_run")}


def _cost(run: _Run, section: Section) -> None:
    rows: list[dict[str, Any]] = []
    for stage, part in _parts(run.config):
        entry = run.store.entry(run.run_id, stage, part)
        row: dict[str, Any] = {"name": f"{stage} · {part}" if part else stage, "status": None}
        row |= {"seconds": None, "peak_bytes": None}
        if entry:
            row |= {"status": entry["status"], "seconds": entry.get("seconds")}
            row |= {"peak_bytes": entry.get("peak_bytes")}
            if "fingerprint" in entry:
                found = run.store.find(stage, entry["fingerprint"])
                if found:
                    row |= {name: found.manifest[name] for name in ("seconds", "peak_bytes")}
        rows.append(row)
    known = [row["seconds"] for row in rows if row["seconds"] is not None]
    if not known:
        raise ArtifactError(
            f"Run {run.run_id!r} has no finished stage.", f"Run crane run --store STORE --run {run.run_id} first."
        )
    peak = max((row["peak_bytes"] for row in rows if row["peak_bytes"]), default=None)
    section.data = {"rows": rows, "total_seconds": sum(known), "longest": max(known), "peak_bytes": peak}


def _parts(config: RunConfig) -> Iterable[tuple[str, str]]:
    for name, stage in STAGES.items():
        if name == "ml.export":
            yield "ml.promote", ""
        for part in stage.parts(config):
            yield name, part


def _lineage(run: _Run) -> list[tuple[str, str]]:
    found = []
    for stage, part in _parts(run.config):
        entry = run.store.entry(run.run_id, stage, part)
        if entry and "fingerprint" in entry:
            found.append((f"{stage} · {part}" if part else stage, entry["fingerprint"]))
    return found


def _label(name: str) -> str:
    return LABELS.get(name, name)
