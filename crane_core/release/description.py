"""The description of a registered version, for its page in MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crane_core.release.version import Version

METRICS = ("recall@20", "ndcg@20")
_SHIPPED = (
    "Served is the model of run `{run}`, which has learned from every event before the end of the window. All figures, "
    "here and in the MLflow run, are those of its evaluation twin, which has not seen the rows that it is measured on."
)


def describe(version: Version, figures: Mapping[str, Any], decision: str, report: str) -> str:
    """Return what a version is, how good it is beside others, and what was decided, as Markdown.

    Args:
        version: its tags hold the run and the window.
        figures: `standings` and `baselines` of the decision (`crane_core.release.judge`); empty before it.
        decision: one sentence.
        report: where the report of the run lies, or will lie.
    """
    start, end = (version.tags.get(f"crane.window_{side}", "")[:10] for side in ("start", "end"))
    lines = [
        f"CRANE recommender of run `{version.run_id}`, window {start} to {end} (UTC).",
        *([_SHIPPED.format(run=version.shipped_run)] if version.has_twin else []),
        "",
        f"**Decision.** {decision}",
    ]
    rows = [
        (f"{role} ({_named(found)})", [found.get(name) for name in METRICS])
        for role, found in figures.get("standings", {}).items()
    ]
    rows += [(name, [value, None]) for name, value in figures.get("baselines", {}).items()]
    if rows:
        lines += ["", f"| on the same users | {' | '.join(METRICS)} |", "|---|---|---|"]
        lines += [f"| {name} | {' | '.join(_figure(value) for value in values)} |" for name, values in rows]
    return "\n".join([*lines, "", f"**Report.** `{report}`"])


def _named(found: Mapping[str, Any]) -> str:
    return f"version {found['version']}{', evaluation twin' if found.get('model') == 'twin' else ''}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
