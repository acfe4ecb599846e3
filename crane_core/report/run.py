"""One self-contained HTML page about a run: its data, its models, the decision, and the time and memory it took."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from markupsafe import Markup
from matplotlib import pyplot as plt

from crane_core.config import RunConfig
from crane_core.dataset.interactions import load_ids, load_interactions
from crane_core.dataset.modalities import PROFILE_SPREAD
from crane_core.errors import ArtifactError
from crane_core.release.ledger import Entry
from crane_core.report.evidence import plot_evidence
from crane_core.report.live import live_scores
from crane_core.report.page import STYLE, environment, plot_monitors, svg
from crane_core.report.plots import (
    COLOURS,
    LABEL_COLOURS,
    model_label,
    plot_curves,
    plot_days,
    plot_differences,
    plot_fit,
    plot_live,
    plot_models,
    plot_slices,
)
from crane_core.schema import ITEM_ID, TITLE, USER_ID
from crane_core.stages import SHIPPED, STAGES
from crane_core.storage.artifacts import Artifact, ArtifactStore
from crane_core.training.curve import GRADIENT, OVERWHELMED

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
class Chapter:
    """One chapter of the page.

    Attributes:
        title: heading.
        missing: reason why the chapter is empty, None when it is not.
        data: values for the template.
        plots: name to inline SVG.
    """

    title: str
    missing: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    plots: dict[str, Markup] = field(default_factory=dict)


def render(store: ArtifactStore, run_id: str, config: RunConfig, ledger: Sequence[Entry]) -> str:
    """Render the page.

    A stage that has not finished, or whose artifact is damaged, is replaced by a note.

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
        chapters = {
            name: _chapter(title, build, run)
            for name, title, build in (
                ("decision", "Decision", _decision),
                ("live", "How the exported lists did", _live),
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
    template = environment({"label": model_label}).get_template("report.html")
    return template.render(
        run_id=run_id,
        window=config.window,
        chapters=chapters,
        headline=_headline(run, chapters),
        missed=_missed(run),
        settings={name: section for name, section in config.identity().items() if section is not None},
        shipped_run=_shipped_run(run),
        lineage=_lineage(run),
        ledger=list(reversed(ledger))[:10],
        made_at=datetime.now(UTC),
        colours=COLOURS,
        overwhelmed=OVERWHELMED,
        profile_spread=PROFILE_SPREAD,
    )


def _missed(run: _Run) -> tuple[datetime, datetime] | None:
    """Return the time before the run's window that no earlier run of the store covers; None where there is none."""
    start = run.config.window.start
    ends = [end for begin, end in run.windows.values() if begin < start]
    last = max(ends, default=start)
    return (last, start) if last < start else None


class _Run:
    """Artifacts and entries of a run, read when they are needed."""

    def __init__(self, store: ArtifactStore, run_id: str, config: RunConfig, ledger: Sequence[Entry]) -> None:
        self.store = store
        self.run_id = run_id
        self.config = config
        self.ledger = ledger

    @cached_property
    def windows(self) -> dict[str, tuple[datetime, datetime]]:
        """Start and end of the window of every run of the store."""
        recorded = {run_id: self.store.recorded_config(run_id) for run_id in self.store.run_ids()}
        return {
            run_id: (datetime.fromisoformat(config["window"]["start"]), datetime.fromisoformat(config["window"]["end"]))
            for run_id, config in recorded.items()
            if config
        }

    def artifact(self, stage: str) -> Artifact:
        entry = self.entry(stage)
        if entry and entry["status"] == "skipped":
            raise ArtifactError(
                f"{stage} made nothing: {entry['reason']}", "Run crane promote --run RUN first (crane runs lists them)."
            )
        return self.store.artifact(self.run_id, stage)

    def json(self, stage: str, name: str) -> Any:
        return json.loads(self.artifact(stage).file(name).read_text())

    def entry(self, stage: str) -> dict[str, Any] | None:
        return self.store.entry(self.run_id, stage)

    def judgement(self) -> Entry | None:
        """Return the ledger entry of the run's decision, None before the decision."""
        entry = self.entry("ml.promote")
        return next((each for each in self.ledger if entry and each.seq == entry["ledger"]), None)


def _chapter(title: str, build: Callable[[_Run, Chapter], None], run: _Run) -> Chapter:
    chapter = Chapter(title)
    try:
        build(run, chapter)
    except ArtifactError as error:
        chapter.missing = str(error.found)
    return chapter


def _headline(run: _Run, chapters: Mapping[str, Chapter]) -> dict[str, Any]:
    judged, registered = run.judgement(), run.entry("ml.register")
    reason = judged.reason.partition(": ")[2] if judged else "The run has not been through the promotion gate."
    entry = run.entry("ml.promote")
    quality = chapters["quality"].data
    return {
        "verdict": entry["decision"] if entry else "not judged",
        "reason": reason[:1].upper() + reason[1:],
        "version": registered["version"] if registered else None,
        "models": quality.get("models", {}),
        "users": quality.get("users"),
        "differences": quality.get("differences", {}),
        "seconds": chapters["cost"].data.get("total_seconds"),
    }


def _shipped_run(run: _Run) -> str | None:
    """Return the refit run whose model is registered beside the evaluated one, None where there is none."""
    shipped = (run.entry("ml.register") or {}).get("shipped_run")
    return None if shipped == run.run_id else shipped


def _decision(run: _Run, chapter: Chapter) -> None:
    entry = run.judgement()
    if entry is None:
        raise ArtifactError(f"Run {run.run_id!r} has not been judged.", f"Run crane promote --run {run.run_id} first.")
    numbers = entry.numbers
    chapter.data = {"entry": entry, "checks": numbers.get("checks", []), "measured": numbers.get("standings", {})}


def _live(run: _Run, chapter: Chapter) -> None:
    score = run.json("ml.live", "live.json")
    verdict = (run.entry("ml.live") or {}).get("verdict")
    line = live_scores(run.store, run.run_id, {run_id: end for run_id, (_, end) in run.windows.items()})
    chapter.data = {"score": score, "verdict": verdict, "num_scored": len(line)}
    if line:
        chapter.plots["line"] = svg(plot_live(line))


def _quality(run: _Run, chapter: Chapter) -> None:
    metrics = run.json("ml.evaluate", "metrics.json")
    models = metrics["models"]
    judged = run.judgement()
    numbers = judged.numbers if judged else {}
    rows = [(f"CRANE − {model_label(name)}", name, values) for name, values in metrics["differences"].items()]
    if numbers.get("differences"):
        rows.insert(0, (f"CRANE − champion (version {numbers['champion']})", "champion", numbers["differences"]))
    names = [f"{kind}@{k}" for kind in ("recall", "ndcg") for k in run.config.evaluate.ks]
    chapter.data = {
        "users": metrics["users"],
        "models": models,
        "columns": names,
        "differences": metrics["differences"],
        "rows": rows,
        "cold": metrics.get("cold", {}),
        "rules": metrics.get("rules"),
        "champion": (numbers.get("standings") or {}).get("champion"),
    }
    chapter.plots["models"] = svg(plot_models(models))
    chapter.plots["differences"] = svg(plot_differences(rows))


def _slices(run: _Run, chapter: Chapter) -> None:
    metrics = run.json("ml.evaluate", "metrics.json")
    models = [name for name in metrics["models"] if name in COLOURS]
    slices = {
        _SLICES.get(name, name.replace("_", " ")): values
        for name, values in metrics["slices"].items()
        if values["users"]
    }
    empty = [_SLICES.get(name, name) for name, values in metrics["slices"].items() if not values["users"]]
    # Runs that an older version evaluated lack the numbers of cold items, or some of them.
    cold = metrics.get("cold_items")
    cold = cold and {"among_cold": None, **cold}
    chapter.data = {"models": models, "slices": slices, "empty": empty, "cold_items": cold}
    if slices:
        chapter.plots["slices"] = svg(plot_slices(slices, models))
    if "evidence" in metrics:
        head = run.artifact("ml.train").facts.get("head") or {}
        chapter.plots["evidence"] = svg(
            plot_evidence(metrics["evidence"], head.get("weights") if "form" in head else None)
        )


def _training(run: _Run, chapter: Chapter) -> None:
    curves, models = {}, {}
    for name, stage in (("crane", "ml.train"), ("lightgcn", "ml.behaviour")):
        artifact = run.artifact(stage)
        curves[name] = json.loads(artifact.file("curve.json").read_text())
        models[name] = artifact.facts | {"seconds": artifact.manifest["seconds"]}
    share = run.json("ml.train", "trust.json")
    chapter.data = {"models": models, "share": share["share"]}
    chapter.plots["curves"] = svg(plot_curves(curves, models, share))
    monitors = plot_monitors({model_label(name): curve for name, curve in curves.items()}, LABEL_COLOURS, GRADIENT)
    if monitors:
        chapter.plots["monitors"] = svg(monitors)


def _data(run: _Run, chapter: Chapter) -> None:
    quality = run.json("etl.interactions", "quality.json")
    chapter.data = {"quality": quality, "modalities": {}, "late": _late(run)}
    if run.entry("etl.features"):
        facts = run.artifact("etl.features").facts
        chapter.data |= {"modalities": facts.get("modalities", {})}
    days = quality.get("events_per_day", {})
    if len(days) > 1:
        chapter.plots["days"] = svg(plot_days(days, quality.get("cutoffs")))


def _late(run: _Run) -> dict[str, int]:
    """Return the rows that came after the run before this one had read their partition, by arrival day."""
    previous = run.store.previous_run(run.config)
    if previous is None:
        return {}
    window = run.store.run(previous)["config"]["window"]
    before = run.store.artifact(previous, "etl.interactions").facts.get("partitions", {})
    now = run.artifact("etl.interactions").facts.get("partitions", {})
    read = [day for day in now if before and min(before) <= day < window["end"][:10]]
    return {day: now[day] - before.get(day, 0) for day in read if now[day] > before.get(day, 0)}


def _graph(run: _Run, chapter: Chapter) -> None:
    artifact = run.artifact("ml.graph")
    certificate = json.loads(artifact.file("certificate.json").read_text())
    chapter.data = {
        "certificate": certificate,
        "facts": artifact.facts,
        "min_recall": run.config.knn.min_recall,
    }


def _refine(run: _Run, chapter: Chapter) -> None:
    artifact = run.artifact("ml.refine")
    fit = json.loads(artifact.file("fit.json").read_text())
    chapter.data = {
        "fit": fit,
        "facts": artifact.facts,
        "config": run.config.refine,
        "first": fit["curve"][0] if fit["curve"] else None,
        "last": fit["curve"][-1] if fit["curve"] else None,
    }
    chapter.plots["fit"] = svg(plot_fit(fit))


def _samples(run: _Run, chapter: Chapter) -> None:
    export = run.artifact("ml.export")
    # What the users have met before the window's end, where the shipped model knows it.
    source = run.store.artifact(_shipped_run(run) or run.run_id, "etl.interactions")
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
    made_by = entry.get("shipped_run", entry.get("champion_run"))
    chapter.data = {"users": users, "version": entry.get("version"), "made_by": made_by}


def _cost(run: _Run, chapter: Chapter) -> None:
    rows: list[dict[str, Any]] = []
    steps = [(run.run_id, *step) for step in _labels(run.config)]
    if shipped := _shipped_run(run):
        steps += [(shipped, stage, label) for stage in SHIPPED for label in STAGES[stage].labels(run.config)]
    for run_id, stage, label in steps:
        entry = run.store.entry(run_id, label)
        name = _shown(stage, label) + ("" if run_id == run.run_id else ", shipped model")
        row: dict[str, Any] = {"name": name, "status": None}
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
    chapter.data = {"rows": rows, "total_seconds": sum(known), "longest": max(known), "peak_bytes": peak}


def _labels(config: RunConfig) -> Iterable[tuple[str, str]]:
    """Yield every stage and the label of each of its parts, with `ml.promote` before `ml.export`."""
    for name, stage in STAGES.items():
        if name == "ml.export":
            yield "ml.promote", "ml.promote"
        for label in stage.labels(config):
            yield name, label


def _shown(stage: str, label: str) -> str:
    return stage + label.removeprefix(stage).replace(".", " · ")


def _lineage(run: _Run) -> list[tuple[str, str]]:
    found = []
    for stage, label in _labels(run.config):
        entry = run.store.entry(run.run_id, label)
        if entry and "fingerprint" in entry:
            found.append((_shown(stage, label), entry["fingerprint"]))
    return found
