"""Storage in a bucket: pages of names, lost races and unfinished uploads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crane_core.storage import open_storage
from tests.worlds.artifacts import folder


@pytest.mark.slow
def test_lists_more_names_than_one_page_holds(s3_uri: str) -> None:
    storage = open_storage(s3_uri)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: storage.write(f"runs/{n:04d}", b""), range(1001)))
    assert storage.names("runs") == [f"{n:04d}" for n in range(1001)]


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

    monkeypatch.setattr(storage, "create", die)
    with pytest.raises(KeyboardInterrupt):
        storage.publish(folder(tmp_path / "one", "one"), "stage/f")
    monkeypatch.undo()
    assert storage.read("stage/f/manifest.json") is None
    assert storage.publish(folder(tmp_path / "two", "two"), "stage/f")
    assert (storage.fetch("stage/f", tmp_path / "cache") / "table" / "part-0").read_text() == "two"


def test_s3_uri_round_trip(s3_uri: str) -> None:
    assert open_storage(s3_uri + "/").uri == s3_uri
    assert open_storage(s3_uri).uri == s3_uri
    assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
