"""Rows over ranks: cut, gathered, added up, and read by another number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crane_core.errors import ArtifactError, ConfigError
from crane_core.model.sharding import Shards
from crane_core.training.checkpoint import Checkpoint, Checkpoints
from tests.worlds.processes import on_ranks

SIZES = (7, 5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_row_has_one_keeper_and_shards_differ_by_one_row_of_a_kind(world_size: int) -> None:
    shards = [Shards(SIZES, rank, world_size) for rank in range(world_size)]
    rows, nodes = torch.arange(12), torch.tensor([11, 0, 3, 3, 7])
    kept = [each.local(rows) for each in shards]
    assert sorted(torch.cat(kept).tolist()) == rows.tolist()
    assert [len(each) for each in kept] == [each.num_local for each in shards]
    for kind in (0, 1):
        sizes = [each.parts()[kind].stop - each.parts()[kind].start for each in shards]
        assert max(sizes) - min(sizes) <= 1
    found = torch.cat([local[each.own(nodes)] for each, local in zip(shards, kept, strict=True)])
    assert sorted(found.tolist()) == sorted(nodes.tolist())


def test_more_ranks_than_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"6 ranks cannot share 7 and 5 rows.*world_size to 5 or less"):
        Shards(SIZES, 0, 6)


def _meet(rank: int, world_size: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{world_size}", rank=rank, world_size=world_size
    )
    shards, rows = Shards(SIZES, rank, world_size), torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    collected = shards.collect(shards.local(rows))
    assert torch.equal(collected, rows)
    counts = shards.collect(shards.local(torch.arange(12)))
    assert counts.tolist() == list(range(12))
    summed = shards.add_up(rows * (rank + 1))
    torch.testing.assert_close(summed, shards.local(rows) * sum(range(1, world_size + 1)))
    state = {"step": world_size}
    # The others are late: nothing counts before they have written their rows.
    time.sleep(0.5 if rank else 0)
    Checkpoints(Path(folder), shards).write("1", Checkpoint({"ids": shards.local(rows)}, {"bias": rows[:2]}, state))
    if rank == 0:
        assert len(list(Path(folder, "checkpoint-1").glob("rank-*"))) >= world_size
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_rows_meet_and_are_read_by_any_number_of_ranks(tmp_path: Path) -> None:
    world_size = 4
    on_ranks(_meet, world_size, world_size, str(tmp_path))
    rows = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    for readers in (1, 3, world_size):
        for rank in range(readers):
            shards = Shards(SIZES, rank, readers)
            found = Checkpoints(tmp_path, shards).read()
            assert found is not None
            assert torch.equal(found.sharded["ids"], shards.local(rows))
            assert torch.equal(found.replicated["bias"], rows[:2])
            assert found.state == {"step": world_size}


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
