"""The artifact store a job works on, and its scratch folder on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

from crane_core.storage import open_storage
from crane_core.storage.artifacts import ArtifactStore


def open_store(uri: str) -> ArtifactStore:
    """Return the store at a URI, with its local scratch folder."""
    storage = open_storage(uri)
    return ArtifactStore(storage, scratch(storage.uri) / "cache")


def scratch(store_uri: str) -> Path:
    """Return the folder for work in progress: inside a local store, in the temporary folder for a remote one."""
    if "://" not in store_uri:
        return Path(store_uri) / ".scratch"
    return Path(tempfile.gettempdir()) / "crane" / store_uri.replace("://", "-").replace("/", "-")


def report_uri(store: ArtifactStore, run_id: str) -> str:
    """Return where the page of a run lies once it is written."""
    return f"{store.storage.uri}/reports/{run_id}.html"
