"""What somebody has removed or changed of a registered version."""

from __future__ import annotations

from crane_core.errors import ArtifactError
from crane_core.release.downloads import listed
from crane_core.release.registry import Registry
from crane_core.serving.model_folder import verify_model


def damage_of(registry: Registry, number: str) -> str:
    """Return what is wrong with a version for certain, "" if it can be served as it was registered.

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
    except ArtifactError as error:
        # Raises where the files are out of reach rather than gone or changed.
        listed(registry.uri, version.mlflow_run, f"models:/{registry.name}/{number}")
        return error.found.rstrip(".")
    return ""
