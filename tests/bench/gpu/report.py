"""The result of the GPU bench as JSON and as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.bench.gpu.plan import Row

Result = dict[str, Any]
"""`card`, `versions` and so on, and `parts`: name, status, seconds and rows of each part."""
HEAD = "| part | what | result | floor or limit | peak | |\n|---|---|---|---|---|---|"


def write(result: Result, folder: Path) -> None:
    """Write `gpu.json` and `gpu.md`, each complete or as it was before."""
    lines = [f"# One GPU: {result['card']}", "", f"{facts(result)}.", "", HEAD]
    for part in result["parts"]:
        lines += [f"| {part['name']} | {line} |" for line in map(cells, part["rows"])]
        if part["status"] != "ok":
            lines.append(f"| {part['name']} | **{part['status']}** | after {part['seconds']:.0f} s | | | |")
    for name, text in (("gpu.json", json.dumps(result, indent=1)), ("gpu.md", "\n".join(lines))):
        scratch = folder / f"{name}.part"
        scratch.write_text(text + "\n")
        scratch.replace(folder / name)


def facts(result: Result) -> str:
    """Return the circumstances of the run in a line."""
    names = ("command", "date", "driver", "versions", "seed")
    return "; ".join(f"{name}: {result[name]}" for name in names if name in result)


def cells(row: Row) -> str:
    """Return the cells of a row of the table, between the part and the end."""
    if "skipped" in row:
        return f"{row['what']} | skipped: {row['skipped']} | | |"
    if "passed" in row:
        verdict = "ok" if row["passed"] else "**WRONG**"
        where = "" if row["passed"] else row.get("worst", "")
        return f"{row['what']} | {row['error']:.1e} | {row['limit']:.0e} | | {verdict} {where}".rstrip()
    if "rate" in row:
        return f"{row['what']} | {row['rate'] / 1e12:.3g} T/s | | |"
    target = row.get("target_seconds")
    floor = "" if row["floor_seconds"] is None else f"{seconds(row['floor_seconds'])} ({row['floor_of']})"
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB"
    notes = [f"{row['times_floor']:.1f} x floor"] if row["times_floor"] else []
    if target is not None:
        notes.append(f"target {target:g} s: {'met' if row['seconds'] <= target else 'MISSED'}")
    notes += [row["note"]] if row.get("note") else []
    return f"{row['what']} | {seconds(row['seconds'])} | {floor} | {peak} | {'; '.join(notes)}"


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
