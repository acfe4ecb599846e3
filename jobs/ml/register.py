"""Register the model of a run: `python -m jobs.ml.register --store URI --run RUN_ID`.

Leaves a version in the model registry with its evidence and lineage, and the alias `candidate` unless the run is a
backfill. The same model and evaluation, written by the same version of this stage, become one version, however often
the job runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from crane_core.config import RunConfig
from crane_core.release.description import describe
from crane_core.release.registry import CANDIDATE, CANDIDATE_TAG, PRUNED_TAG, Registry, open_registry
from crane_core.release.version import DatasetReference, Release, Version
from crane_core.schema import USER_ID
from crane_core.serving.model_folder import load_recommender, write_model
from crane_core.serving.probe import make_probe
from crane_core.stages import STAGES, input_labels
from crane_core.storage.artifacts import Artifact, ArtifactStore
from jobs.entry_points import run_job
from jobs.ml.report import report_uri
from jobs.stores import scratch

logger = logging.getLogger(__name__)

PROBED_USERS = 32


def register(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Make or find the version of a run and give it the alias."""
    inputs = _inputs(config, store, arguments.run)
    checksums = [inputs[name].manifest["content"] for name in ("ml.train", "ml.evaluate")]
    identity = [STAGES["ml.register"].version, *checksums]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    registry = open_registry(config.runtime, store.storage.uri)
    version, is_new = registry.find(fingerprint), False
    if version is None:
        for name in ("ml.train", "ml.evaluate"):
            inputs[name].verify()
        base = scratch(store.storage.uri) / "ml.register"
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base) as folder:
            release = _release(Path(folder), fingerprint, arguments.run, config, store, inputs)
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


def _release(
    folder: Path, fingerprint: str, run_id: str, config: RunConfig, store: ArtifactStore, inputs: dict[str, Artifact]
) -> Release:
    source, trained, evaluated = (inputs[name] for name in ("etl.interactions", "ml.train", "ml.evaluate"))
    recommender = load_recommender(source, trained)
    window = config.window.model_dump(mode="json")
    model = folder / config.runtime.model_name
    model.mkdir()
    write_model(model, recommender, trained.file("weights.safetensors"), {"run": run_id, "window": window})
    probe = make_probe(recommender, PROBED_USERS)
    probe_file = folder / "probe.json"
    probe_file.write_text(json.dumps(probe))
    metrics = json.loads(evaluated.file("metrics.json").read_text())
    identity = config.identity()
    git = _git_sha()
    return Release(
        fingerprint=fingerprint,
        run_id=run_id,
        folder=model,
        evidence=[evaluated.file("metrics.json"), evaluated.file("per_user.parquet"), probe_file],
        input_example=pd.DataFrame({USER_ID: [answer[USER_ID] for answer in probe["answers"][:2]]}),
        params=_flat(identity),
        metrics={
            name: value
            for name, value in _flat({key: metrics[key] for key in ("users", "models", "differences")}, "/").items()
            if isinstance(value, int | float)
        },
        curve=json.loads(trained.file("curve.json").read_text()),
        datasets=[
            DatasetReference(
                name,
                artifact.fingerprint,
                f"{store.storage.uri}/{artifact.manifest['stage']}/{artifact.fingerprint}",
                "evaluation" if name == "ml.evaluate" else "training",
            )
            for name, artifact in inputs.items()
        ],
        tags={
            "crane.window_start": window["start"],
            "crane.window_end": window["end"],
            "crane.config_hash": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
            **{f"crane.artifact.{name}": artifact.fingerprint for name, artifact in inputs.items()},
            **({"crane.git": git} if git else {}),
        },
    )


def _inputs(config: RunConfig, store: ArtifactStore, run_id: str) -> dict[str, Artifact]:
    return {label: store.artifact(run_id, label) for label in input_labels(STAGES["ml.register"], config)}


def _flat(tree: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, separator, f"{prefix}{key}{separator}")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _git_sha() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ml.register", register, argv)


if __name__ == "__main__":
    raise SystemExit(main())
