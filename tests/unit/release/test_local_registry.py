"""A registry in a file, read without MLflow: the same as MLflow reads."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from crane_core.config import Runtime
from crane_core.errors import ArtifactError
from crane_core.release.local_registry import LocalRegistry, read_registry
from crane_core.release.registry import Registry, open_registry
from tests.worlds.release_runs import copy_registered


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("local registry") / "store"
    copy_registered(store, (0.8, 0.5, 0.4), 2)
    registry = open_registry(Runtime(), str(store))
    MlflowClient(registry.uri, registry.uri).delete_model_version("crane", "1")
    return store


@pytest.fixture
def by_mlflow(made: Path) -> Registry:
    return open_registry(Runtime(), str(made))


@pytest.fixture
def by_file(made: Path) -> LocalRegistry:
    found = read_registry(Runtime(), str(made))
    assert isinstance(found, LocalRegistry)
    return found


def test_the_versions_are_those_of_mlflow(by_mlflow: Registry, by_file: LocalRegistry) -> None:
    assert by_file.uri == by_mlflow.uri and by_file.name == by_mlflow.name
    assert by_file.versions() == by_mlflow.versions()
    assert [version.number for version in by_file.versions()] == ["2", "3"]
    assert by_file.ledger_anchors() == by_mlflow.ledger_anchors() != {}
    for alias in ("champion", "candidate", "none"):
        assert by_file.holder(alias) == by_mlflow.holder(alias)


def test_the_files_are_those_of_mlflow(by_mlflow: Registry, by_file: LocalRegistry) -> None:
    version = by_file.version("2")
    assert by_file.model_folder(version) == by_mlflow.model_folder(version)
    assert by_file.twin_folder(version) == by_mlflow.twin_folder(version)
    for name in version.evidence:
        assert by_file.evidence(version, name).read_bytes() == by_mlflow.evidence(version, name).read_bytes()
    by_file.check_listed(version)


def test_another_model_has_no_versions(made: Path) -> None:
    found = read_registry(Runtime(model_name="other"), str(made))
    assert found.versions() == [] and found.holder("champion") is None


@pytest.mark.parametrize("lost", ["evidence", "files", "run"])
def test_what_is_gone_is_refused(made: Path, tmp_path: Path, lost: str) -> None:
    copy_registered(tmp_path / "store", (0.8,), 0)
    registry = read_registry(Runtime(), str(tmp_path / "store"))
    version = registry.version("1")
    if lost == "evidence":
        registry.evidence(version, "probe.json").unlink()
    elif lost == "files":
        shutil.rmtree(registry.model_folder(version).parents[1])
    else:
        with closing(sqlite3.connect(tmp_path / "store" / "mlflow.db")) as database:
            database.execute("delete from runs where run_uuid = ?", (version.mlflow_run,))
            database.commit()
    with pytest.raises(ArtifactError, match="cannot be read"):
        registry.model_folder(version) if lost == "files" else registry.evidence(version, "probe.json")


def test_other_tables_are_left_to_mlflow(tmp_path: Path) -> None:
    copy_registered(tmp_path / "store", (0.8,), 1)
    with closing(sqlite3.connect(tmp_path / "store" / "mlflow.db")) as database:
        database.execute("drop table registered_model_aliases")
        database.commit()
    assert isinstance(read_registry(Runtime(), str(tmp_path / "store")), Registry)


def test_a_store_without_a_registry_gets_one(tmp_path: Path) -> None:
    assert isinstance(read_registry(Runtime(), str(tmp_path / "store")), Registry)
