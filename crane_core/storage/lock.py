"""A lock file: one process at a time, released by the system when the process dies."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a file, made where it is missing; wait while another process holds it.

    The file stays behind: another process may be waiting for it.

    Args:
        path: of the lock file. Its folder is made. It must not lie in a folder that the holder may remove.
        waiting: called once when another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def locked_or_refused(path: Path) -> Iterator[bool]:
    """Try to hold the lock of a file, made where it is missing.

    Args:
        path: of the lock file, as for `locked`.

    Yields:
        Whether the lock is held; False when another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
