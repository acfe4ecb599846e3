"""Write the raw folder of an import: it appears in one step and is never rewritten."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crane_core.errors import ConfigError, DataError
from crane_core.raw.files import DAY_PREFIX, FEATURES_FOLDER, INTERACTIONS_FOLDER, ITEMS_FOLDER, SOURCE_FILE
from crane_core.schema import FEATURES, INTERACTIONS, ITEMS

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
MOST_NUMBERS = 1 << 24
"""Numbers that are written at a time. The offsets of a list count them in 32 bits."""


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
        time_zone: zone whose midnights cut the daily partitions; None where the days are nominal.
        counts: section to what its files held, what was written, and what was set aside by reason.
        matched: section to the share of the items of the log that it has.
        notes: what is odd, in sentences.
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
    time_zone: str | None = "UTC"
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    matched: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def instants(self) -> tuple[str, str]:
        """Return start and end as a run's window has them: days in UTC, midnights of the zone elsewhere."""
        zone = ZoneInfo(self.time_zone or "UTC")
        midnights = (datetime.combine(day, time(), zone) for day in (self.start, self.end))
        told = (str(midnight.date()) if not midnight.utcoffset() else midnight.isoformat() for midnight in midnights)
        return next(told), next(told)


def write_raw(raw: Path, source: Mapping[str, Any], build: Callable[[Path], Imported]) -> Imported:
    """Let `build` fill a temporary folder beside `raw` and rename it to `raw`; do nothing if `raw` holds this source.

    Args:
        raw: the folder to write.
        source: identity of the imported data, JSON values.
        build: writes the raw layout into the folder it is given.

    Raises:
        ConfigError: `raw` is no folder of this machine, or cannot be written.
        DataError: `raw` holds other data.
    """
    if _URI.match(str(raw)):
        raise ConfigError(
            f"{raw} is no folder of this machine.", "Import into a folder, and copy that with the tools of the storage."
        )
    raw = raw.absolute()
    present = _present(raw, source)
    if present:
        return present
    spool = raw.parent / f".{raw.name}.{uuid.uuid4().hex}"
    try:
        spool.mkdir(parents=True)
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
    except OSError as error:
        raise ConfigError(
            f"{raw} cannot be written: {error}.", "Give a folder that can be made, on a disk with room for it."
        ) from error
    finally:
        shutil.rmtree(spool, ignore_errors=True)
    return imported


def write_interactions(folder: Path, day: date, table: pa.Table) -> int:
    """Write the partition of one arrival day, and return its rows; `table` has some columns of the log."""
    schema = pa.schema([field for field in INTERACTIONS if field.name in table.column_names])
    return _write(folder / INTERACTIONS_FOLDER / f"{DAY_PREFIX}{day.isoformat()}", table.select(schema.names), schema)


def write_items(folder: Path, ids: list[str], titles: list[str | None]) -> int:
    """Write the catalog, an id and a title, or None, for each item; return its rows."""
    return _write(
        folder / ITEMS_FOLDER, pa.table([pa.array(ids), pa.array(titles, pa.string())], names=ITEMS.names), ITEMS
    )


def write_features(folder: Path, modality: str, ids: Sequence[str | None], rows: NDArray) -> None:
    """Write one modality.

    Args:
        folder: raw root.
        modality: name of the modality.
        ids: item of each row.
        rows: numbers [len(ids), dim] in any layout, stored as float32.
    """
    with FeatureWriter(folder, modality) as writer:
        step = max(1, MOST_NUMBERS // rows.shape[1])
        for first in range(0, len(ids), step):
            vectors = lists_of(rows[first : first + step])
            writer.write(pa.array(ids[first : first + len(vectors)], pa.string()), vectors)


def lists_of(rows: NDArray) -> pa.ListArray:
    """Return rows of numbers [n, dim], n * dim below 2**31, as lists of float32."""
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(rows, dtype=np.float32)
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))


class FeatureWriter:
    """Writes the vectors of one modality, some at a time.

    Args:
        folder: raw root.
        modality: name of the modality.
    """

    def __init__(self, folder: Path, modality: str) -> None:
        self.path = folder / FEATURES_FOLDER / modality / "part-0.parquet"
        self.path.parent.mkdir(parents=True)
        self.writer = pq.ParquetWriter(self.path, FEATURES, compression="zstd")

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()

    def write(self, ids: pa.Array, vectors: pa.Array) -> None:
        """Write rows: text, and lists of numbers of any type."""
        batch = pa.record_batch([ids.cast(pa.string()), vectors.cast(FEATURES.field(1).type)], names=FEATURES.names)
        self.writer.write_batch(batch.cast(FEATURES))

    def num_rows(self) -> int:
        """Return the rows that the closed file holds."""
        return pq.read_metadata(self.path).num_rows


def _write(folder: Path, table: pa.Table, schema: pa.Schema) -> int:
    folder.mkdir(parents=True)
    path = folder / "part-0.parquet"
    pq.write_table(table.cast(schema), path, compression="zstd")
    return pq.read_metadata(path).num_rows


def _present(raw: Path, source: Mapping[str, Any]) -> Imported | None:
    if not raw.exists() or (raw.is_dir() and not any(raw.iterdir())):
        return None
    record = raw / SOURCE_FILE
    if not record.is_file():
        raise DataError(
            f"{raw} is not empty and holds no {SOURCE_FILE}: its rows came from elsewhere.",
            "Import into another folder, or remove this one.",
        )
    try:
        written = json.loads(record.read_text())
        held, known = written["source"], written["imported"]
        dates = {name: date.fromisoformat(known[name]) for name in ("start", "end")}
        imported = Imported(**{**known, **dates, "raw": str(raw), "is_new": False})
        name, rows = held["dataset"], imported.num_interactions
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{record} cannot be read, so that nobody knows what {raw} holds ({type(error).__name__}: {error}).",
            "Import into another folder, or remove this one.",
        ) from error
    if held != dict(source):
        raise DataError(
            f"{raw} holds the dataset {name!r} ({rows} rows), not this version of {source['dataset']!r}.",
            "Import into another folder, or remove this one.",
        )
    return imported
