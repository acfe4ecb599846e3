"""A registry in a SQLite file of this machine, read without MLflow, which takes three processor seconds to import.

Only MLflow writes the file. The tables and columns that are read here are those of the pinned version of MLflow; where
others are found, `read_registry` leaves the reading to MLflow.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from crane_core.config import Runtime
from crane_core.release.reading import RegistryReader
from crane_core.release.version import Version

_SQLITE = "sqlite:///"
_TABLES = "mlflow.db"
_WAIT_SECONDS = 60.0
"""How long a reader waits for a process that writes."""


def read_registry(runtime: Runtime, store_uri: str) -> RegistryReader:
    """Return the configured registry, else the one inside a local store, for a process that only reads.

    Raises:
        ConfigError: none is configured for a remote store, or it does not answer.
    """
    uri = runtime.registry or ("" if "://" in store_uri else f"{_SQLITE}{Path(store_uri) / _TABLES}")
    if uri.startswith(_SQLITE) and Path(uri.removeprefix(_SQLITE)).is_file():
        registry = LocalRegistry(uri, runtime.model_name)
        try:
            registry.versions()
            return registry
        except sqlite3.Error:
            pass
    # Imported here: it imports MLflow.
    from crane_core.release.registry import open_registry

    return open_registry(runtime, store_uri)


class LocalRegistry(RegistryReader):
    """One registered model in a SQLite file of this machine.

    Args:
        uri: `sqlite:///PATH` of an existing file.
        name: name of the registered model.
    """

    def __init__(self, uri: str, name: str) -> None:
        self.uri = uri
        self.name = name

    def versions(self) -> list[Version]:
        """Return all versions, oldest first.

        Raises:
            sqlite3.Error: the file has other tables, or is no database.
        """
        tags: dict[int, dict[str, str]] = defaultdict(dict)
        for number, key, value in self._rows("select version, key, value from model_version_tags where name = ?"):
            tags[number][key] = value
        aliases: dict[int, list[str]] = defaultdict(list)
        for number, alias in self._rows(
            "select version, alias from registered_model_aliases where name = ? order by alias"
        ):
            aliases[number].append(alias)
        found = self._rows(
            "select version, run_id from model_versions where name = ? and current_stage != 'Deleted_Internal' "
            "order by version"
        )
        return [Version(str(number), run or "", tags[number], tuple(aliases[number])) for number, run in found]

    def holder(self, alias: str) -> str | None:
        found = self._rows("select alias, version from registered_model_aliases where name = ?")
        return next((str(number) for name, number in found if name == alias), None)

    def check_listed(self, version: Version) -> None:
        self._by_mlflow().check_listed(version)

    def _logged(self, version: Version, path: str) -> Path:
        found = self._rows("select artifact_uri from runs where run_uuid = ?", version.mlflow_run)
        if not found:
            raise FileNotFoundError(f"no MLflow run {version.mlflow_run}")
        place = _local_path(found[0][0])
        return self._by_mlflow()._logged(version, path) if place is None else _existing(place / path)

    def _model(self, version: Version) -> Path:
        found = self._rows("select version, storage_location from model_versions where name = ?")
        place = next((_local_path(uri) for number, uri in found if str(number) == version.number), None)
        return self._by_mlflow()._model(version) if place is None else _existing(place)

    def _by_mlflow(self) -> RegistryReader:
        from crane_core.release.registry import Registry

        return Registry(self.uri, None, self.name)

    def _rows(self, query: str, value: str | None = None) -> list[tuple]:
        with closing(sqlite3.connect(self.uri.removeprefix(_SQLITE), timeout=_WAIT_SECONDS)) as database:
            return database.execute(query, (self.name if value is None else value,)).fetchall()


def _local_path(uri: str | None) -> Path | None:
    """Return the local path behind the URI of an artifact, None where it lies elsewhere."""
    parts = urlsplit(uri or "")
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    return path
