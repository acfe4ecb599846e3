"""Logs and exports for the live score: literal rows as `etl.interactions` and `ml.export` leave them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crane_core.schema import TEST, TRAIN
from crane_core.storage.artifacts import Artifact

Event = tuple[str, str, datetime]


def artifact_of(folder: Path, facts: Mapping[str, Any], fingerprint: str = "f") -> Artifact:
    """Return a folder as an artifact."""
    files = {path.relative_to(folder).as_posix(): {} for path in folder.rglob("*") if path.is_file()}
    return Artifact(folder, {"facts": dict(facts), "files": files, "fingerprint": fingerprint, "content": fingerprint})


def write_source(
    folder: Path, events: Sequence[Event], trained_until: datetime, weights: Sequence[float] = ()
) -> dict[str, Any]:
    """Write what the ETL leaves of distinct pairs: users and items with an event before an instant have numbers.

    Returns:
        The facts of the artifact.
    """
    users, items = (sorted({event[side] for event in events if event[2] < trained_until}) for side in (0, 1))
    rows = [
        {
            "user_id": user,
            "item_id": item,
            "event_time": time,
            "weight": weight,
            "split": TRAIN if time < trained_until else TEST,
            "user_idx": users.index(user) if user in users else None,
            "item_idx": items.index(item) if item in items else None,
        }
        for (user, item, time), weight in zip(events, weights or [1.0] * len(events), strict=True)
    ]
    known = [row for row in rows if row["user_idx"] is not None and row["item_idx"] is not None]
    cold = [row | {"reason": "unknown_item"} for row in rows if row["user_idx"] is None or row["item_idx"] is None]
    types = {
        "user_id": pa.string(),
        "item_id": pa.string(),
        "event_time": pa.timestamp("us", tz="UTC"),
        "weight": pa.float32(),
        "split": pa.int8(),
        "user_idx": pa.int32(),
        "item_idx": pa.int32(),
    }
    own = {name: kind for name, kind in types.items() if not name.endswith("_id")}
    _write(folder / "interactions", known, own)
    _write(folder / "cold", cold, types | {"reason": pa.string()})
    _write(folder / "users", [{"user_idx": n, "user_id": user} for n, user in enumerate(users)], types)
    _write(folder / "items", [{"item_idx": n, "item_id": item} for n, item in enumerate(items)], types)
    return {
        "num_users": len(users),
        "num_items": len(items),
        "cutoffs": {"validation": trained_until.isoformat(), "end": max(event[2] for event in events).isoformat()},
    }


def write_exported(folder: Path, lists: Mapping[str, Sequence[str]], popular: Sequence[str]) -> None:
    """Write the lists of an export: those of its users, and the one for all others."""
    rows = [
        {"user_id": user, "rank": place, "item_id": item}
        for user, items in lists.items()
        for place, item in enumerate(items, 1)
    ]
    _write(folder / "recommendations", rows, {"user_id": pa.string(), "rank": pa.int32(), "item_id": pa.string()})
    ranks = pa.array(range(1, len(popular) + 1), pa.int32())
    pq.write_table(pa.table({"rank": ranks, "item_id": pa.array(popular, pa.string())}), folder / "popular.parquet")


def _write(folder: Path, rows: Sequence[Mapping[str, Any]], types: Mapping[str, pa.DataType]) -> None:
    folder.mkdir(parents=True)
    names = [name for name in types if not rows or name in rows[0]]
    columns = {name: pa.array([row[name] for row in rows], types[name]) for name in names}
    pq.write_table(pa.table(columns), folder / "part-0.parquet")
