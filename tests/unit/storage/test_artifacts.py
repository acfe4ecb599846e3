"""Artifacts and run records: found, refused when damaged, and named by fingerprints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crane_core.config import RunConfig
from crane_core.config_file import load_config
from crane_core.errors import ArtifactError, ConfigError
from crane_core.stages import STAGES
from crane_core.storage import open_storage
from crane_core.storage.artifacts import ArtifactStore, artifact_checksum
from tests.worlds.artifacts import publish

STAGE = STAGES["etl.features"]


def configure(*settings: str) -> RunConfig:
    return load_config(None, ["window.start=2026-01-05", "window.end=2026-01-06", *settings])


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    uri = str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_uri")
    return ArtifactStore(open_storage(uri), tmp_path / "cache")


def test_published_artifact_is_found_with_facts_and_files(store: ArtifactStore, tmp_path: Path) -> None:
    assert store.find("etl.features", "f") is None
    publish(store, tmp_path / "out")
    found = store.find("etl.features", "f")
    assert found is not None and (found.facts, found.fingerprint) == ({"n": 3}, "f")
    assert found.file("table/part-0").read_text() == "data"
    assert found.file("table").is_dir()
    found.verify()
    with pytest.raises(ArtifactError, match="has no 'tab'"):
        found.file("tab")


@pytest.mark.parametrize("damage", ["remove", "shorten", "empty"])
def test_damaged_artifact_is_refused(store: ArtifactStore, tmp_path: Path, damage: str) -> None:
    path = publish(store, tmp_path / "out").file("table/part-0")
    if damage == "remove":
        path.unlink()
    else:
        path.write_text("" if damage == "empty" else "dat")
    found = {"remove": "no file", "shorten": "3 bytes", "empty": "0 bytes"}[damage]
    with pytest.raises(ArtifactError, match=rf"part-0 is damaged: expected 4 bytes, found {found}\. Remedy: Remove"):
        store.find("etl.features", "f")


def test_changed_bytes_of_equal_length_are_seen_by_verify(store: ArtifactStore, tmp_path: Path) -> None:
    found = publish(store, tmp_path / "out")
    found.file("table/part-0").write_text("DATA")
    assert store.find("etl.features", "f") is not None
    with pytest.raises(ArtifactError, match=r"expected the sha256 .*, found other content"):
        found.verify()


@pytest.mark.parametrize(("text", "expected"), [('{"schema_version": 99}', "manifest version 99"), ("{", "is damaged")])
def test_manifest_that_cannot_be_understood_is_refused(store: ArtifactStore, text: str, expected: str) -> None:
    store.storage.write("etl.features/f/manifest.json", text.encode())
    with pytest.raises(ArtifactError, match=expected):
        store.find("etl.features", "f")


def test_folder_without_manifest_does_not_exist(tmp_path: Path) -> None:
    store = ArtifactStore(open_storage(str(tmp_path)), tmp_path / "cache")
    (tmp_path / "etl.features" / "f").mkdir(parents=True)
    (tmp_path / "etl.features" / "f" / "part-0").touch()
    assert store.find("etl.features", "f") is None


def test_second_publisher_gets_the_first_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    publish(store, tmp_path / "one", "first")
    assert publish(store, tmp_path / "two", "second").file("table/part-0").read_text() == "first"


def test_run_keeps_the_configuration_it_was_started_with(store: ArtifactStore) -> None:
    store.start_run("r", configure("knn.k=7"))
    store.start_run("r", configure("knn.k=7", "runtime.spark_memory=2g"))
    with pytest.raises(ConfigError, match=r"'r' was started with another configuration: knn\.k was 7, now 8"):
        store.start_run("r", configure("knn.k=8"))
    assert store.run("r")["config"]["knn"]["k"] == 7
    assert store.run_ids() == ["r"]
    with pytest.raises(ArtifactError, match=r"no run 'x' in .*known runs: r"):
        store.run("x")


def test_entry_leads_to_the_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no artifact of etl\.features.*Run python -m jobs\.etl\.features"):
        store.artifact("r", "etl.features")
    publish(store, tmp_path / "out")
    store.record("r", "etl.features", {"fingerprint": "f"})
    assert store.artifact("r", "etl.features").facts == {"n": 3}
    store.record("r", "etl.features.2", {"fingerprint": "gone"})
    with pytest.raises(ArtifactError, match=r"has no artifact of etl\.features part 2"):
        store.artifact("r", "etl.features.2")


def test_content_of_a_table_is_that_of_its_rows() -> None:
    def checksum(files: dict[str, str], tables: dict[str, str]) -> str:
        return artifact_checksum({name: {"bytes": 1, "sha256": sha} for name, sha in files.items()}, tables)

    reference = checksum({"t/part-0": "a", "m.npy": "b"}, {"t": "rows"})
    assert checksum({"t/part-0": "x", "t/part-1": "y", "m.npy": "b"}, {"t": "rows"}) == reference
    assert checksum({"t/part-0": "a", "m.npy": "b"}, {"t": "other"}) != reference
    assert checksum({"t/part-0": "a", "m.npy": "c"}, {"t": "rows"}) != reference
    assert checksum({"t/part-0": "a", "m.npy": "b"}, {}) != reference


def test_manifest_is_json_with_size_and_checksum_of_every_file(store: ArtifactStore, tmp_path: Path) -> None:
    found = publish(store, tmp_path / "out", tables={"table": "rows"})
    manifest = json.loads((found.path / "manifest.json").read_text())
    assert manifest["schema_version"] == 1 and "tables" not in manifest
    assert sorted(manifest["files"]) == ["facts.json", "table/part-0"]
    assert manifest["files"]["table/part-0"]["bytes"] == 4


def test_a_damaged_run_record_names_itself(store: ArtifactStore) -> None:
    store.start_run("r", configure())
    store.storage.write("runs/r/ml.train.json", b'{"fingerprint": "f"')
    with pytest.raises(ArtifactError, match=r"runs/r/ml\.train\.json is damaged: 19 bytes that are no JSON"):
        store.entry("r", "ml.train")


def test_the_remedy_for_a_damaged_table_is_to_remove_the_artifact(tmp_path: Path) -> None:
    store = ArtifactStore(open_storage(str(tmp_path / "store")), tmp_path / "cache")
    published = publish(store, tmp_path / "out")
    (published.path / "table" / "part-0").unlink()
    with pytest.raises(ArtifactError) as caught:
        store.find("etl.features", "f")
    assert caught.value.remedy == f"Remove {published.path} and run its stage again."
