"""Write the raw folder of an import: it appears in one step and is never rewritten."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crane_core.errors import DataError
from crane_core.raw.files import DAY_PREFIX, FEATURES_FOLDER, INTERACTIONS_FOLDER, ITEMS_FOLDER
from crane_core.schema import FEATURES, INTERACTIONS, ITEMS

SOURCE_FILE = "source.json"


@dataclass(frozen=True)
class Imported:
    """Facts of an imported raw folder.

    Attributes:
        dataset: name of the dataset.
        raw: path of the folder.
        num_users: distinct users in the log.
        num_items: items of the catalog.
        num_interactions: rows of the log.
        modalities: name to width of the feature vectors.
        split: suitable value of `etl.split`.
        start: first day of a suitable window.
        end: exclusive end of that window, the day after the last day of data.
        is_new: False if the folder already held this import.
    """

    dataset: str
    raw: str
    num_users: int
    num_items: int
    num_interactions: int
    modalities: dict[str, int]
    split: str
    start: date
    end: date
    is_new: bool = True


def write_raw(raw: Path, source: Mapping[str, Any], build: Callable[[Path], Imported]) -> Imported:
    """Let `build` fill a temporary folder beside `raw` and rename it to `raw`; do nothing if `raw` holds this source.

    Args:
        raw: the folder to write.
        source: identity of the imported data, JSON values.
        build: writes the raw layout into the folder it is given.

    Raises:
        DataError: `raw` holds other data.
    """
    raw = raw.absolute()
    present = _present(raw, source)
    if present:
        return present
    raw.parent.mkdir(parents=True, exist_ok=True)
    spool = raw.parent / f".{raw.name}.{uuid.uuid4().hex}"
    try:
        spool.mkdir()
        imported = build(spool)
        record = {"source": dict(source), "imported": asdict(imported)}
        (spool / SOURCE_FILE).write_text(json.dumps(record, indent=1, default=str))
        try:
            spool.rename(raw)
        except OSError:
            present = _present(raw, source)
            if present is None:
                raise
            return present
    finally:
        shutil.rmtree(spool, ignore_errors=True)
    return imported


def write_interactions(folder: Path, day: date, table: pa.Table) -> None:
    """Write the partition of one arrival day; `table` has some columns of `schema.INTERACTIONS`."""
    schema = pa.schema([field for field in INTERACTIONS if field.name in table.column_names])
    _write(folder / INTERACTIONS_FOLDER / f"{DAY_PREFIX}{day.isoformat()}", table.select(schema.names), schema)


def write_items(folder: Path, ids: list[str], titles: list[str | None]) -> None:
    """Write the catalog: an id and a title, or None, for each item."""
    _write(folder / ITEMS_FOLDER, pa.table([pa.array(ids), pa.array(titles, pa.string())], names=ITEMS.names), ITEMS)


def write_features(folder: Path, modality: str, ids: list[str], rows: NDArray) -> None:
    """Write one modality.

    Args:
        folder: raw root.
        modality: name of the modality.
        ids: item of each row.
        rows: floating [len(ids), dim], stored as float32.
    """
    values = pa.array(np.ascontiguousarray(rows, dtype=np.float32).reshape(-1))
    offsets = pa.array(np.arange(len(ids) + 1, dtype=np.int32) * rows.shape[1])
    vectors = pa.ListArray.from_arrays(offsets, values)
    _write(folder / FEATURES_FOLDER / modality, pa.table([pa.array(ids), vectors], names=FEATURES.names), FEATURES)


def _write(folder: Path, table: pa.Table, schema: pa.Schema) -> None:
    folder.mkdir(parents=True)
    pq.write_table(table.cast(schema), folder / "part-0.parquet", compression="zstd")


def _present(raw: Path, source: Mapping[str, Any]) -> Imported | None:
    if not raw.exists() or (raw.is_dir() and not any(raw.iterdir())):
        return None
    record = raw / SOURCE_FILE
    if not record.is_file():
        raise DataError(
            f"{raw} is not empty and holds no {SOURCE_FILE}: its rows came from elsewhere.",
            "Import into another folder, or remove this one.",
        )
    found = json.loads(record.read_text())
    if found["source"] != dict(source):
        raise DataError(
            f"{raw} holds the dataset {found['source'].get('dataset')!r} "
            f"({found['imported']['num_interactions']} rows), not this version of {source['dataset']!r}.",
            "Import into another folder, or remove this one.",
        )
    known = found["imported"]
    dates = {name: date.fromisoformat(known[name]) for name in ("start", "end")}
    return Imported(**{**known, **dates, "raw": str(raw), "is_new": False})
