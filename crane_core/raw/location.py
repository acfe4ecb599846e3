"""Locations of raw data: a local folder or a prefix of an S3 bucket, with one interface."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs

from crane_core.errors import ConfigError, DataError

CONNECT_SECONDS = 10
REQUEST_SECONDS = 60
ATTEMPTS = 8


@dataclass(frozen=True)
class Location:
    """A file or folder on a local disk or in a bucket.

    Attributes:
        path: absolute local path, or bucket and key.
        scheme: empty for a local disk, or `s3`.
        info: Arrow's FileInfo if the location comes from a listing, else None.
    """

    path: PurePosixPath
    scheme: str = ""
    info: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def at(cls, uri: str | Path | Location) -> Location:
        """Return the location of a path, a `file://` URI or an `s3://` URI.

        Raises:
            ConfigError: the scheme is another one, or there is no bucket.
        """
        if isinstance(uri, Location):
            return uri
        parts = urlsplit(str(uri))
        if isinstance(uri, Path) or parts.scheme in ("", "file"):
            local = uri if isinstance(uri, Path) else Path(parts.path if parts.scheme else uri)
            return cls(PurePosixPath(local.absolute()))
        if parts.scheme not in ("s3", "s3a") or not parts.netloc:
            raise ConfigError(
                f"Raw data at {str(uri)!r}: expected a local path or s3://bucket/prefix.",
                "Give --set runtime.raw=FOLDER or --set runtime.raw=s3://bucket/prefix.",
            )
        return cls(PurePosixPath(parts.netloc) / parts.path.strip("/"), "s3")

    @property
    def filesystem(self) -> fs.FileSystem:
        if not self.scheme:
            return fs.LocalFileSystem()
        # Arrow reads region and credentials from the environment, but not the endpoint. The order is that of botocore.
        return s3_filesystem(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> Location:
        return Location(self.path.parent, self.scheme)

    def __truediv__(self, name: str) -> Location:
        return Location(self.path / name, self.scheme)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}" if self.scheme else str(self.path)

    def is_dir(self) -> bool:
        return self._ask(fs.FileSystem.get_file_info, str(self.path)).type == fs.FileType.Directory

    def exists(self) -> bool:
        """Return whether there is a file or folder here, a hidden one too."""
        return self._ask(fs.FileSystem.get_file_info, str(self.path)).type != fs.FileType.NotFound

    def children(self) -> list[Location]:
        """List the entries directly below, by name, without hidden ones; nothing if this is not a folder."""
        return self._list(recursive=False)

    def files(self) -> list[Location]:
        """List the files at any depth below, by name, without hidden ones and those in hidden folders."""
        return [entry for entry in self._list(recursive=True) if entry.info.is_file]

    def _list(self, recursive: bool) -> list[Location]:
        selector = fs.FileSelector(str(self.path), recursive=recursive, allow_not_found=True)
        found = [Location(PurePosixPath(info.path), self.scheme, info) for info in self._listed(selector)]
        below = len(self.path.parts)
        visible = [entry for entry in found if not any(part[0] in "._" for part in entry.path.parts[below:])]
        return sorted(visible, key=lambda entry: entry.path)

    def _listed(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        if not self.scheme and not Path(self.path).is_dir():
            return []
        return self._ask(fs.FileSystem.get_file_info, selector)

    def _ask(self, method: Any, argument: Any) -> Any:
        try:
            return method(self.filesystem, argument)
        except OSError as error:
            raise DataError(
                f"{self} cannot be listed: {error}.",
                f"Check with aws s3 ls {self}/ that it exists and may be read, then run the same command again.",
            ) from error


@cache
def s3_filesystem(endpoint: str | None) -> fs.FileSystem:
    """Connect to S3, once per process and endpoint."""
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )
