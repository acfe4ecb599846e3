"""An S3 bucket as storage. No other module imports boto3."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from crane_core.errors import ArtifactError

MANIFEST = "manifest.json"
PER_REQUEST = 1000
"""Most objects that one request removes."""
RETRIES = Config(retries={"max_attempts": 8, "mode": "standard"})


class S3Storage:
    """Storage in a bucket; conditional puts (`If-None-Match`) make creation atomic.

    A folder is published in two steps: its files as objects under `{key}/.data/{attempt}/`, then its manifest. From
    then on it exists. The metadata of the manifest object names the attempt that it belongs to.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client = boto3.client("s3", config=RETRIES)

    def read(self, key: str) -> bytes | None:
        try:
            return self._client.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"].read()
        except ClientError as error:
            if _code(error) in ("NoSuchKey", "404"):
                return None
            raise

    def write(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data)

    def create(self, key: str, data: bytes, metadata: dict[str, str] | None = None) -> bool:
        try:
            self._client.put_object(
                Bucket=self.bucket, Key=self.prefix + key, Body=data, IfNoneMatch="*", Metadata=metadata or {}
            )
        except ClientError as error:
            if _code(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                return False
            raise
        return True

    def names(self, prefix: str) -> list[str]:
        folder = f"{self.prefix}{prefix.strip('/')}/"
        found = set()
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder, Delimiter="/")
        for page in pages:
            found |= {item["Prefix"][len(folder) : -1] for item in page.get("CommonPrefixes", [])}
            found |= {item["Key"][len(folder) :] for item in page.get("Contents", [])}
        return sorted(name for name in found if name and not name.startswith("."))

    def publish(self, folder: Path, key: str) -> bool:
        attempt = uuid.uuid4().hex
        data = f"{self.prefix}{key}/.data/{attempt}/"
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._client.upload_file(str(path), self.bucket, data + path.relative_to(folder).as_posix())
        manifest = (folder / MANIFEST).read_bytes()
        won = self.create(f"{key}/{MANIFEST}", manifest, {"attempt": attempt})
        if not won:
            for item in self._objects(data):
                self._client.delete_object(Bucket=self.bucket, Key=item)
        shutil.rmtree(folder)
        return won

    def fetch(self, key: str, cache: Path) -> Path:
        target = cache / key
        if (target / MANIFEST).exists():
            # `jobs.tidy` removes the copies that were not used for some time.
            os.utime(target)
            return target
        head = self._client.head_object(Bucket=self.bucket, Key=f"{self.prefix}{key}/{MANIFEST}")
        attempt = head["Metadata"].get("attempt", "")
        data = f"{self.prefix}{key}/.data/{attempt}/"
        items = self._objects(data) if attempt.isalnum() else []
        # A key may be any text. One with ".." in it could be written anywhere on this machine.
        if not items or any({"", ".", ".."} & set(item[len(data) :].split("/")) for item in items):
            raise ArtifactError(
                f"{self.uri}/{key} holds no files of its manifest, or some whose names lead out of it.",
                f"Remove {self.uri}/{key} and run its stage again.",
            )
        hidden = target.parent / f".{target.name}.{uuid.uuid4().hex}"
        for item in items:
            path = hidden / item[len(data) :]
            path.parent.mkdir(parents=True, exist_ok=True)
            self._client.download_file(self.bucket, item, str(path))
        try:
            hidden.rename(target)
        except OSError:
            if not (target / MANIFEST).exists():
                raise
            shutil.rmtree(hidden)
        return target

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self.bucket, Key=self.prefix + key)

    def size(self, key: str) -> int:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=f"{self.prefix}{key}/"
        )
        return sum(item["Size"] for page in pages for item in page.get("Contents", []))

    def withdraw(self, key: str) -> list[str]:
        items = self._objects(f"{self.prefix}{key}/")
        manifest = f"{self.prefix}{key}/{MANIFEST}"
        if manifest in items:
            self._client.delete_object(Bucket=self.bucket, Key=manifest)
        rest = [item for item in items if item != manifest]
        if any(f"{self.prefix}{key}/.data/" in item for item in rest):
            return rest
        # The few objects of a run record go in one request.
        self.discard(rest)
        return []

    def leftovers(self, prefix: str) -> dict[str, list[str]]:
        # A folder without a manifest is listed by `names`, and `withdraw` finds what is left of it.
        return {}

    def discard(self, rest: Sequence[str]) -> None:
        for start in range(0, len(rest), PER_REQUEST):
            objects = [{"Key": key} for key in rest[start : start + PER_REQUEST]]
            answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
            for failed in answer.get("Errors", []):
                raise ArtifactError(
                    f"s3://{self.bucket}/{failed['Key']} cannot be removed ({failed.get('Code')}).",
                    "Allow s3:DeleteObject on the bucket, then run crane prune again.",
                )

    def _objects(self, prefix: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]


def _code(error: ClientError) -> str:
    return error.response["Error"]["Code"]
