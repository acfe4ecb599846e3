"""Run the parts of the GPU bench one after the other, each in a process of its own with a time limit."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from crane_core.config import Runtime
from crane_core.refine import kernels
from jobs.ml.device import use_device
from tests.bench.gpu.plan import Plan, Row, compared

LEAST = 5.0
"""Seconds that a part is still begun with."""
Method = Literal["fork", "spawn"]
"""How the process of a part starts. A fork need not import torch again, which takes seconds. But CUDA works in it only
if nothing has touched CUDA in the process that forks."""


@dataclass(frozen=True)
class Part:
    """A part of the bench.

    Attributes:
        name: of the part.
        seconds: after which it is killed.
        run: yields its rows.
        fills: whether new memory is filled with NaN, so that what is not written shows; not where speed is measured.
    """

    name: str
    seconds: float
    run: Callable[[Plan], Iterator[Row]]
    fills: bool = False


@dataclass(frozen=True)
class Settings:
    """What all parts of a run share: see `Plan`. `device` is `cpu`, for a rehearsal, or `cuda`."""

    device: str
    seed: int
    work: Path

    @property
    def patience(self) -> int:
        """Factor of the time limits: how fast a processor is that others use too is not what a rehearsal tests."""
        return 10 if self.device == "cpu" else 1


def run_part(
    part: Part, settings: Settings, seconds: float, ceilings: dict[str, float], method: Method = "fork"
) -> dict[str, Any]:
    """Run a part in a process of its own; what it has yielded stays, however it ends.

    A process of its own, because an illegal access leaves a CUDA context unusable.

    Args:
        part: to run.
        settings: of the run.
        seconds: after which it is killed.
        ceilings: as in `Plan`.
        method: how the process starts.

    Returns:
        `name`, `status` (`ok`, `wrong`, `failed`, `timed out`), `seconds` and `rows`.
    """
    file = settings.work / f"{part.name}.jsonl"
    file.unlink(missing_ok=True)
    started = time.monotonic()
    child = multiprocessing.get_context(method).Process(target=_child, args=(part, settings, seconds, ceilings, file))
    child.start()
    child.join(seconds)
    status = "ok" if child.exitcode == 0 else "failed"
    if child.is_alive():
        status = "timed out"
        assert child.pid is not None
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if status == "ok" and not all(row.get("passed", True) for row in rows):
        status = "wrong"
    return {"name": part.name, "status": status, "seconds": round(time.monotonic() - started, 1), "rows": rows}


def _child(part: Part, settings: Settings, seconds: float, ceilings: dict[str, float], file: Path) -> None:
    os.setsid()
    rehearsal = settings.device == "cpu"
    device = use_device(Runtime(device=settings.device))
    torch.utils.deterministic.fill_uninitialized_memory = part.fills
    if rehearsal:
        kernels.GPU_TYPES = {"cuda", "cpu"}
        torch.use_deterministic_algorithms(True)
    plan = Plan(device, rehearsal, settings.seed, settings.work, seconds, ceilings)
    with file.open("w") as rows:
        try:
            for row in part.run(plan):
                print(json.dumps(row), file=rows, flush=True)
                print(f"{part.name}: {json.dumps(row)}", file=sys.stderr, flush=True)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os._exit(0)


def run_all(
    parts: list[Part], settings: Settings, seconds: float, done: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Run the parts in their order until the time is up.

    Args:
        parts: in order of worth.
        settings: of the run.
        seconds: for all parts together.
        done: called with the results so far after each part, before the next one begins.

    Returns:
        The results; the first are those of `START`.
    """
    ends, ceilings = time.monotonic() + settings.patience * seconds, {}
    # Imports what it needs once, for all forks.
    torch.use_deterministic_algorithms(True)
    method: Method = "fork"
    results = [run_part(START, settings, settings.patience * START.seconds, {}, method)]
    if results[0]["status"] != "ok":
        method = "spawn"
        results.append(run_part(START, settings, settings.patience * START.seconds, {}, method))
    for part in parts if results[-1]["status"] == "ok" else ():
        left = min(settings.patience * part.seconds, ends - time.monotonic())
        if left < LEAST:
            result: dict[str, Any] = {"name": part.name, "status": "no time left", "seconds": 0.0, "rows": []}
        else:
            result = run_part(part, settings, left, ceilings, method)
        results.append(result)
        ceilings |= {row["ceiling"]: row["rate"] for row in result["rows"] if "ceiling" in row}
        done(results)
    done(results)
    return results


def _start(plan: Plan) -> Iterator[Row]:
    numbers = torch.arange(1000, device=plan.device)
    yield compared("a sum on the device", abs(int(numbers.sum()) - 499_500), 0)


START = Part("start", 40, _start)
"""Shows whether a process that is started like this reaches the device."""
