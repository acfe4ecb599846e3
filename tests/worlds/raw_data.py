"""Write raw data by hand: literal rows in the layout of `crane_core.schema`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crane_core.config import Window
from crane_core.schema import FEATURES, INTERACTIONS, ITEMS


def at(text: str) -> datetime:
    """`2026-01-05` or `2026-01-05 13:30` as an instant in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def write_day(
    raw: Path, day: str, rows: Sequence[Sequence[Any]], schema: pa.Schema = INTERACTIONS, name: str = "part-0.parquet"
) -> Path:
    """Write one file of the partition `day`; a row is (user, item, event time, weight, label) or a start of it."""
    width = len(schema)
    padded = [tuple(row[:width]) + (None,) * (width - len(row)) for row in rows]
    loose = pa.schema([pa.field(field.name, field.type) for field in schema])
    columns = [pa.array([row[index] for row in padded], field.type) for index, field in enumerate(loose)]
    table = pa.Table.from_arrays(columns, schema=loose)
    path = raw / "interactions" / f"dt={day}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def write_log(raw: Path, events: Sequence[tuple[str, str, str]]) -> None:
    """Write (user, item, time) events, each into the partition of its own day."""
    days: dict[str, list[tuple[Any, ...]]] = {}
    for user, item, time in events:
        days.setdefault(time[:10], []).append((user, item, at(time)))
    for day, rows in days.items():
        write_day(raw, day, rows)


def write_items(raw: Path, rows: Sequence[tuple[str | None, str | None]]) -> Path:
    """Write the catalog: (item, title)."""
    schema = pa.schema([pa.field(field.name, field.type) for field in ITEMS])
    return _write(raw / "items" / "part-0.parquet", [list(column) for column in zip(*rows, strict=True)], schema)


def write_vectors(
    raw: Path, modality: str, rows: Sequence[tuple[str | None, list[float] | None]], kind: pa.DataType | None = None
) -> Path:
    """Write one modality: (item, vector)."""
    types = [FEATURES.field(0).type, kind or FEATURES.field(1).type]
    schema = pa.schema([pa.field(name, type_) for name, type_ in zip(FEATURES.names, types, strict=True)])
    path = raw / "features" / modality / "part-0.parquet"
    return _write(path, [list(column) for column in zip(*rows, strict=True)], schema)


def _write(path: Path, columns: list[list[Any]], schema: pa.Schema) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)
    return path


def window(start: str, end: str) -> Window:
    """Return the window between two instants, ISO 8601."""
    return Window.model_validate({"start": start, "end": end})


def write_four_days(raw: Path) -> Path:
    """Write one event into each of the partitions of 3 to 6 January 2026."""
    for day in ("2026-01-03", "2026-01-04", "2026-01-05", "2026-01-06"):
        write_day(raw, day, [("a", "x", at(day))])
    return raw
