"""Small artifacts, and folders ready to publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crane_core.storage.artifacts import Artifact, ArtifactStore


def publish(store: ArtifactStore, folder: Path, text: str = "data", **extra: Any) -> Artifact:
    """Publish an artifact of `etl.features` with a table of one file; the fingerprint is `f`."""
    (folder / "table").mkdir(parents=True)
    (folder / "table" / "part-0").write_text(text)
    (folder / "facts.json").write_text("{}")
    return store.publish(folder, {"stage": "etl.features", "fingerprint": "f", "facts": {"n": 3}, **extra})


def folder(path: Path, text: str) -> Path:
    """Write a folder ready to publish: a table of one file, and a manifest."""
    (path / "table").mkdir(parents=True)
    (path / "table" / "part-0").write_text(text)
    (path / "manifest.json").write_text(json.dumps({"text": text}))
    return path
