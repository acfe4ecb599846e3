"""Measure a challenger and the champion on the challenger's window, and ask the gate.

Measured are the evaluation twins, which have not seen the window's validation and test periods. What a promotion puts
into service is the shipped model of the same version.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from crane_core.config import RunConfig
from crane_core.errors import ArtifactError
from crane_core.release.damage import damage_of
from crane_core.release.gate import PRIMARY, Decision, decide
from crane_core.release.measure import JudgedWindow, Measurement, measure
from crane_core.release.registry import Registry
from crane_core.release.version import Version
from crane_core.schema import USER_IDX
from crane_core.serving.model_folder import load_model
from crane_core.storage.artifacts import ArtifactStore

EVIDENCE_TOLERANCE = 1e-3


class Judge:
    """Evidence of one challenger, and decisions between it and a given champion.

    Args:
        config: contains the rule of the gate.
        store: holds the judged window.
        run_id: the challenger's run.
        registry: holds challenger, champion and their evidence.

    Raises:
        ArtifactError: the run has no registered model, or its evidence is not what was registered.
    """

    def __init__(self, config: RunConfig, store: ArtifactStore, run_id: str, registry: Registry) -> None:
        self._config = config
        self._registry = registry
        self.version = version = registry.version(_registered(store, run_id))
        self.rule = config.promote.rule()
        self._metrics = json.loads(registry.evidence(version, "metrics.json").read_text())
        self._per_user = pq.read_table(registry.evidence(version, "per_user.parquet"))
        users = self._per_user.column(USER_IDX).to_numpy()
        self._window = JudgedWindow.load(store.artifact(run_id, "etl.interactions"), users)
        # How the lists that were in service did on the window; None in a run of before there was a live score.
        self._live = (store.entry(run_id, "ml.live") or {}).get("live")
        self._measured: dict[str, Measurement] = {}

    def decide(self, champion: str | None) -> tuple[Decision, dict[str, Any]]:
        """Return the decision of the gate, and its numbers for the ledger.

        Args:
            champion: version to compare with, None when there is none. If it was removed or changed in the registry,
                the challenger is judged as a first champion is.
        """
        challenger = self._challenger()
        holder, opponent, lost = self._opponent(champion)
        baselines = {
            name: figures["recall@20"]["mean"] for name, figures in self._metrics["models"].items() if name != "crane"
        }
        decision = decide(challenger, opponent, baselines, self._config.promote, self._config.evaluate)
        measured = {
            role: _summary(measurement) | {"model": "twin" if version.has_twin else "shipped"}
            for role, measurement, version in (
                ("challenger", challenger, self.version),
                ("champion", opponent, holder),
            )
            if measurement and version
        }
        if lost:
            decision = replace(decision, reason=f"{decision.reason} There was no champion to compare with: {lost}.")
        # `standings` is the key of stored ledger entries.
        numbers = {"standings": measured, "baselines": baselines, "lost": lost, "live": self._live}
        return decision, decision.as_dict() | numbers

    def _opponent(self, champion: str | None) -> tuple[Version | None, Measurement | None, str]:
        """Find and measure the champion; one whose evidence or files are gone is none, and the reason says why."""
        if champion is None:
            return None, None, ""
        try:
            holder = self._registry.version(champion)
            return holder, self._measure(holder), ""
        except ArtifactError:
            lost = damage_of(self._registry, champion)
            if not lost:
                raise
            return None, None, lost

    def _challenger(self) -> Measurement:
        """Return the registered metrics of each user, after checking that the registered model reproduces them."""
        measured = self._measure(self.version)
        metrics = {name: self._per_user.column(f"crane.{name}").to_numpy().astype(np.float64) for name in PRIMARY}
        for name, values in metrics.items():
            gap = abs(float(values.mean() - measured.metrics[name].mean()))
            if not gap <= EVIDENCE_TOLERANCE:
                raise ArtifactError(
                    f"Version {self.version.number} is registered with {name} {values.mean():.4f}, its model reaches "
                    f"{measured.metrics[name].mean():.4f} on the same users.",
                    "Run ml.evaluate and ml.register again.",
                )
        return replace(measured, metrics=metrics)

    def _measure(self, version: Version) -> Measurement:
        if version.number not in self._measured:
            # The served model of an earlier champion has seen most of the window that is judged.
            model = load_model(self._registry.twin_folder(version))
            window_end = datetime.fromisoformat(version.tags["crane.window_end"])
            measured = measure(model, version.number, window_end, self._window, self._config.evaluate.user_block)
            # As precise as the evidence, which is float32: rounding must not make one of two equal models better.
            rounded = {name: values.astype(np.float32).astype(np.float64) for name, values in measured.metrics.items()}
            self._measured[version.number] = replace(measured, metrics=rounded)
        return self._measured[version.number]


def _summary(measured: Measurement) -> dict[str, Any]:
    means = {name: float(values.mean()) for name, values in measured.metrics.items()}
    return {
        "version": measured.version,
        "window_end": measured.window_end.isoformat(),
        **means,
        "coverage@20": measured.coverage,
        "popularity_bias@20": measured.popularity_bias if np.isfinite(measured.popularity_bias) else None,
        "cold_recall@20": measured.cold_recall,
    }


def _registered(store: ArtifactStore, run_id: str) -> str:
    entry = store.entry(run_id, "ml.register")
    if entry is None:
        raise ArtifactError(
            f"Run {run_id!r} has registered no model.",
            f"Run python -m jobs.ml.register --store {store.storage.uri} --run {run_id} first.",
        )
    return entry["version"]
