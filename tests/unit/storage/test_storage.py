"""The contract of a storage, for a local directory and for S3 over HTTP."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crane_core.errors import ConfigError
from crane_core.storage import Storage, open_storage
from tests.worlds.artifacts import folder


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_uri"))


def test_reads_what_was_written(storage: Storage) -> None:
    assert storage.read("runs/r/run.json") is None
    storage.write("runs/r/run.json", b"one")
    storage.write("runs/r/run.json", b"two")
    assert storage.read("runs/r/run.json") == b"two"


def test_only_the_first_creates(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: storage.create("ledger/1", str(n).encode()), range(8)))
    assert won.count(True) == 1
    assert storage.read("ledger/1") == str(won.index(True)).encode()


def test_lists_names_directly_below(storage: Storage) -> None:
    assert storage.names("runs") == []
    for key in ("runs/b/run.json", "runs/b/x.json", "runs/a/run.json", "runs/c", "runsx/d"):
        storage.write(key, b"")
    assert storage.names("runs") == ["a", "b", "c"]
    assert storage.names("runs/b") == ["run.json", "x.json"]


def test_a_published_folder_can_be_fetched_and_is_never_replaced(storage: Storage, tmp_path: Path) -> None:
    assert storage.publish(folder(tmp_path / "one", "one"), "stage/f")
    assert not storage.publish(folder(tmp_path / "two", "two"), "stage/f")
    for cache in (tmp_path / "cache", tmp_path / "cache", tmp_path / "other"):
        found = storage.fetch("stage/f", cache)
        assert (found / "table" / "part-0").read_text() == "one"
        assert json.loads(found.joinpath("manifest.json").read_text()) == {"text": "one"}
    assert json.loads(storage.read("stage/f/manifest.json") or b"") == {"text": "one"}
    assert storage.names("stage") == ["f"]
    assert not (tmp_path / "one").exists() and not (tmp_path / "two").exists()


def test_racing_publishers_end_with_one_complete_folder(storage: Storage, tmp_path: Path) -> None:
    folders = [folder(tmp_path / f"attempt-{n}", str(n)) for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(lambda path: storage.publish(path, "stage/f"), folders))
    assert won.count(True) == 1
    found = storage.fetch("stage/f", tmp_path / "cache")
    assert (found / "table" / "part-0").read_text() == str(won.index(True))
    assert json.loads((found / "manifest.json").read_text()) == {"text": str(won.index(True))}
    assert storage.names("stage") == ["f"]


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_storage("store").uri == str(tmp_path / "store")
    assert open_storage((tmp_path / "store").as_uri()).uri == str(tmp_path / "store")
    with pytest.raises(ConfigError, match="unknown scheme 'gs'"):
        open_storage("gs://bucket")


def test_a_withdrawn_folder_is_absent_and_can_be_published_again(storage: Storage, tmp_path: Path) -> None:
    assert storage.publish(folder(tmp_path / "one", "one"), "stage/f")
    assert storage.size("stage/f") > 0
    rest = storage.withdraw("stage/f")
    assert rest and storage.read("stage/f/manifest.json") is None
    assert storage.publish(folder(tmp_path / "two", "two"), "stage/f")
    storage.discard(rest)
    storage.discard(rest)
    assert (storage.fetch("stage/f", tmp_path / "cache") / "table" / "part-0").read_text() == "two"
    assert storage.withdraw("stage/unknown") == []


def test_what_a_killed_removal_left_is_found_again(storage: Storage, tmp_path: Path) -> None:
    storage.publish(folder(tmp_path / "one", "one"), "stage/f")
    storage.withdraw("stage/f")
    # Killed before `discard`: found beside the folder, or under its own name.
    rest = [*storage.leftovers("stage").get("f", []), *storage.withdraw("stage/f")]
    assert rest
    storage.discard(rest)
    assert storage.leftovers("stage") == {} and storage.names("stage") == [] and storage.size("stage/f") == 0


def test_a_record_goes_at_once_and_bytes_by_their_key(storage: Storage) -> None:
    for key in ("runs/a/run.json", "runs/a/etl.x.json", "runs/ab/run.json"):
        storage.write(key, b"{}")
    storage.discard(storage.withdraw("runs/a"))
    assert storage.names("runs") == ["ab"]
    storage.delete("runs/ab/run.json")
    storage.delete("runs/ab/run.json")
    assert storage.read("runs/ab/run.json") is None
