"""The artifact store: one directory per stage and fingerprint, complete or absent.

{store}/{stage}/{fingerprint}/...          what a stage leaves behind, `manifest.json` last
{store}/runs/{run_id}/run.json             the run: its configuration
{store}/runs/{run_id}/{stage}.json         which artifact the stage made or found for this run
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
from crane_core.errors import ArtifactError, ConfigError
from crane_core.stages import Stage
from crane_core.storage import Storage

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Artifact:
    """A published directory.

    Attributes:
        path: local folder that holds it.
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
        """Path of a file or folder inside.

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
        storage: where they live.
        cache: local folder for copies of remote artifacts.
    """

    def __init__(self, storage: Storage, cache: Path) -> None:
        self.storage = storage
        self.cache = cache

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The published artifact, None when there is none.

        Raises:
            ArtifactError: it is damaged or not to be trusted: a file of the manifest is missing or has another size, a
                name leads out of the folder, something is there that the manifest does not list.
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
            found = f"it lacks {', '.join(sorted(missing))}" if missing else "it is of another artifact"
            raise self._untrusted(key, f"its manifest is not its own: {found}")
        # Before anything is fetched by name.
        found = check_names(manifest["files"])
        if found:
            raise self._untrusted(key, found)
        path = self.storage.fetch(key, self.cache)
        found = check_files(path, manifest["files"], MANIFEST)
        if found:
            raise self._untrusted(key, found)
        return Artifact(path, manifest)

    def publish(self, folder: Path, manifest: dict[str, Any]) -> Artifact:
        """Write the manifest into `folder`, the last file, and make the whole appear at once."""
        files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        manifest = {"schema_version": SCHEMA_VERSION, **manifest, "files": files}
        manifest["content"] = content_checksum(files, manifest.pop("tables", {}))
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        self.storage.publish(folder, f"{manifest['stage']}/{manifest['fingerprint']}")
        published = self.find(manifest["stage"], manifest["fingerprint"])
        assert published is not None
        return published

    def start_run(self, run_id: str, config: RunConfig) -> None:
        """Record the run, or check that it is the one already recorded under this id.

        Raises:
            ConfigError: the id is no file name, or belongs to a run with another configuration.
        """
        check_run_id(run_id)
        identity = config.identity()
        if self.storage.create(f"runs/{run_id}/run.json", _encode({"run": run_id, "config": identity})):
            return
        recorded = self.run(run_id)["config"]
        if recorded != identity:
            changes = "; ".join(_differences(recorded, identity))
            raise ConfigError(
                f"Run {run_id!r} was started with another configuration: {changes}.",
                "Give another --run, or leave out --config and the --set that differ: the run keeps its own.",
            )

    def run(self, run_id: str) -> dict[str, Any]:
        """The record `run.json` of a run.

        Raises:
            ArtifactError: there is no such run.
        """
        recorded = self._json(f"runs/{run_id}/run.json")
        if recorded is None:
            known = ", ".join(self.storage.names("runs")[-5:]) or "none"
            raise ArtifactError(
                f"There is no run {run_id!r} in {self.storage.uri}.", f"Give --run one of the known runs: {known}."
            )
        return recorded

    def recorded_config(self, run_id: str) -> dict[str, Any] | None:
        """The configuration of a run, None when there is no such run yet."""
        recorded = self._json(f"runs/{run_id}/run.json")
        return recorded and recorded["config"]

    def previous_run(self, config: RunConfig) -> str | None:
        """The run whose window ends last before this one's, among those that have an item graph."""
        ends = {run: datetime.fromisoformat(self.run(run)["config"]["window"]["end"]) for run in self.run_ids()}
        earlier = sorted((end, run) for run, end in ends.items() if end < config.window.end)
        return next((run for _, run in reversed(earlier) if self.entry(run, "ml.graph")), None)

    def run_ids(self) -> list[str]:
        return self.storage.names("runs")

    def record(self, run_id: str, stage: str, part: str, entry: Mapping[str, Any]) -> None:
        """Note what a stage did for a run."""
        self.storage.write(f"runs/{run_id}/{_entry_name(stage, part)}", _encode(entry))

    def entry(self, run_id: str, stage: str, part: str = "") -> dict[str, Any] | None:
        """What a stage did for a run, None when it has not finished."""
        return self._json(f"runs/{run_id}/{_entry_name(stage, part)}")

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

    def artifact(self, run_id: str, stage: str, part: str = "") -> Artifact:
        """The artifact a stage left for a run.

        Raises:
            ArtifactError: the stage has not finished for this run, or its artifact is gone.
        """
        entry = self.entry(run_id, stage, part)
        found = self.find(stage, str(entry.get("fingerprint"))) if entry else None
        if found is None:
            raise ArtifactError(
                f"Run {run_id!r} has no artifact of {stage}{f' part {part}' if part else ''}.",
                f"Run python -m jobs.{stage} --store {self.storage.uri} --run {run_id} first.",
            )
        return found


def check_names(files: Any) -> str:
    """What is wrong with the file list of a manifest, "" when nothing is.

    Args:
        files: name to `bytes` and `sha256`, as found; names are relative POSIX paths that stay inside.
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
    """What is wrong with a folder that holds what a manifest lists, "" when nothing is.

    Args:
        folder: local.
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
    strangers = present - set(files) - {itself}
    return f"it holds {', '.join(sorted(strangers))}, which nothing lists" if strangers else ""


def check_run_id(run_id: str) -> None:
    """Refuse an id that is not fit for a file name.

    Raises:
        ConfigError: it is not.
    """
    if not RUN_ID.fullmatch(run_id):
        raise ConfigError(
            f"Run id {run_id!r} is not a file name.",
            "Use up to 128 letters, digits, dots, dashes and underscores; begin with a letter or digit.",
        )


def fingerprint_of(stage: Stage, part: str, config: RunConfig, inputs: Mapping[str, str], source: Any) -> str:
    """Identity of a stage's work: equal fingerprints mean equal content.

    Args:
        stage: its name and version enter.
        part: the part of a mapped stage.
        config: the sections that the stage obeys enter.
        inputs: input name to content checksum.
        source: identity of raw data the stage reads, JSON values.
    """
    sections = config.model_dump(mode="json", include=stage.sections_of(config))
    payload = [stage.name, stage.version, part, sections, dict(inputs), source]
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()[:32]


def content_checksum(files: Mapping[str, Mapping[str, Any]], tables: Mapping[str, str]) -> str:
    """One checksum of an artifact's content.

    Args:
        files: name to size and sha256.
        tables: folder to a checksum of its rows, for tables whose file names and row order are free.
    """
    parts = dict(tables)
    for name, entry in files.items():
        if name.split("/")[0] not in tables:
            parts[name] = entry["sha256"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _entry_name(stage: str, part: str) -> str:
    return f"{stage}.{part}.json" if part else f"{stage}.json"


def _encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _damaged(artifact: Path, name: str, expected: str, found: str) -> ArtifactError:
    return ArtifactError(
        f"{artifact / name} is damaged: expected {expected}, found {found}.",
        f"Remove {artifact} and run its stage again.",
    )


def _differences(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    return [
        f"{section}.{field} was {old!r}, now {given[section].get(field)!r}"
        for section, fields in recorded.items()
        for field, old in fields.items()
        if given[section].get(field) != old
    ]
