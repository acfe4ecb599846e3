"""The command `crane plan`: memory, storage and seconds of a run of a given size."""

from __future__ import annotations

import argparse
from typing import Any

from crane_core.capacity import Size, beyond_measured, estimate, recommend


def modality(text: str) -> tuple[str, int]:
    """Read `name:width`, the value of a flag."""
    name, sign, width = text.rpartition(":")
    if not sign or not name or not width.isdigit() or int(width) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not name:width, for example text:384")
    return name, int(width)


def plan(users: int, items: int, interactions: int, modalities: list[tuple[str, int]]) -> dict[str, Any]:
    """Estimate memory, storage and seconds of every stage, and recommend a preset.

    Raises:
        ConfigError: a number below 1.
    """
    size = Size(users, items, interactions, tuple(width for _, width in modalities))
    stages = estimate(size)
    return {
        "users": users,
        "items": items,
        "interactions": interactions,
        "modalities": dict(modalities),
        "stages": stages,
        "peak_memory_bytes": max(stage["memory_bytes"] for stage in stages.values()),
        "storage_bytes": sum(stage["storage_bytes"] for stage in stages.values()),
        "recommended": recommend(size, stages),
        "gpu_seconds": None,
        "beyond_measured": round(beyond_measured(size), 1),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the estimate as lines of text."""
    head = f"{'stage':<18} {'memory':>10} {'storage':>10} {'core-seconds':>22}"
    rows = [head]
    for name, stage in found["stages"].items():
        seconds = stage["epoch_core_seconds"]
        spent = "" if seconds is None else f"{seconds:,.0f} an epoch"
        rows.append(f"{name:<18} {amount(stage['memory_bytes']):>10} {amount(stage['storage_bytes']):>10} {spent:>22}")
    rows += [
        "",
        f"storage of a run   {amount(found['storage_bytes'])}, as much again for its refit run",
    ]
    choice = found["recommended"]
    settings = " ".join(f"--set {name}={value}" for name, value in choice["settings"].items())
    rows += [
        f"recommended        --config {choice['preset']} {settings}",
        f"cluster            overlay {choice['overlay']}, memory of {choice['gpus_by_memory']} GPU(s) of 40 GB or more",
        "GPU seconds        not measured",
        f"extrapolated       {found['beyond_measured']:g} times the largest run that was measured",
        "",
        "Bytes, by formulas with measured factors (crane_core/capacity.json says on which runs):",
    ]
    for name, stage in found["stages"].items():
        rows += [
            f"  {name}  memory = {stage['memory_formula']}",
            f"  {'':<{len(name)}}  storage = {stage['storage_formula']}",
        ]
    return rows


def amount(count: float) -> str:
    """Return a number of bytes with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
