"""Judge a run's model and make it champion if it deserves it: `python -m jobs.ml.promote --store URI --run RUN_ID`.

Reads the evidence again from the registry, lets the champion answer for the same users, asks the gate, writes the
ledger, moves the alias `champion` and tests the model through it, all under the lease of the store: promotions from any
number of machines come one after the other. A refusal is a result, not an error: exit code 0. A failed smoke test puts
the former champion back and ends with exit code 4.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from crane_core.config import RunConfig
from crane_core.dataset.interactions import load_ids, load_interactions
from crane_core.errors import ArtifactError, ConfigError
from crane_core.release.gate import PRIMARY, Decision, decide
from crane_core.release.ledger import ANCHOR_TAG, Action, Entry
from crane_core.release.measure import Measurement, measure
from crane_core.release.registry import Registry, Version, open_registry
from crane_core.schema import ITEM_ID, USER_ID, USER_IDX
from crane_core.serving.model_folder import load_model
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import run_job
from jobs.ml.desk import take_desk

logger = logging.getLogger(__name__)

EVIDENCE_TOLERANCE = 1e-3


def promote(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Decide, and carry the decision out."""
    if config.runtime.backfill:
        raise ConfigError(
            "A backfill moves no alias.", "Promote a run of crane_retrain, or give --set runtime.backfill=false."
        )
    judge = Judge(config, store, arguments.run, open_registry(config.runtime, store.storage.uri))
    number, status = judge.version.number, "done"
    with take_desk(config.runtime, store, f"promote run={arguments.run} version={number}") as desk:
        entry = _standing_decision(desk.ledger.history(), number, judge.rule)
        if entry:
            status = "found"
        else:
            champion = desk.champion
            decision, numbers = judge.decide(champion)
            action: Action = "promote" if decision.promoted else "refuse"
            becomes = number if decision.promoted else champion
            entry = desk.write(action, number, becomes, arguments.run, decision.reason, numbers)
        promoted = entry.action != "refuse"
        if promoted:
            desk.carry_out(entry)
        desk.registry.tag(
            number,
            {
                f"{ANCHOR_TAG}{entry.seq}": entry.hash,
                "crane.decision": "promoted" if promoted else "refused",
                "crane.decision_reason": entry.reason,
                "crane.decision_numbers": json.dumps(entry.numbers),
            },
        )
    logger.info("%s version=%s reason=%s", "promoted" if promoted else "refused", number, entry.reason)
    return {
        "status": status,
        "decision": "promoted" if promoted else "refused",
        "reason": entry.reason,
        "version": number,
        "champion": entry.champion,
        "previous": entry.champion_before,
        "ledger": entry.seq,
    }


class Judge:
    """Evidence of one challenger, and decisions against whichever champion there is.

    Args:
        config: the gate's rule among it.
        store: holds the judged window.
        run_id: the challenger's run.
        registry: holds challenger, champion and their evidence.
    """

    def __init__(self, config: RunConfig, store: ArtifactStore, run_id: str, registry: Registry) -> None:
        self._config = config
        self._registry = registry
        self.version = version = registry.version(_registered(store, run_id))
        self._source = store.artifact(run_id, "etl.interactions")
        self._interactions = load_interactions(self._source)
        self.rule = config.promote.model_dump(mode="json")
        self._metrics = json.loads(registry.evidence(version, "metrics.json").read_text())
        self._per_user = pq.read_table(registry.evidence(version, "per_user.parquet"))
        self._users = self._per_user.column(USER_IDX).to_numpy()
        self._standings: dict[str, Measurement] = {}

    def decide(self, champion: str | None) -> tuple[Decision, dict[str, Any]]:
        """The gate's decision, and its numbers for the ledger."""
        challenger = self._challenger()
        opponent = None if champion is None else self._standing(self._registry.version(champion))
        baselines = {
            name: figures["recall@20"]["mean"] for name, figures in self._metrics["models"].items() if name != "crane"
        }
        decision = decide(challenger, opponent, baselines, self._config.promote, self._config.evaluate)
        standings = {
            role: _summary(standing)
            for role, standing in (("challenger", challenger), ("champion", opponent))
            if standing
        }
        return decision, decision.as_dict() | {"standings": standings, "baselines": baselines}

    def _challenger(self) -> Measurement:
        """The registered per-user evidence, which the registered model must reproduce."""
        measured = self._standing(self.version)
        metrics = {name: self._per_user.column(f"crane.{name}").to_numpy().astype(np.float64) for name in PRIMARY}
        for name, values in metrics.items():
            gap = abs(float(values.mean() - measured.metrics[name].mean()))
            if not gap <= EVIDENCE_TOLERANCE:
                raise ArtifactError(
                    f"Version {self.version.number} is registered with {name} {values.mean():.4f}, its model reaches "
                    f"{measured.metrics[name].mean():.4f} on the same users.",
                    "Run python -m jobs.ml.evaluate and python -m jobs.ml.register for its run again.",
                )
        return replace(measured, metrics=metrics)

    def _standing(self, version: Version) -> Measurement:
        if version.number not in self._standings:
            window_end = datetime.fromisoformat(version.tags["crane.window_end"])
            measured = measure(
                load_model(self._registry.model_folder(version)),
                version.number,
                window_end,
                self._interactions,
                load_ids(self._source, "users", USER_ID).to_numpy(),
                load_ids(self._source, "items", ITEM_ID).to_numpy(),
                self._users,
                self._config.evaluate.user_block,
            )
            # As precise as the evidence: rounding must make nobody better than an equal.
            rounded = {name: values.astype(np.float32).astype(np.float64) for name, values in measured.metrics.items()}
            self._standings[version.number] = replace(measured, metrics=rounded)
        return self._standings[version.number]


def _summary(standing: Measurement) -> dict[str, Any]:
    figures = {name: float(values.mean()) for name, values in standing.metrics.items()}
    return {
        "version": standing.version,
        "window_end": standing.window_end.isoformat(),
        **figures,
        "coverage@20": standing.coverage,
        "popularity_bias@20": standing.popularity_bias if np.isfinite(standing.popularity_bias) else None,
        "cold_recall@20": standing.cold_recall,
    }


def _registered(store: ArtifactStore, run_id: str) -> str:
    entry = store.entry(run_id, "ml.register")
    if entry is None:
        raise ArtifactError(
            f"Run {run_id!r} has registered no model.",
            f"Run python -m jobs.ml.register --store {store.storage.uri} --run {run_id} first.",
        )
    return entry["version"]


def _standing_decision(history: list[Entry], number: str, rule: dict[str, Any]) -> Entry | None:
    """The entry that already answers: the version is champion, or this rule refused it against this champion."""
    if not history:
        return None
    champion = history[-1].champion
    if champion == number:
        return next(e for e in reversed(history) if e.version == number and e.action in ("promote", "rollback"))
    last = next((e for e in reversed(history) if e.version == number), None)
    if last and last.action == "refuse" and last.champion == champion and last.numbers.get("rule") == rule:
        return last
    return None


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ml.promote", promote, argv)


if __name__ == "__main__":
    raise SystemExit(main())
