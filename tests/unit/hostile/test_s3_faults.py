"""The store and raw data on an S3 API with faults: artifacts are complete or absent at every moment."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from crane_core.config import Etl, Window
from crane_core.raw import location
from crane_core.raw.checks import check_interactions
from crane_core.raw.files import list_interactions
from crane_core.raw.location import Location
from crane_core.storage import s3
from crane_core.storage.artifacts import ArtifactStore
from tests.worlds.raw_data import at, write_day
from tests.worlds.s3_faults import Fault, FaultyProxy

MANIFEST = {"stage": "etl.features", "fingerprint": "f", "facts": {}}
PART_BYTES = 8 * 1024 * 1024


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "RETRIES", s3.RETRIES.merge(Config(read_timeout=2, connect_timeout=2)))
    monkeypatch.setattr(location, "REQUEST_SECONDS", 2)
    location.s3_filesystem.cache_clear()
    yield
    location.s3_filesystem.cache_clear()


def some_faults(method: str, path: str, count: int) -> Fault | None:
    """Drop one connection in the middle of a part, leave one request without an answer, and refuse every third one."""
    if "partNumber=2" in path and "dropped" not in SEEN:
        SEEN.add("dropped")
        return "drop"
    if method == "PUT" and "hung" not in SEEN:
        SEEN.add("hung")
        return "hang"
    return "error" if count % 3 == 2 else None


SEEN: set[str] = set()


def folder_of(path: Path, megabytes: int) -> Path:
    path.mkdir()
    (path / "matrix.npy").write_bytes(np.random.default_rng(0).bytes(megabytes * 1024 * 1024))
    (path / "small").write_text("a few bytes")
    return path


def open_at(uri: str, tmp_path: Path) -> ArtifactStore:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return ArtifactStore(s3.S3Storage(bucket, prefix), tmp_path / "cache")


@pytest.mark.slow
def test_an_artifact_arrives_whole_or_is_not_there(
    s3_uri: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that polls sees nothing, and later the complete artifact."""
    SEEN.clear()
    made = folder_of(tmp_path / "made", 20)
    expected = hashlib.sha256((made / "matrix.npy").read_bytes()).hexdigest()
    reader, states, done = open_at(s3_uri, tmp_path / "reader"), [], threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            found = reader.find("etl.features", "f")
            states.append(found and hashlib.sha256((found.path / "matrix.npy").read_bytes()).hexdigest())

    with FaultyProxy(s3_endpoint, some_faults).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        writer = open_at(s3_uri, tmp_path / "writer")
        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            published = writer.publish(made, dict(MANIFEST))
        finally:
            done.set()
            watcher.join()
        published.verify()
    assert set(proxy.injected) == {"drop", "hang", "error"} and proxy.injected["error"] >= 3
    assert states and states[0] is None and set(states) <= {None, expected}


def test_an_upload_that_never_ends_well_leaves_nothing_to_see(
    s3_uri: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every attempt loses the connection in the second part; without the fault the same upload succeeds."""
    made = folder_of(tmp_path / "made", 20)
    monkeypatch.setattr(s3, "RETRIES", s3.RETRIES.merge(Config(retries={"max_attempts": 2, "mode": "standard"})))
    proxy = FaultyProxy(s3_endpoint, lambda method, path, count: "drop" if "partNumber=2" in path else None)
    with proxy.running():
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises((BotoCoreError, ClientError, s3.boto3.exceptions.Boto3Error)):
            open_at(s3_uri, tmp_path / "writer").publish(made, dict(MANIFEST))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    store = open_at(s3_uri, tmp_path / "reader")
    assert store.find("etl.features", "f") is None
    assert store.storage.names("etl.features/f") == []
    assert made.is_dir(), "what could not be published is still here"
    (made / "manifest.json").unlink(missing_ok=True)
    store.publish(made, dict(MANIFEST)).verify()


def test_raw_data_are_listed_and_read_through_faults(
    s3_uri: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = boto3.client("s3")
    bucket = s3_uri.split("/")[2]
    for day in range(1, 8):
        path = write_day(tmp_path, f"2026-01-0{day}", [("a", "x", at(f"2026-01-0{day}"))] * day)
        client.upload_file(str(path), bucket, f"raw/{path.relative_to(tmp_path)}")
    client.put_object(Bucket=bucket, Key="raw/interactions/_SUCCESS", Body=b"")
    faults = {1: "error", 3: "error", 4: "drop", 7: "error"}
    window = Window.model_validate({"start": "2026-01-05", "end": "2026-01-06"})
    with FaultyProxy(s3_endpoint, lambda method, path, count: faults.get(count)).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        root = Location.at(f"s3://{bucket}/raw")
        assert root.is_dir() and not (root / "absent").is_dir()
        footers = check_interactions(list_interactions(root, window, Etl()), window, Etl())
    assert [footer.num_rows for footer in footers] == [1, 2, 3, 4, 5]
    assert str(footers[0].file.path) == f"s3://{bucket}/raw/interactions/dt=2026-01-01/part-0.parquet"
    assert footers[0].file.name == "interactions/dt=2026-01-01/part-0.parquet"
    local = list_interactions(tmp_path, window, Etl())
    assert [file.name for file in local] == [footer.file.name for footer in footers]
    assert sum(proxy.injected.values()) == 4
    assert pq.read_table(tmp_path / "interactions" / "dt=2026-01-03", partitioning=None).num_rows == 3
