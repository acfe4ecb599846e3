"""The scratch folder of a store."""

from __future__ import annotations

from pathlib import Path

from jobs.stores import scratch


def test_scratch_is_local_and_apart_for_every_store(tmp_path: Path) -> None:
    assert scratch(str(tmp_path)) == tmp_path / ".scratch"
    remote = scratch("s3://bucket/a"), scratch("s3://bucket/b")
    assert remote[0] != remote[1] and all(path.is_absolute() and ".." not in path.parts for path in remote)
