"""Checkpoints: whole, on the disk, and refused when damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # Adam imports it at its first use: here, before the processes that are killed are forked.

from crane_core.errors import ArtifactError
from crane_core.model.sharding import Shards
from crane_core.training.checkpoint import Checkpoint, Checkpoints
from tests.worlds.trainings import trainer

SIZES = (7, 5)


@pytest.mark.parametrize("file", ["checkpoint.json", "rank-0.safetensors", "replicated.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_refused_with_a_remedy(file: str, damage: str, tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    ours.checkpoint()
    (path,) = tmp_path.rglob(file)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5])
    else:
        path.unlink()
    if file == "checkpoint.json" and damage == "gone":
        assert ours.checkpoints.read() is None
        return
    with pytest.raises(ArtifactError, match=r"is damaged|is refused"):
        trainer(tmp_path).run()


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint({"ids": torch.full((12, 2), number)}, {"bias": torch.zeros(1)}, {"number": number})


def test_a_checkpoint_counts_when_it_is_whole_and_replaces_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, Shards(SIZES))
    assert checkpoints.read() is None
    checkpoints.write("1", checkpoint(1))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="torn"):
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("torn")))
        checkpoints.write("2", checkpoint(2))
    found = checkpoints.read()
    assert found is not None and found.state == {"number": 1} and bool((found.sharded["ids"] == 1).all())
    checkpoints.write("2", checkpoint(3))
    found = checkpoints.read()
    assert found is not None and found.state == {"number": 3} and bool((found.sharded["ids"] == 3).all())
    assert [path.name for path in sorted(tmp_path.glob("checkpoint*"))] == ["checkpoint-2", "checkpoint.json"]


def test_a_checkpoint_is_on_the_disk_before_it_counts_and_counts_before_another_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, done = Checkpoints(tmp_path, Shards(SIZES)), []
    checkpoints.write("1", checkpoint(1))
    calls = {"sync": os.fsync, "name": Path.replace, "remove": shutil.rmtree}

    def recorded(name: str) -> Callable[..., Any]:
        def call(what: Any, *rest: Any) -> Any:
            path = Path(f"/proc/self/fd/{what}").readlink() if isinstance(what, int) else what
            done.append((name, path.name.lstrip(".")))
            return calls[name](what, *rest)

        return call

    monkeypatch.setattr(os, "fsync", recorded("sync"))
    monkeypatch.setattr(Path, "replace", recorded("name"))
    monkeypatch.setattr(shutil, "rmtree", recorded("remove"))
    checkpoints.write("2", checkpoint(2))
    files = ["rank-0.safetensors", "replicated.safetensors"]
    parts = [step for file in files for step in (("sync", file), ("name", file), ("sync", "checkpoint-2"))]
    pointer = [("sync", "checkpoint.json"), ("name", "checkpoint.json"), ("sync", tmp_path.name)]
    assert done == [*parts, *pointer, ("remove", "checkpoint-1")]


def test_a_checkpoint_of_other_rows_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path, Shards(SIZES)).write("1", checkpoint(1))
    with pytest.raises(ArtifactError, match=r"\[7, 5\] rows, expected 2 and \[7, 6\]"):
        Checkpoints(tmp_path, Shards((7, 6))).read()
    pointer = json.loads((tmp_path / "checkpoint.json").read_text())
    (tmp_path / "checkpoint.json").write_text(json.dumps(pointer | {"format": 1}))
    with pytest.raises(ArtifactError, match="format 1"):
        Checkpoints(tmp_path, Shards(SIZES)).read()
