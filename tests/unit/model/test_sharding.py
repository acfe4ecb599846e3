"""Rows over ranks: cut, gathered, added up, and read by another number of ranks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from crane_core.errors import ConfigError
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
