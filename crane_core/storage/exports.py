"""The exported lists that were in service before the window of a run."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from crane_core.config import RunConfig
from crane_core.storage.artifacts import ArtifactStore

EXPORT = "ml.export"


@dataclass(frozen=True)
class ExportedLists:
    """The lists of a champion, as the record of a run names them.

    Attributes:
        version: version that was champion.
        run: run whose record names them.
        shipped_run: run that made the model.
        window_end: end of that run's window: the lists were made from events before it.
        fingerprint, content: of the artifact.
        is_gone: whether the artifact was removed.
    """

    version: str
    run: str
    shipped_run: str
    window_end: datetime
    fingerprint: str
    content: str
    is_gone: bool

    def facts(self) -> dict[str, Any]:
        """Return the lists as JSON values."""
        return {
            "version": self.version,
            "shipped_run": self.shipped_run,
            "window_end": self.window_end.isoformat(),
            "export": self.fingerprint,
            "content": self.content,
            "is_gone": self.is_gone,
        }


def exported_before(config: RunConfig, store: ArtifactStore) -> ExportedLists | None:
    """Return the last lists that a champion has exported, among those made from events before `window.end`.

    A promotion, a refusal and a rollback each end with an export, which is recorded for its run. So the last one tells
    what was in service. Lists whose own window ends with this one's, or later, know events that would judge them. A run
    of a past window finds the lists of that time where the store still has them.

    Args:
        config: of the run whose window judges the lists. Only exports of its model (`runtime.model_name`) count.
        store: holds the records.

    Returns:
        None if no champion has exported such lists.
    """
    found = []
    for run in store.run_ids():
        entry = store.entry(run, EXPORT)
        # Without a champion an export is skipped.
        if entry is None or not entry.get("version"):
            continue
        end = _window_end(entry, store)
        is_own = entry.get("model", config.runtime.model_name) == config.runtime.model_name
        if is_own and end is not None and end < config.window.end:
            found.append((entry["finished_at"], end, run, entry))
    if not found:
        return None
    _, end, run, entry = max(found, key=lambda each: each[:3])
    return ExportedLists(
        entry["version"],
        run,
        _shipped_run(entry),
        end,
        entry["fingerprint"],
        entry["content"],
        not store.has(EXPORT, entry["fingerprint"]),
    )


def _window_end(entry: dict[str, Any], store: ArtifactStore) -> datetime | None:
    """Return the end of the window that lists were made from; None if that is not known any more."""
    if "window_end" in entry:
        return datetime.fromisoformat(entry["window_end"])
    # Earlier versions recorded only the runs.
    recorded = store.recorded_config(_shipped_run(entry))
    return datetime.fromisoformat(recorded["window"]["end"]) if recorded else None


def _shipped_run(entry: dict[str, Any]) -> str:
    return entry.get("shipped_run", entry["champion_run"])
