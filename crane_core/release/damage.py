"""What somebody has removed or changed of a registered version."""

from __future__ import annotations

from crane_core.errors import ArtifactError
from crane_core.release.reading import RegistryReader
from crane_core.release.version import Version
from crane_core.serving.model_folder import verify_model
from crane_core.storage.artifacts import ArtifactStore


def damage_of(registry: RegistryReader, number: str) -> str:
    """Return what is wrong with a version for certain, "" if it can be served and judged as it was registered.

    Raises:
        ArtifactError: its files cannot be read, and the registry does not say that they are gone.
    """
    versions = {version.number: version for version in registry.versions()}
    if number not in versions:
        return f"version {number} was removed from model {registry.name!r}"
    version = versions[number]
    try:
        for name in version.evidence:
            registry.evidence(version, name)
        verify_model(registry.model_folder(version))
        if version.has_twin:
            verify_model(registry.twin_folder(version))
    except ArtifactError as error:
        # Raises where the files are out of reach rather than gone or changed.
        registry.check_listed(version)
        return error.found.rstrip(".")
    return ""


def run_lost(store: ArtifactStore, version: Version) -> str | None:
    """Return the run of a version that was removed from the store: its own or the one it is served from; else None."""
    return next((run for run in (version.run_id, version.shipped_run) if store.recorded_config(run) is None), None)
