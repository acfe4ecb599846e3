"""Locations: parsed from paths and URIs, and listed without hidden entries."""

from __future__ import annotations

from pathlib import Path

import boto3
import pytest

from crane_core.errors import ConfigError
from crane_core.raw.location import Location

NAMES = ["a/1", "a/deep/2", "a/.hidden/3", "a/_temporary/4", "a/.5", "b"]


def test_paths_and_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(Location.at("raw")) == str(Location.at(Path("raw"))) == str(tmp_path / "raw")
    assert Location.at((tmp_path / "raw").as_uri()) == Location.at(tmp_path) / "raw"
    assert str(Location.at("s3a://bucket/prefix/")) == "s3://bucket/prefix"
    assert Location.at("s3://bucket/a/b").parent == Location.at("s3://bucket/a")
    for uri in ("gs://bucket/raw", "s3:///raw"):
        with pytest.raises(ConfigError, match="expected a local path or s3://bucket/prefix"):
            Location.at(uri)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_listings_leave_hidden_entries_out(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = tmp_path.as_uri() if kind == "local" else request.getfixturevalue("s3_uri")
    for name in NAMES:
        if kind == "local":
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        else:
            bucket, _, prefix = root.removeprefix("s3://").partition("/")
            boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=name.encode())
    location = Location.at(root)
    assert location.is_dir() and not (location / "b").is_dir() and not (location / "absent").is_dir()
    assert [entry.name for entry in location.children()] == ["a", "b"]
    assert [str(entry).removeprefix(f"{location}/") for entry in location.files()] == ["a/1", "a/deep/2", "b"]
    assert (location / "absent").files() == [] and (location / "b").children() == []
