"""Storage in a bucket: pages of names, lost races and unfinished uploads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crane_core.storage import open_storage
from tests.worlds.artifacts import folder


def test_lists_more_names_than_one_page_holds(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names in three pages of ten; a page of S3 has a thousand, which would take as many requests to fill."""
    import boto3

    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    storage = open_storage(s3_uri)
    names = [f"{n:02d}" for n in range(21)]
    for name in names:
        storage.write(f"runs/{name}", b"")
        storage.write(f"runs/{name}/inside", b"")
    page = boto3.client("s3").list_objects_v2(Bucket=s3_uri.split("/")[2])
    assert (page["KeyCount"], page["IsTruncated"]) == (10, True)
    assert storage.names("runs") == names


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
