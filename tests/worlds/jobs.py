"""A stage that writes a line, run as its job runs it, over the smallest raw data."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest

from jobs.runner import Job, Result
from tests.worlds.raw_data import write_items, write_log, write_vectors

WINDOW = ["--set", "window.start=2026-01-05", "--set", "window.end=2026-01-06"]


@functools.cache
def _raw() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="crane-raw-")
    write_raw(Path(folder.name))
    return folder


def write_raw(raw: Path) -> None:
    """Write one interaction, one item and one vector."""
    write_log(raw, [("u", "i", "2026-01-05 10:00")])
    write_items(raw, [("i", "Item")])
    write_vectors(raw, "text", [("i", [1.0, 2.0])])


def flags(store: Path | str, *more: str, run: str = "r") -> list[str]:
    """Return the flags of a job over these raw data."""
    return ["--store", str(store), "--run", run, *WINDOW, "--set", f"runtime.raw={_raw().name}", *more]


def write_rows(job: Job) -> Result:
    """Leave a file, as a stage does."""
    (job.out / "rows.txt").write_text("rows")
    return Result({"n": 1})


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    """Return what the job printed last on stdout."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])
