"""Assemble what is registered for a run, from its artifacts: model folder, evidence, figures and lineage."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from crane_core.config import RunConfig
from crane_core.refit import refit_run
from crane_core.release.version import SHIPPED_TAG, DatasetReference, Release
from crane_core.schema import USER_ID
from crane_core.serving.model_folder import Recommender, load_recommender, write_model
from crane_core.serving.probe import make_probe
from crane_core.storage.artifacts import Artifact, ArtifactStore

FIGURES = ("users", "models", "differences", "rules")
LIVE_FIGURES = ("users", "covered", "new_items", "ratio")
PROBED_USERS = 32
"""Users whose lists the smoke test compares."""


@dataclass(frozen=True)
class Made:
    """The artifacts that a version is made of.

    Attributes:
        twin: those of the run, by stage.
        shipped: those of its refit run, empty where there is none.
    """

    twin: dict[str, Artifact]
    shipped: dict[str, Artifact]


def assemble(
    folder: Path, fingerprint: str, run_id: str, config: RunConfig, store: ArtifactStore, made: Made
) -> Release:
    """Write the model folders and the probe of a run, and gather its evidence, figures and lineage.

    Args:
        folder: empty folder for what is written.
        fingerprint: identity of the version.
        run_id: the pipeline's run.
        config: its configuration.
        store: holds the artifacts.
        made: the artifacts.
    """
    inputs, evaluated, trained = made.twin, made.twin["ml.evaluate"], made.twin["ml.train"]
    window = config.window.model_dump(mode="json")
    model, twin = folder / config.runtime.model_name, folder / "twin"
    if made.shipped:
        served = _write(model, made.shipped, refit_run(run_id), config)
        _write(twin, made.twin, run_id, config)
    else:
        served = _write(model, made.twin, run_id, config)
    probe = make_probe(served, PROBED_USERS)
    probe_file = folder / "probe.json"
    probe_file.write_text(json.dumps(probe))
    metrics = json.loads(evaluated.file("metrics.json").read_text())
    identity = config.identity()
    git = _git_sha()
    return Release(
        fingerprint=fingerprint,
        run_id=run_id,
        folder=model,
        twin=twin if made.shipped else None,
        evidence=[evaluated.file("metrics.json"), evaluated.file("per_user.parquet"), probe_file],
        input_example=pd.DataFrame({USER_ID: [answer[USER_ID] for answer in probe["answers"][:2]]}),
        params=_flat(identity),
        metrics=_numbers({key: metrics[key] for key in FIGURES if key in metrics}) | _live(store, run_id),
        curve=json.loads(trained.file("curve.json").read_text()),
        datasets=[
            DatasetReference(
                name,
                artifact.fingerprint,
                f"{store.storage.uri}/{artifact.manifest['stage']}/{artifact.fingerprint}",
                "evaluation" if name == "ml.evaluate" else "training",
            )
            for name, artifact in [*inputs.items(), *made.shipped.items()]
        ],
        tags={
            "crane.window_start": window["start"],
            "crane.window_end": window["end"],
            "crane.config_hash": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
            **{f"crane.artifact.{name}": artifact.fingerprint for name, artifact in inputs.items()},
            **{f"crane.shipped.{name}": artifact.fingerprint for name, artifact in made.shipped.items()},
            **({SHIPPED_TAG: refit_run(run_id)} if made.shipped else {}),
            **({"crane.git": git} if git else {}),
        },
    )


def _write(folder: Path, inputs: Mapping[str, Artifact], run_id: str, config: RunConfig) -> Recommender:
    """Write the model of a run into a new folder and return what it serves."""
    shown = (config.export.rules, config.window.end)
    recommender = load_recommender(inputs["etl.interactions"], inputs["ml.train"], *shown)
    facts = {"run": run_id, "window": config.window.model_dump(mode="json")}
    folder.mkdir()
    write_model(folder, recommender, inputs["ml.train"].file("weights.safetensors"), facts)
    return recommender


def _live(store: ArtifactStore, run_id: str) -> dict[str, float]:
    """Return how the lists that were in service did on the window of a run, empty where there were none."""
    score = (store.entry(run_id, "ml.live") or {}).get("live", {})
    return _numbers({"live": {name: score.get(name) for name in LIVE_FIGURES} | score.get("models", {})})


def _numbers(tree: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a tree by their path, `models/crane/recall@20`."""
    return {name: value for name, value in _flat(tree, "/").items() if isinstance(value, int | float)}


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
