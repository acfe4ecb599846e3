"""What a part of the GPU bench gets, and the rows that it yields."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from crane_core.refine import kernels
from tests.bench.device import measure, wait_for

Row = dict[str, Any]
"""A line of the result: `what`, and the fields of `compared`, `timed` or `skipped`; JSON values."""
Size = TypeVar("Size")


@dataclass(frozen=True)
class Plan:
    """The device and the means of a part.

    Attributes:
        device: of the part.
        rehearsal: everything is small, on a CPU.
        seed: of the random inputs, new in every run.
        work: folder that all parts share.
        seconds: after which the part is killed.
        ceilings: what the part `ceilings` measured: flop/s of a product by number type, and `bandwidth` in bytes/s.
    """

    device: torch.device
    rehearsal: bool
    seed: int
    work: Path
    seconds: float
    ceilings: dict[str, float]
    started: float = field(default_factory=time.monotonic)

    def pick(self, real: Size, toy: Size) -> Size:
        """Return the size on a GPU or the one of a rehearsal."""
        return toy if self.rehearsal else real

    def left(self) -> float:
        """Return the seconds that are left to the part."""
        return self.seconds - (time.monotonic() - self.started)

    def generator(self, salt: int = 0) -> torch.Generator:
        """Return a generator on the CPU."""
        return torch.Generator().manual_seed(self.seed + salt)

    def normal(self, salt: int, *shape: int) -> Tensor:
        """Draw normal rows on the CPU, float32."""
        return torch.randn(*shape, generator=self.generator(salt))

    def leaf(self, rows: Tensor) -> Tensor:
        """Return a copy of the rows on the device, with a gradient of its own."""
        return rows.detach().clone().to(self.device).requires_grad_()

    def floor(self, flop: float, number_type: str, num_bytes: float) -> dict[str, Any]:
        """Return the least seconds for some operations and some bytes, by the ceilings of this run."""
        if not self.ceilings:
            return {"floor_seconds": None, "floor_of": "not measured"}
        times = {f"{number_type} flop": flop / self.ceilings[number_type]}
        times["bytes"] = num_bytes / self.ceilings["bandwidth"]
        largest = max(times, key=lambda name: times[name])
        return {"floor_seconds": times[largest], "floor_of": largest}


@contextmanager
def plain_cpu() -> Iterator[None]:
    """Let tensors on the CPU take the kernels for CPUs, also in a rehearsal."""
    types, kernels.GPU_TYPES = kernels.GPU_TYPES, {"cuda"}
    try:
        yield
    finally:
        kernels.GPU_TYPES = types


def distance(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """Return the norm of the difference over that of what is expected, at least `least`; NaN where one is NaN."""
    exact = expected.detach().cpu().double()
    return float((found.detach().cpu().double() - exact).norm() / max(float(exact.norm()), least, 1e-300))


def compared(what: str, error: float, limit: float, **more: Any) -> Row:
    """Return the row of a comparison; NaN does not pass."""
    return {"what": what, "error": error, "limit": limit, "passed": bool(error <= limit), **more}


def worst(errors: dict[str, float]) -> tuple[str, float]:
    """Return the largest error and its name; NaN is larger than all others."""
    return max(errors.items(), key=lambda item: (item[1] != item[1], item[1]))


def timed(what: str, seconds: float, floor: dict[str, Any], peak: int | None = None, **more: Any) -> Row:
    """Return the row of a measured time."""
    least = floor["floor_seconds"]
    times = seconds / least if least else None
    return {"what": what, "seconds": seconds, **floor, "times_floor": times, "peak_bytes": peak, **more}


def skipped(what: str, reason: str) -> Row:
    """Return the row of what cannot run here."""
    return {"what": what, "skipped": reason}


def median_seconds(device: torch.device, compute: Callable[[], Any], repeats: int = 5) -> float:
    """Return the median seconds of a computation, after one run that does not count."""
    compute()
    wait_for(device)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        compute()
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[repeats // 2]


def once(device: torch.device, compute: Callable[[], Any]) -> tuple[float, int]:
    """Return the seconds and the peak of the memory beyond what was held before, bytes."""
    seconds, _, peak = measure(device, compute)
    return seconds, peak
