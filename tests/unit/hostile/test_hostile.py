"""Artifacts, manifests, models and settings written by an attacker are refused with typed errors; no secret leaks."""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest

from crane_core.errors import EXIT_CONFIG, ArtifactError, CraneError
from crane_core.serving.model_folder import CHECKSUMS, load_model
from crane_core.storage import open_storage
from crane_core.storage.artifacts import ArtifactStore, sha256_file
from crane_core.storage.matrix import open_matrix
from jobs.logs import Redacting, redacted
from tests.worlds.artifacts import publish
from tests.worlds.hostile_tensors import HOSTILE_TENSORS, header
from tests.worlds.served import write

STAGE, FINGERPRINT = "etl.features", "f"


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    made = ArtifactStore(open_storage(str(tmp_path / "store")), tmp_path / "cache")
    publish(made, tmp_path / "out")
    return made


@pytest.fixture
def artifact(store: ArtifactStore, tmp_path: Path) -> Path:
    return tmp_path / "store" / STAGE / FINGERPRINT


def tamper(artifact: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    change(manifest)
    (artifact / "manifest.json").write_text(json.dumps(manifest))


def entry_of(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


@pytest.mark.parametrize(
    "name", ["../../../outside", "/etc/hostname", "table/../../f/facts.json", "a//b", "./x", "a\\b", ""]
)
def test_a_name_that_leads_out_of_the_artifact(store: ArtifactStore, artifact: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("theirs")
    tamper(artifact, lambda manifest: manifest["files"].update({name: entry_of(outside)}))
    with pytest.raises(ArtifactError, match="leads out of it"):
        store.find(STAGE, FINGERPRINT)


@pytest.mark.parametrize("place", ["facts.json", "table"])
def test_a_link_in_an_artifact(store: ArtifactStore, artifact: Path, tmp_path: Path, place: str) -> None:
    """Refused even if the target has the bytes that the manifest expects."""
    (artifact / place).rename(tmp_path / "elsewhere")
    (artifact / place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=f"{place} is a link"):
        store.find(STAGE, FINGERPRINT)


def test_a_pipe_in_an_artifact_is_not_waited_for(store: ArtifactStore, artifact: Path) -> None:
    (artifact / "facts.json").unlink()
    os.mkfifo(artifact / "facts.json")
    with pytest.raises(ArtifactError, match="no plain file"):
        store.find(STAGE, FINGERPRINT)


def test_a_file_that_nothing_lists(store: ArtifactStore, artifact: Path) -> None:
    """A stage that reads all files of the folder would read it."""
    (artifact / "table" / "part-1").write_text("more rows")
    with pytest.raises(ArtifactError, match=r"table/part-1, which nothing lists"):
        store.find(STAGE, FINGERPRINT)


def test_a_wrong_checksum(store: ArtifactStore, artifact: Path) -> None:
    tamper(artifact, lambda manifest: manifest["files"]["facts.json"].update(sha256="0" * 64))
    found = store.find(STAGE, FINGERPRINT)
    assert found is not None
    with pytest.raises(ArtifactError, match="expected the sha256 0000"):
        found.verify()


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(files=["facts.json"]),
        lambda manifest: manifest["files"].update({"facts.json": 3}),
        lambda manifest: manifest["files"]["facts.json"].update(bytes=-1),
        lambda manifest: manifest["files"]["facts.json"].update(bytes="2"),
        lambda manifest: manifest["files"]["facts.json"].update(sha256=None),
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.pop("content"),
        lambda manifest: manifest.update(stage="ml.train"),
        lambda manifest: manifest.update(fingerprint="g"),
        lambda manifest: manifest.update(schema_version=[1]),
    ],
)
def test_a_manifest_that_is_none(store: ArtifactStore, artifact: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tamper(artifact, change)
    with pytest.raises(ArtifactError):
        store.find(STAGE, FINGERPRINT)


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000, "{", '{"a": NaN', "\x00"])
def test_a_manifest_that_is_no_object(store: ArtifactStore, artifact: Path, text: str) -> None:
    (artifact / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="no JSON"):
        store.find(STAGE, FINGERPRINT)


@pytest.mark.parametrize("fingerprint", ["../../etc.features/f", "..", "", "a/b", None, 3.5, ["f"]])
def test_a_run_record_that_leads_elsewhere(store: ArtifactStore, fingerprint: Any) -> None:
    store.record("r", STAGE, {"fingerprint": fingerprint})
    with pytest.raises(ArtifactError):
        store.artifact("r", STAGE)


@pytest.mark.parametrize("key", ["../../../escaped", "table/../../../escaped", "a//b"])
def test_an_object_whose_key_climbs_out_of_the_cache(s3_uri: str, tmp_path: Path, key: str) -> None:
    """Keys of a bucket may be any text, also one with `..`, as in the zip-slip attack."""
    storage = open_storage(s3_uri)
    store = ArtifactStore(storage, tmp_path / "deep" / "cache")
    publish(store, tmp_path / "out")
    bucket, _, prefix = s3_uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    base = f"{prefix}/{STAGE}/{FINGERPRINT}".lstrip("/")
    attempt = client.head_object(Bucket=bucket, Key=f"{base}/manifest.json")["Metadata"]["attempt"]
    client.put_object(Bucket=bucket, Key=f"{base}/.data/{attempt}/{key}", Body=b"theirs")
    fresh = ArtifactStore(storage, tmp_path / "deep" / "fresh")
    with pytest.raises(ArtifactError, match="names lead out of it"):
        fresh.find(STAGE, FINGERPRINT)
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("attempt", [None, "../../other/f", ""])
def test_a_manifest_of_a_bucket_that_names_no_upload(s3_uri: str, tmp_path: Path, attempt: str | None) -> None:
    storage = open_storage(s3_uri)
    publish(ArtifactStore(storage, tmp_path / "cache"), tmp_path / "out")
    bucket, _, prefix = s3_uri.removeprefix("s3://").partition("/")
    key = f"{prefix}/{STAGE}/{FINGERPRINT}/manifest.json".lstrip("/")
    client = boto3.client("s3")
    body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    client.put_object(Bucket=bucket, Key=key, Body=body, Metadata={} if attempt is None else {"attempt": attempt})
    with pytest.raises(ArtifactError, match="holds no files"):
        ArtifactStore(storage, tmp_path / "fresh").find(STAGE, FINGERPRINT)


def test_no_reader_goes_around_the_check() -> None:
    root = Path(__file__).parents[3]
    for path in [*(root / "crane_core").rglob("*.py"), *(root / "jobs").rglob("*.py")]:
        text = path.read_text()
        if path.name != "tensors.py":
            assert not re.search(r"\bload_file\b", text), f"{path}: read with crane_core.storage.tensors"
        for word in (
            "pickle.load",
            "torch.load(",
            "yaml.load(",
            "yaml.unsafe",
            "extractall",
            "allow_pickle=True",
            "eval(",
        ):
            assert word not in text.replace(".eval()", ""), f"{path}: {word}"


@pytest.mark.parametrize("shape", ["(2684354560,)", "(99999999999, 99999999999)", "(-4,)"])
def test_a_matrix_that_declares_more_than_it_holds(tmp_path: Path, shape: str) -> None:
    path = tmp_path / "matrix.npy"
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(900))
    with pytest.raises(ArtifactError, match="no matrix that can be mapped"):
        open_matrix(path)


def test_a_matrix_of_python_objects(tmp_path: Path) -> None:
    path = tmp_path / "matrix.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ArtifactError, match="no matrix"):
        open_matrix(path)


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Replace a file of a model and its checksum, as an attacker with access to the registry's files can."""
    (folder / name).write_bytes(data)
    checksums = json.loads((folder / CHECKSUMS).read_text())
    checksums[name] = entry_of(folder / name)
    (folder / CHECKSUMS).write_text(json.dumps(checksums))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("embeddings.safetensors", HOSTILE_TENSORS["ten gigabytes in one kilobyte"]),
        ("embeddings.safetensors", header()),
        ("seen.safetensors", header()),
        ("popularity.safetensors", header()),
        ("model.json", b"[]"),
        ("model.json", b'{"format": 1}'),
        ("model.json", b'{"format": 1, "num_users": 1e400, "num_items": 1, "num_seen": 1}'),
        ("model.json", b"[" * 100_000),
    ],
)
def test_a_model_with_hostile_content(tmp_path: Path, name: str, data: bytes) -> None:
    folder = write(tmp_path / "model")
    rewrite(folder, name, data)
    with pytest.raises(ArtifactError, match="refused"):
        load_model(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda checksums: checksums.update({"../outside": checksums["model.json"]}),
        lambda checksums: checksums["model.json"].update(sha256="0" * 64),
        lambda checksums: checksums["model.json"].pop("bytes"),
        lambda checksums: checksums.pop("users.parquet"),
    ],
)
def test_a_model_with_hostile_checksums(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    folder = write(tmp_path / "model")
    checksums = json.loads((folder / CHECKSUMS).read_text())
    change(checksums)
    (folder / CHECKSUMS).write_text(json.dumps(checksums))
    with pytest.raises(ArtifactError, match="refused"):
        load_model(folder)


def test_a_model_with_a_link(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    (folder / "users.parquet").rename(tmp_path / "users.parquet")
    (folder / "users.parquet").symlink_to(tmp_path / "users.parquet")
    with pytest.raises(ArtifactError, match=r"users\.parquet is a link"):
        load_model(folder)


SECRETS = {"AWS_SECRET_ACCESS_KEY": "planted-aws-secret", "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-secret"}

URI = "postgresql://crane:planted-in-uri@127.0.0.1:1/mlflow"


def test_secrets_are_left_out_of_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    try:
        raise RuntimeError(f"cannot connect to {URI} with planted-aws-secret")
    except RuntimeError:
        record = logging.LogRecord(
            "x", logging.ERROR, "x.py", 1, "uri=%s key=%s", (URI, "planted-mlflow-secret"), sys.exc_info()
        )
    text = Redacting("%(message)s").format(record)
    assert "planted" not in text
    assert "postgresql://crane:***@127.0.0.1:1/mlflow" in text
    assert redacted("s3://bucket/a:b@c http://host:80/x@y") == "s3://bucket/a:b@c http://host:80/x@y"


@pytest.mark.parametrize(
    "command",
    [
        ["jobs.plan", "--store", "{store}", "--run", "r", "--set", f"runtime.registyr={URI}"],
        ["jobs.plan", "--store", URI, "--run", "r"],
        ["jobs.cli", "run", "--json", "--store", "{store}", "--set", f"runtime.registyr={URI}"],
    ],
)
def test_a_planted_secret_reaches_no_output(tmp_path: Path, command: list[str]) -> None:
    argv = [part.replace("{store}", str(tmp_path / "store")) for part in command]
    ended = subprocess.run(
        [sys.executable, "-m", *argv], env=os.environ | SECRETS, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == EXIT_CONFIG
    assert "127.0.0.1:1/mlflow" in ended.stdout + ended.stderr, "the message still says which URI"
    assert "planted" not in ended.stdout + ended.stderr
    written = [path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("planted" in text for text in written)


def test_every_refusal_is_of_the_pipelines_own_kind() -> None:
    assert issubclass(ArtifactError, CraneError)
