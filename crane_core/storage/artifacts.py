"""The artifact store: one directory per stage and fingerprint, complete or absent.

{store}/{stage}/{fingerprint}/...          the files of an artifact; `manifest.json` is written last
{store}/runs/{run_id}/run.json             the configuration of a run
{store}/runs/{run_id}/{stage}.json         the artifact that the stage made or found for this run
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from crane_core.config import RunConfig
from crane_core.config_file import upgraded
from crane_core.errors import ArtifactError, ConfigError
from crane_core.refit import is_refit
from crane_core.storage import Storage
from crane_core.storage.claims import Claims

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Artifact:
    """The output of a stage, a published directory.

    Attributes:
        path: local folder of the artifact.
        manifest: its parsed manifest.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """Counts, shapes and figures the stage recorded."""
        return self.manifest["facts"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    def file(self, name: str) -> Path:
        """Return the path of a file or folder of the artifact.

        Raises:
            ArtifactError: the manifest does not list it.
        """
        files = self.manifest["files"]
        if name not in files and not any(entry.startswith(f"{name}/") for entry in files):
            raise ArtifactError(
                f"{self.path} has no {name!r}.",
                f"Remove {self.path} and run its stage again with this version of the code.",
            )
        return self.path / name

    def verify(self) -> None:
        """Compare every byte with the checksums of the manifest.

        Raises:
            ArtifactError: a file differs.
        """
        for name, expected in self.manifest["files"].items():
            if sha256_file(self.path / name) != expected["sha256"]:
                raise _damaged(self.path, name, f"the sha256 {expected['sha256']}", "other content")


class ArtifactStore:
    """Finds, publishes and reads artifacts and run records.

    Args:
        storage: storage of the artifacts.
        cache: local folder for copies of remote artifacts.
    """

    def __init__(self, storage: Storage, cache: Path) -> None:
        self.storage = storage
        self.cache = cache
        self.claims = Claims(storage)

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """Return the published artifact, or None.

        Raises:
            ArtifactError: the artifact cannot be trusted: a file of the manifest is missing or has another size, a name
                leads out of the folder, or there is a file that the manifest does not list.
        """
        if not RUN_ID.fullmatch(fingerprint):
            raise ArtifactError(
                f"{fingerprint!r} is no fingerprint of {stage}.",
                f"Remove the run that names it from {self.storage.uri}/runs and start it again.",
            )
        key = f"{stage}/{fingerprint}"
        manifest = self._json(f"{key}/{MANIFEST}")
        if manifest is None:
            return None
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise ArtifactError(
                f"{self.storage.uri}/{key} has manifest version {manifest.get('schema_version')!r}, "
                f"expected {SCHEMA_VERSION}.",
                f"Remove {self.storage.uri}/{key} and run its stage again.",
            )
        missing = {"stage", "fingerprint", "files", "content", "facts"} - set(manifest)
        if missing or (manifest["stage"], manifest["fingerprint"]) != (stage, fingerprint):
            found = f"it lacks {', '.join(sorted(missing))}" if missing else "it belongs to another artifact"
            raise self._untrusted(key, f"its manifest is not its own: {found}")
        # Checked before files are fetched by these names.
        found = check_names(manifest["files"])
        if found:
            raise self._untrusted(key, found)
        path = self.storage.fetch(key, self.cache)
        found = check_files(path, manifest["files"], MANIFEST)
        if found:
            raise self._untrusted(key, found)
        return Artifact(path, manifest)

    def has(self, stage: str, fingerprint: str) -> bool:
        """Return whether an artifact is there, without fetching it."""
        return self.storage.read(f"{stage}/{fingerprint}/{MANIFEST}") is not None

    def publish(self, folder: Path, manifest: dict[str, Any]) -> Artifact:
        """Write the manifest into `folder` as its last file, and publish the folder in one step."""
        files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        manifest = {"schema_version": SCHEMA_VERSION, **manifest, "files": files}
        manifest["content"] = artifact_checksum(files, manifest.pop("tables", {}))
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        self.storage.publish(folder, f"{manifest['stage']}/{manifest['fingerprint']}")
        published = self.find(manifest["stage"], manifest["fingerprint"])
        assert published is not None
        return published

    def start_run(self, run_id: str, config: RunConfig) -> None:
        """Record a run, or check that the run recorded under this id has the same configuration.

        Raises:
            ConfigError: the id is not a file name, or belongs to a run with another configuration.
        """
        check_run_id(run_id)
        identity = config.identity()
        if self.storage.create(f"runs/{run_id}/run.json", _encode({"run": run_id, "config": identity})):
            return
        # A run of an earlier version has no value of a field that is new since: it had the default.
        recorded = RunConfig.model_validate(self.run(run_id)["config"]).identity()
        if recorded != identity:
            changes = "; ".join(_differences(recorded, identity))
            raise ConfigError(
                f"Run {run_id!r} was started with another configuration: {changes}.",
                "Give another --run, or leave out --config and the --set that differ: the run keeps its own.",
            )

    def restart_run(self, run_id: str, config: RunConfig) -> None:
        """Record a run that another one decides about, whatever was recorded under this id before."""
        self.storage.write(f"runs/{run_id}/run.json", _encode({"run": run_id, "config": config.identity()}))

    def run(self, run_id: str) -> dict[str, Any]:
        """Return the record `run.json` of a run.

        Raises:
            ArtifactError: there is no such run.
        """
        recorded = self._json(f"runs/{run_id}/run.json")
        if recorded is None:
            known = ", ".join(self.storage.names("runs")[-5:]) or "none"
            raise ArtifactError(
                f"There is no run {run_id!r} in {self.storage.uri}.", f"Give --run one of the known runs: {known}."
            )
        return recorded | {"config": upgraded(recorded["config"])}

    def recorded_config(self, run_id: str) -> dict[str, Any] | None:
        """Return the configuration of a run, or None if there is no such run yet."""
        recorded = self._json(f"runs/{run_id}/run.json")
        return recorded and upgraded(recorded["config"])

    def previous_run(self, config: RunConfig) -> str | None:
        """Return the run with an item graph whose window ends last before the end of this window, or None.

        A refit run is none of them.
        """
        runs = [run for run in self.run_ids() if not is_refit(run)]
        ends = {run: datetime.fromisoformat(self.run(run)["config"]["window"]["end"]) for run in runs}
        earlier = sorted((end, run) for run, end in ends.items() if end < config.window.end)
        return next((run for _, run in reversed(earlier) if self.entry(run, "ml.graph")), None)

    def run_ids(self) -> list[str]:
        return self.storage.names("runs")

    def record(self, run_id: str, label: str, entry: Mapping[str, Any]) -> None:
        """Note what a stage, or a part of it, did for a run.

        Args:
            run_id: the run.
            label: `<group>.<stage>`, or `<group>.<stage>.<part>` for a part of a mapped stage.
            entry: JSON values.
        """
        self.storage.write(f"runs/{run_id}/{label}.json", _encode(entry))

    def entry(self, run_id: str, label: str) -> dict[str, Any] | None:
        """Return what a stage, or a part of it, did for a run; None when it has not finished."""
        return self._json(f"runs/{run_id}/{label}.json")

    def _json(self, key: str) -> dict[str, Any] | None:
        text = self.storage.read(key)
        if text is None:
            return None
        try:
            value = json.loads(text)
            if not isinstance(value, dict):
                raise ValueError(f"a {type(value).__name__}, no object")
        except (ValueError, RecursionError) as error:
            raise ArtifactError(
                f"{self.storage.uri}/{key} is damaged: {len(text)} bytes that are no JSON ({error}).",
                f"Remove {self.storage.uri}/{key.rpartition('/')[0]} and run the stage or the run again.",
            ) from error
        return value

    def _untrusted(self, key: str, found: str) -> ArtifactError:
        return ArtifactError(
            f"{self.storage.uri}/{key} is refused: {found}.",
            f"Remove {self.storage.uri}/{key} and run its stage again.",
        )

    def artifact(self, run_id: str, label: str) -> Artifact:
        """Return the artifact that a stage, or a part of it, left for a run.

        Raises:
            ArtifactError: the stage has not finished for this run, or its artifact was removed.
        """
        group, name, *part = label.split(".")
        stage = f"{group}.{name}"
        entry = self.entry(run_id, label)
        found = self.find(stage, str(entry.get("fingerprint"))) if entry else None
        if found is None:
            flags = "".join(f" --part {each}" for each in part)
            raise ArtifactError(
                f"Run {run_id!r} has no artifact of {stage}{f' part {part[0]}' if part else ''}.",
                f"Run python -m jobs.{stage} --store {self.storage.uri} --run {run_id}{flags} first.",
            )
        return found


def check_names(files: Any) -> str:
    """Check the file list of a manifest: return the fault, or "".

    Args:
        files: name to `bytes` and `sha256`, as found. Names must be relative POSIX paths that stay in the folder.
    """
    if not isinstance(files, dict):
        return f"its list of files is a {type(files).__name__}"
    for name, entry in files.items():
        parts = name.split("/")
        if "\\" in name or "\0" in name or not all(parts) or {".", ".."} & set(parts):
            return f"the name {name!r} leads out of it"
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if type(size) is not int or size < 0 or not SHA256.fullmatch(str(entry.get("sha256"))):
            return f"{name} has no size and checksum"
    return ""


def check_files(folder: Path, files: Any, itself: str) -> str:
    """Compare a folder with the file list of its manifest: return the fault, or "".

    Args:
        folder: local folder.
        files: name to `bytes` and `sha256`, as found.
        itself: name of the manifest, which does not list itself.
    """
    found = check_names(files)
    if found:
        return found
    present = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return f"{name} is a link or no plain file"
        if stat.S_ISREG(mode):
            present.add(name)
    for name, entry in files.items():
        size = (folder / name).stat().st_size if name in present else None
        if size != entry["bytes"]:
            found = "no file" if size is None else f"{size} bytes"
            return f"{name} is damaged: expected {entry['bytes']} bytes, found {found}"
    unlisted = present - set(files) - {itself}
    return f"it holds {', '.join(sorted(unlisted))}, which nothing lists" if unlisted else ""


def check_run_id(run_id: str) -> None:
    """Refuse a run id that cannot be a file name.

    Raises:
        ConfigError: it cannot.
    """
    if not RUN_ID.fullmatch(run_id):
        raise ConfigError(
            f"Run id {run_id!r} is not a file name.",
            "Use up to 128 letters, digits, dots, dashes and underscores; begin with a letter or digit.",
        )


def artifact_checksum(files: Mapping[str, Mapping[str, Any]], tables: Mapping[str, str]) -> str:
    """Return the checksum of an artifact, which the manifest stores as `content`.

    Args:
        files: name to size and sha256.
        tables: folder to a checksum of its rows, for tables whose file names and row order do not matter.
    """
    parts = dict(tables)
    for name, entry in files.items():
        if name.split("/")[0] not in tables:
            parts[name] = entry["sha256"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _damaged(artifact: Path, name: str, expected: str, found: str) -> ArtifactError:
    return ArtifactError(
        f"{artifact / name} is damaged: expected {expected}, found {found}.",
        f"Remove {artifact} and run its stage again.",
    )


def _differences(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    return [
        f"{section}.{field} was {(recorded[section] or {}).get(field)!r}, now {(given[section] or {}).get(field)!r}"
        for section in recorded
        for field in {**(recorded[section] or {}), **(given[section] or {})}
        if (recorded[section] or {}).get(field) != (given[section] or {}).get(field)
    ]
