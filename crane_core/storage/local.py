"""A directory as storage."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

ATTEMPT = re.compile(r"[0-9a-f]{32}")


class LocalStorage:
    """Storage in a directory; a rename within one file system makes writes atomic."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = str(self.root)

    def read(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        self._spool(key, data).replace(self.root / key)

    def create(self, key: str, data: bytes) -> bool:
        spooled = self._spool(key, data)
        try:
            os.link(spooled, self.root / key)
        except FileExistsError:
            return False
        finally:
            spooled.unlink()
        return True

    def names(self, prefix: str) -> list[str]:
        try:
            return sorted(entry.name for entry in (self.root / prefix).iterdir() if not entry.name.startswith("."))
        except FileNotFoundError:
            return []

    def publish(self, folder: Path, key: str) -> bool:
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in folder.rglob("*"):
            if path.is_file():
                sync(path)
        # A rename between file systems is not atomic, so the folder is first moved here under a hidden name.
        hidden = target.parent / f".{target.name}.{uuid.uuid4().hex}"
        shutil.move(folder, hidden)
        try:
            hidden.rename(target)
        except OSError as error:
            shutil.rmtree(hidden)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        sync(target.parent)
        return True

    def fetch(self, key: str, cache: Path) -> Path:
        return self.root / key

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def size(self, key: str) -> int:
        return sum(path.lstat().st_size for path in (self.root / key).rglob("*") if not path.is_dir())

    def withdraw(self, key: str) -> list[str]:
        folder = self.root / key
        hidden = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
        try:
            folder.rename(hidden)
        except FileNotFoundError:
            return []
        return [hidden.relative_to(self.root).as_posix()]

    def leftovers(self, prefix: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        folder = self.root / prefix
        for path in folder.iterdir() if folder.is_dir() else ():
            name, _, attempt = path.name.removeprefix(".").rpartition(".")
            if path.name.startswith(".") and name and ATTEMPT.fullmatch(attempt):
                found.setdefault(name, []).append(path.relative_to(self.root).as_posix())
        return found

    def discard(self, rest: Sequence[str]) -> None:
        for key in rest:
            path = self.root / key
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _spool(self, key: str, data: bytes) -> Path:
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        spooled = target.parent / f".{target.name}.{uuid.uuid4().hex}"
        try:
            spooled.write_bytes(data)
            sync(spooled)
        except OSError:
            # On a full disk, do not leave a useless file.
            spooled.unlink(missing_ok=True)
            raise
        return spooled


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
