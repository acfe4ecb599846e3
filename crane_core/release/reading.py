"""What a model registry holds, read: by MLflow or, where it is a local file, without importing it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from crane_core.errors import ArtifactError
from crane_core.release.ledger import ANCHOR_TAG
from crane_core.release.mlmodel import served_folder
from crane_core.release.version import EVIDENCE_TAG, FINGERPRINT_TAG, Version
from crane_core.storage.artifacts import sha256_file

CHECKSUMS_TAG = "crane.checksums"
TWIN_TAG = "crane.twin_checksums"
EVIDENCE = "evidence"
TWIN = "twin"


class RegistryReader(ABC):
    """The versions of one registered model and their files.

    Attributes:
        uri: of the registry.
        name: of the registered model.
    """

    uri: str
    name: str

    @abstractmethod
    def versions(self) -> list[Version]:
        """Return all versions, oldest first."""

    @abstractmethod
    def holder(self, alias: str) -> str | None:
        """Return the number of the version an alias points to, None when there is no such alias."""

    @abstractmethod
    def check_listed(self, version: Version) -> None:
        """List the files of a version, which tells files that are gone from a server that is.

        Raises:
            ArtifactError: the files cannot be listed.
        """

    @abstractmethod
    def _logged(self, version: Version, path: str) -> Path:
        """Return a local path of what the MLflow run of a version holds at `path`; an OSError where it is none."""

    @abstractmethod
    def _model(self, version: Version) -> Path:
        """Return a local path of the model of a version; an OSError where there is none."""

    def find(self, fingerprint: str) -> Version | None:
        """Return the version with a fingerprint, None when there is none."""
        return next((version for version in self.versions() if version.tags.get(FINGERPRINT_TAG) == fingerprint), None)

    def version(self, number: str) -> Version:
        """Return the version with a number.

        Raises:
            ArtifactError: there is no such version.
        """
        versions = {version.number: version for version in self.versions()}
        if number not in versions:
            raise ArtifactError(
                f"Model {self.name!r} has no version {number!r}.",
                f"Give one of the known versions: {', '.join(versions) or 'none'}. One that was removed comes back "
                "as a new one: python -m jobs.ml.register --store STORE --run RUN.",
            )
        return versions[number]

    def exists(self, number: str) -> bool:
        """Return whether there is a version with a number."""
        return number in {version.number for version in self.versions()}

    def tag_of(self, number: str, tag: str) -> str | None:
        """Return the value of a tag of a version."""
        return self.version(number).tags.get(tag)

    def ledger_anchors(self) -> dict[int, str]:
        """Return the hashes of ledger entries that the versions are tagged with, by seq."""
        return {
            int(key.removeprefix(ANCHOR_TAG)): value
            for version in self.versions()
            for key, value in version.tags.items()
            if key.startswith(ANCHOR_TAG)
        }

    def evidence(self, version: Version, name: str) -> Path:
        """Return a local copy of a file of a version's evidence.

        Raises:
            ArtifactError: it is missing, or not the file that was registered.
        """
        path = self._read_logged(version, f"its evidence {name}", f"{EVIDENCE}/{name}")
        if sha256_file(path) != version.tags.get(f"{EVIDENCE_TAG}{name}"):
            raise self._refused(version, f"its evidence {name} is not what was registered")
        return path

    def model_folder(self, version: Version) -> Path:
        """Return a local copy of the model folder that `serving.model_folder.load_model` reads.

        Raises:
            ArtifactError: it is missing, or its checksums are not those that were registered.
        """
        try:
            folder = self._model(version)
        except OSError as error:
            raise self._refused(version, f"its files cannot be read ({error})") from error
        return self._checked(version, served_folder(folder), CHECKSUMS_TAG)

    def twin_folder(self, version: Version) -> Path:
        """Return the same of the evaluated model; a version without a twin serves that model."""
        if not version.has_twin:
            return self.model_folder(version)
        return self._checked(version, self._read_logged(version, "its twin", TWIN), TWIN_TAG)

    def _read_logged(self, version: Version, what: str, path: str) -> Path:
        try:
            return self._logged(version, path)
        except OSError as error:
            raise self._refused(version, f"{what} cannot be read ({error})") from error

    def _checked(self, version: Version, folder: Path, tag: str) -> Path:
        # Imported here: it imports pandas, and most who read need no files.
        from crane_core.serving.model_folder import CHECKSUMS

        path = folder / CHECKSUMS
        if not path.is_file() or sha256_file(path) != version.tags.get(tag):
            raise self._refused(version, "its checksums are not those that were registered")
        return folder

    def _refused(self, version: Version, found: str) -> ArtifactError:
        return ArtifactError(
            f"Version {version.number} of model {self.name!r} is refused: {found}.",
            "Run python -m jobs.ml.register --store STORE --run RUN, then crane promote --run RUN.",
        )
