"""Shared by the benchmarks: the name of a device, its time and memory, synthetic interactions, the end of a result."""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crane_core.dataset.interactions import Interactions, ItemLists

REPEATS = 1.035
"""Pairs that are drawn for each distinct pair, about."""


def origin(bench: str, device: torch.device) -> dict[str, Any]:
    """Return the last fields of a result: the command, the device and the versions, JSON values."""
    return {
        "command": f"python -m tests.bench.{bench} " + " ".join(sys.argv[1:]),
        "device": device_name(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with torch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = lines[0].partition(":")[2].strip() if lines else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all it was asked for; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(device: torch.device, compute: Callable[[], Any]) -> tuple[float, float, int]:
    """Return seconds, processor seconds, and the peak memory in bytes beyond what was held before."""
    wait_for(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status_bytes("/proc/self/status", "VmRSS")
    started, worked = time.perf_counter(), time.process_time()
    compute()
    wait_for(device)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    if device.type == "cuda":
        return seconds, cpu_seconds, torch.cuda.max_memory_allocated(device) - before
    return seconds, cpu_seconds, status_bytes("/proc/self/status", "VmHWM") - before


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the GPU or of the machine."""
    return (
        torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else status_bytes("/proc/meminfo", "MemAvailable")
    )


def status_bytes(path: str, name: str) -> int:
    """Return a figure by its name from a file of /proc that states it in kB."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def synthetic(num_users: int, num_items: int, num_interactions: int) -> Interactions:
    """Make interactions: users of log-normal activity, items of power-law popularity, nothing held out."""
    lists = np.concatenate(list(draw(num_users, num_items, num_interactions)), axis=1)
    nothing = ItemLists.from_pairs(np.empty(0, np.int64), np.empty(0, np.int32), num_users)
    return Interactions(num_users, num_items, ItemLists.from_pairs(*lists, num_users), nothing, nothing)


def draw(num_users: int, num_items: int, num_interactions: int, block: int = 50_000) -> Iterator[np.ndarray]:
    """Yield distinct pairs of user and item, about `num_interactions` in all: int32 [2, n] for each block of users."""
    generator = np.random.default_rng(0)
    activity = generator.lognormal(0, 1, num_users)
    counts = np.maximum(1, REPEATS * activity * num_interactions / activity.sum()).astype(np.int64)
    popularity = (np.arange(num_items) + 10.0) ** -0.9
    reach, names = np.cumsum(popularity) / popularity.sum(), generator.permutation(num_items)
    for start in range(0, num_users, block):
        users = np.repeat(np.arange(start, min(start + block, num_users)), counts[start : start + block])
        places = np.searchsorted(reach, generator.random(len(users), dtype=np.float32))
        keys = np.sort(users * num_items + names[np.minimum(places, num_items - 1)])
        keys = keys[np.diff(keys, prepend=-1) > 0]
        yield np.stack([keys // num_items, keys % num_items]).astype(np.int32)
