"""Remove from the scratch folder of a store what no job has used for `runtime.scratch_days`.

It is the teardown of a retraining and runs however the run ends. The scratch folder (`jobs.stores.scratch`)
holds what only unfinished jobs need: their work, from which the next attempt goes on, what Spark leaves when it is
killed, and copies of artifacts from a remote store. Artifacts and runs are never touched.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crane_core.config import RunConfig
from crane_core.storage.artifacts import ArtifactStore
from crane_core.storage.lock import locked_or_refused
from jobs.entry_points import run_job
from jobs.stores import scratch

DAY_SECONDS = 86400.0


def tidy(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Remove the old folders; return their number and their bytes."""
    if not config.runtime.backfill:
        # What a backfill has made of old days would be removed at once; the claim lapses by itself.
        store.claims.drop(arguments.run)
    unused_since = time.time() - config.runtime.scratch_days * DAY_SECONDS
    num_removed = num_bytes = 0
    for folder in _folders(scratch(store.storage.uri), store.cache):
        # A job that ends meanwhile takes its folder away.
        with contextlib.suppress(FileNotFoundError), _unless_at_work(folder) as free:
            last_used, size = _last_used(folder) if free else (unused_since, 0)
            if last_used < unused_since:
                _remove(folder)
                num_removed, num_bytes = num_removed + 1, num_bytes + size
    return {"status": "done", "num_removed": num_removed, "bytes": num_bytes}


def _folders(base: Path, cache: Path) -> Iterator[Path]:
    """Yield the work folders of every stage and the copies of remote artifacts; no link is followed."""
    for top in (base, cache):
        for stage in top.iterdir() if top.is_dir() else ():
            if stage.is_dir() and not stage.is_symlink() and stage != cache:
                yield from (folder for folder in stage.iterdir() if folder.is_dir() and not folder.is_symlink())


def _last_used(folder: Path) -> tuple[float, int]:
    """Return when a folder was last used, in seconds since the epoch, and its size in bytes."""
    last, size = folder.stat().st_mtime, 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            last, size = max(last, found.st_mtime), size + found.st_size
    return last, size


def _remove(folder: Path) -> None:
    """Rename a folder and remove it: no job must find half a copy or half a checkpoint under its name.

    If `tidy` is killed meanwhile, a later run removes the rest.
    """
    hidden = folder.with_name(f".{folder.name.lstrip('.')}.{uuid.uuid4().hex}")
    folder.rename(hidden)
    shutil.rmtree(hidden)


@contextlib.contextmanager
def _unless_at_work(folder: Path) -> Iterator[bool]:
    """Hold the lock of the job that works in a folder; yield whether it could be had.

    The file of the lock stays: another job may wait for it.
    """
    lock = folder.parent / f"{folder.name.partition('.')[0]}.lock"
    if not lock.exists():
        yield True
        return
    with locked_or_refused(lock) as held:
        yield held


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("tidy", tidy, argv)


if __name__ == "__main__":
    raise SystemExit(main())
