"""Judge a run's model and make it champion if it deserves it: `python -m jobs.ml.promote --store URI --run RUN_ID`.

Reads the evidence again from the registry, lets the champion answer for the same users, asks the gate, writes the
ledger, moves the alias `champion` and tests the model through it. A refusal is a result, not an error: exit code 0.
A failed smoke test puts the former champion back and ends with exit code 4.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from crane_core.config import RunConfig
from crane_core.dataset import load_ids, load_interactions
from crane_core.errors import ArtifactError, ConfigError
from crane_core.gate import PRIMARY, Decision, Standing, decide, measure
from crane_core.ledger import ANCHOR_TAG, CHAMPION, SMOKE_TAG, Entry, Ledger, hand_over, settle
from crane_core.registry import Registry, Version, open_registry
from crane_core.schema import ITEM_ID, USER_ID, USER_IDX
from crane_core.serving import load_model, smoke_test
from crane_core.store import ArtifactStore
from jobs.runner import peak_bytes, run_job

logger = logging.getLogger(__name__)

EVIDENCE_TOLERANCE = 1e-3


def promote(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Decide, and carry the decision out."""
    started = time.monotonic()
    if config.runtime.backfill:
        raise ConfigError("A backfill moves no alias.", "Promote a run of crane_retrain, or drop runtime.backfill.")
    registry = open_registry(config.runtime, store.storage.uri)
    ledger = Ledger(store.storage, registry.name)
    version = registry.version(_registered(store, arguments.run))
    judge = _Judge(config, store, arguments.run, registry, version)
    status = "done"
    while True:
        ledger.verify(registry.ledger_anchors())
        settle(ledger, registry)
        seen, history = ledger.size(), ledger.history()
        entry = _standing_decision(history, version.number, judge.rule)
        if entry:
            status = "found"
            break
        champion = history[-1].champion if history else None
        decision, numbers = judge.decide(champion)
        entry = ledger.append(
            seen,
            "promote" if decision.promoted else "refuse",
            version.number,
            version.number if decision.promoted else champion,
            arguments.run,
            decision.reason,
            numbers,
        )
        if entry:
            break
        logger.info("ledger_moved_on seen=%d: deciding again", seen)
    promoted = entry.action != "refuse"
    if promoted and version.tags.get(SMOKE_TAG) != str(entry.seq):
        hand_over(ledger, registry, entry, lambda: smoke_through_alias(registry, version))
    registry.tag(
        version.number,
        {
            f"{ANCHOR_TAG}{entry.seq}": entry.hash,
            "crane.decision": "promoted" if promoted else "refused",
            "crane.decision_reason": entry.reason,
            "crane.decision_numbers": json.dumps(entry.numbers),
        },
    )
    logger.info("%s version=%s reason=%s", "promoted" if promoted else "refused", version.number, entry.reason)
    return {
        "status": status,
        "decision": "promoted" if promoted else "refused",
        "reason": entry.reason,
        "version": version.number,
        "champion": entry.champion,
        "previous": entry.champion_before,
        "ledger": entry.seq,
        "seconds": round(time.monotonic() - started, 3),
        "peak_bytes": peak_bytes(),
    }


def smoke_through_alias(registry: Registry, version: Version) -> int:
    """Load what the alias points to, as a serving process would, and compare its answers with the evaluation's.

    Raises:
        ArtifactError: it is not the version expected, was tampered with, or answers wrongly.
    """
    probe = json.loads(registry.evidence(version, "probe.json").read_text())
    registry.model_folder(version)
    holder = registry.holder(CHAMPION)
    if holder != version.number:
        raise ArtifactError(
            f"The alias {CHAMPION!r} points to version {holder}, expected {version.number}.", "Run the job again."
        )
    compared = smoke_test(registry.load(f"@{CHAMPION}").predict, probe)
    logger.info("smoke_test version=%s users=%d passed", version.number, compared)
    return compared


class _Judge:
    """Evidence of one challenger, and decisions against whichever champion there is."""

    def __init__(
        self, config: RunConfig, store: ArtifactStore, run_id: str, registry: Registry, version: Version
    ) -> None:
        self._config = config
        self._registry = registry
        self._version = version
        self._source = store.artifact(run_id, "etl.interactions")
        self._interactions = load_interactions(self._source)
        self.rule = config.promote.model_dump(mode="json")
        self._metrics = json.loads(registry.evidence(version, "metrics.json").read_text())
        self._per_user = pq.read_table(registry.evidence(version, "per_user.parquet"))
        self._users = self._per_user.column(USER_IDX).to_numpy()
        self._standings: dict[str, Standing] = {}

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

    def _challenger(self) -> Standing:
        """The registered per-user evidence, which the registered model must reproduce."""
        measured = self._standing(self._version)
        metrics = {name: self._per_user.column(f"crane.{name}").to_numpy().astype(np.float64) for name in PRIMARY}
        for name, values in metrics.items():
            gap = abs(float(values.mean() - measured.metrics[name].mean()))
            if not gap <= EVIDENCE_TOLERANCE:
                raise ArtifactError(
                    f"Version {self._version.number} is registered with {name} {values.mean():.4f}, its model reaches "
                    f"{measured.metrics[name].mean():.4f} on the same users.",
                    "Run ml.evaluate and ml.register again.",
                )
        return Standing(
            measured.version,
            measured.window_end,
            metrics,
            measured.coverage,
            measured.popularity_bias,
            measured.cold_recall,
        )

    def _standing(self, version: Version) -> Standing:
        if version.number not in self._standings:
            window_end = datetime.fromisoformat(version.tags["crane.window_end"])
            self._standings[version.number] = measure(
                load_model(self._registry.model_folder(version)),
                version.number,
                window_end,
                self._interactions,
                load_ids(self._source, "users", USER_ID).to_numpy(),
                load_ids(self._source, "items", ITEM_ID).to_numpy(),
                self._users,
                self._config.evaluate.user_block,
            )
        return self._standings[version.number]


def _summary(standing: Standing) -> dict[str, Any]:
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
