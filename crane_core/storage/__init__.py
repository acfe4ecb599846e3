"""Storage of bytes: one interface over a local directory and an S3 bucket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from crane_core.errors import ConfigError


class Storage(Protocol):
    """Bytes by key, a relative POSIX path. Every write is atomic: a reader sees all of it or nothing."""

    uri: str

    def read(self, key: str) -> bytes | None:
        """Return the bytes at `key`, or None."""

    def write(self, key: str, data: bytes) -> None:
        """Write or replace `key`."""

    def create(self, key: str, data: bytes) -> bool:
        """Write `key` only if it does not exist; return whether it was written."""

    def names(self, prefix: str) -> list[str]:
        """List the names directly below the folder `prefix`, sorted."""

    def publish(self, folder: Path, key: str) -> bool:
        """Move the local `folder`, manifest included, to `key` in one step; return False if `key` exists already."""

    def fetch(self, key: str, cache: Path) -> Path:
        """Return a local folder with the files of the published folder `key`."""

    def delete(self, key: str) -> None:
        """Remove the bytes at `key`, if there are any."""

    def size(self, key: str) -> int:
        """Return the bytes of everything below the folder `key`."""

    def withdraw(self, key: str) -> list[str]:
        """Make the folder `key` absent at once; return what `discard` has to remove of it."""

    def leftovers(self, prefix: str) -> dict[str, list[str]]:
        """Return what killed processes have left below the folder `prefix`: name of a folder to what to discard."""

    def discard(self, rest: Sequence[str]) -> None:
        """Remove what is left of withdrawn folders."""


def open_storage(uri: str) -> Storage:
    """Open a local directory (a path or `file://`) or `s3://bucket/prefix`.

    Raises:
        ConfigError: the scheme is another one.
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
