"""Register the model of a run: `python -m jobs.ml.register --store URI --run RUN_ID`.

Leaves a version in the model registry with its evidence and lineage, and the alias `candidate` unless the run is a
backfill. What is served is the model of the refit run; the model of the run, which was evaluated, lies beside it as its
twin. With `etl.refit=false` one model is both. The same models and evaluation, written by the same version of this
stage, become one version, however often the job runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crane_core.config import RunConfig
from crane_core.errors import ArtifactError
from crane_core.model_config import Choices
from crane_core.refit import choices_of, refit_run
from crane_core.release.assembly import Made, assemble
from crane_core.release.description import describe
from crane_core.release.registry import CANDIDATE, CANDIDATE_TAG, PRUNED_TAG, Registry, open_registry
from crane_core.release.version import Version
from crane_core.stages import STAGES, input_labels
from crane_core.storage.artifacts import Artifact, ArtifactStore
from jobs.entry_points import run_job
from jobs.stores import report_uri, scratch

logger = logging.getLogger(__name__)


def register(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Make or find the version of a run and give it the alias."""
    inputs = _inputs(config, store, arguments.run)
    shipped = _shipped(config, store, arguments.run)
    checksums = [inputs[name].manifest["content"] for name in ("ml.train", "ml.evaluate")]
    checksums += [artifact.manifest["content"] for artifact in shipped.values()]
    if config.export.rules.are_set():
        # The model holds what the rules read of the catalog.
        checksums.append(inputs["etl.interactions"].manifest["content"])
    stage = STAGES["ml.register"]
    settings = stage.settings(config)
    identity = [stage.version, *checksums, *([settings] if settings else [])]
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    registry = open_registry(config.runtime, store.storage.uri)
    version, is_new = registry.find(fingerprint), False
    if version is None:
        for artifact in (inputs["ml.train"], inputs["ml.evaluate"], *shipped.values()):
            artifact.verify()
        base = scratch(store.storage.uri) / "ml.register"
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base) as folder:
            release = assemble(Path(folder), fingerprint, arguments.run, config, store, Made(inputs, shipped))
            version, is_new = registry.register(release)
    if version.tags.get(PRUNED_TAG):
        registry.tag(version.number, {PRUNED_TAG: ""})
    if is_new:
        decision = "Not judged yet." if not config.runtime.backfill else "Not judged: a backfill moves no alias."
        registry.describe(version.number, describe(version, {}, decision, report_uri(store, arguments.run)))
    alias = None if config.runtime.backfill else _make_candidate(registry, version)
    return {
        "status": "done" if is_new else "found",
        "version": version.number,
        "shipped_run": version.shipped_run,
        "alias": alias,
        "model": registry.name,
        "registry": config.runtime.registry,
    }


def _make_candidate(registry: Registry, version: Version) -> str | None:
    """Give a version the alias, unless a newer version has it: registering an old run again must not bring it back."""
    holder = registry.holder(CANDIDATE)
    if holder is not None and int(holder) > int(version.number):
        return None
    if CANDIDATE_TAG not in version.tags:
        registry.tag(version.number, {CANDIDATE_TAG: datetime.now(UTC).isoformat(timespec="seconds")})
    if holder != version.number:
        registry.set_alias(CANDIDATE, version.number)
    return CANDIDATE


def _shipped(config: RunConfig, store: ArtifactStore, run_id: str) -> dict[str, Artifact]:
    """Return the artifacts of the refit run that are served; empty where the evaluated model is.

    Raises:
        ArtifactError: the refit run was made with other choices than those of the run.
    """
    if not config.etl.refit:
        return {}
    recorded = (store.recorded_config(refit_run(run_id)) or {}).get("choices")
    if recorded is not None:
        chosen = choices_of(*(store.artifact(run_id, stage).facts for stage in ("ml.behaviour", "ml.train")))
        if Choices.model_validate(recorded) != chosen:
            raise ArtifactError(
                f"The refit run {refit_run(run_id)!r} was made with other choices than run {run_id!r} has by now.",
                f"Run python -m jobs.ml.refit --store {store.storage.uri} --run {run_id}, then its "
                "stages with --refit.",
            )
    return {stage: store.artifact(refit_run(run_id), stage) for stage in ("etl.interactions", "ml.train")}


def _inputs(config: RunConfig, store: ArtifactStore, run_id: str) -> dict[str, Artifact]:
    return {label: store.artifact(run_id, label) for label in input_labels(STAGES["ml.register"], config)}


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ml.register", register, argv)


if __name__ == "__main__":
    raise SystemExit(main())
