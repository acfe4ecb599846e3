"""Where bytes live: one small interface over a local directory and an S3 bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from crane_core.errors import ConfigError


class Storage(Protocol):
    """Keys are relative POSIX paths. Every write is atomic: a reader sees all of it or nothing."""

    uri: str

    def read(self, key: str) -> bytes | None:
        """The bytes at `key`, None when there are none."""

    def write(self, key: str, data: bytes) -> None:
        """Write or replace `key`."""

    def create(self, key: str, data: bytes) -> bool:
        """Write `key` only if it does not exist; False when somebody else was first."""

    def names(self, prefix: str) -> list[str]:
        """Names directly below the folder `prefix`, sorted."""

    def publish(self, folder: Path, key: str) -> bool:
        """Make the complete local `folder`, manifest included, appear at `key`; False when one is there."""

    def fetch(self, key: str, cache: Path) -> Path:
        """A local folder with the files of the published folder `key`."""


def open_storage(uri: str) -> Storage:
    """Open a local directory (a path or `file://`) or `s3://bucket/prefix`.

    Raises:
        ConfigError: any other scheme.
    """
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        from crane_core.storage.local import LocalStorage

        return LocalStorage(Path(parts.path if parts.scheme else uri))
    if parts.scheme == "s3":
        from crane_core.storage.s3 import S3Storage

        return S3Storage(parts.netloc, parts.path.strip("/"))
    raise ConfigError(
        f"Store {uri!r} has the unknown scheme {parts.scheme!r}.", "Give --store a path or s3://bucket/prefix."
    )
