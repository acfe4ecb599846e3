"""Both storages keep the same promises: a local directory, and S3 over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crane_core.errors import ConfigError
from crane_core.storage import Storage, open_storage


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_uri"))


def folder(path: Path, text: str) -> Path:
    (path / "table").mkdir(parents=True)
    (path / "table" / "part-0").write_text(text)
    (path / "manifest.json").write_text(json.dumps({"text": text}))
    return path


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


@pytest.mark.slow
def test_lists_more_names_than_one_page_holds(s3_uri: str) -> None:
    storage = open_storage(s3_uri)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: storage.write(f"runs/{n:04d}", b""), range(1001)))
    assert storage.names("runs") == [f"{n:04d}" for n in range(1001)]


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


def test_losers_leave_no_objects_behind(s3_uri: str, tmp_path: Path) -> None:
    import boto3

    storage = open_storage(s3_uri)
    storage.publish(folder(tmp_path / "one", "one"), "stage/f")
    bucket = s3_uri.split("/")[2]
    before = boto3.client("s3").list_objects_v2(Bucket=bucket)["KeyCount"]
    storage.publish(folder(tmp_path / "two", "two"), "stage/f")
    assert boto3.client("s3").list_objects_v2(Bucket=bucket)["KeyCount"] == before


def test_an_upload_without_manifest_does_not_exist(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(s3_uri)

    def die(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "_create", die)
    with pytest.raises(KeyboardInterrupt):
        storage.publish(folder(tmp_path / "one", "one"), "stage/f")
    monkeypatch.undo()
    assert storage.read("stage/f/manifest.json") is None
    assert storage.publish(folder(tmp_path / "two", "two"), "stage/f")
    assert (storage.fetch("stage/f", tmp_path / "cache") / "table" / "part-0").read_text() == "two"


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from crane_core.storage import open_storage
def half(source, target):
    shutil.copytree(source / "table", target / "table")
    os.kill(os.getpid(), signal.SIGKILL)
shutil.move = half
open_storage(sys.argv[1]).publish(Path(sys.argv[2]), "stage/f")
"""


def test_a_publisher_killed_half_way_leaves_nothing_visible(tmp_path: Path) -> None:
    source = folder(tmp_path / "one", "one")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "store"), str(source)], check=False)
    assert killed.returncode == -signal.SIGKILL
    storage = open_storage(str(tmp_path / "store"))
    assert len(list((tmp_path / "store" / "stage").iterdir())) == 1
    assert storage.names("stage") == [] and storage.read("stage/f/manifest.json") is None
    assert storage.publish(folder(tmp_path / "two", "two"), "stage/f")
    assert storage.names("stage") == ["f"]


def test_failed_rename_is_no_lost_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(tmp_path / "store"))

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        storage.publish(folder(tmp_path / "one", "one"), "stage/f")


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_storage("store").uri == str(tmp_path / "store")
    assert open_storage((tmp_path / "store").as_uri()).uri == str(tmp_path / "store")
    with pytest.raises(ConfigError, match="unknown scheme 'gs'"):
        open_storage("gs://bucket")


def test_s3_uri_round_trip(s3_uri: str) -> None:
    assert open_storage(s3_uri + "/").uri == s3_uri
    assert open_storage(s3_uri).uri == s3_uri
    assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
