"""Import CSV, TSV, JSON lines or Parquet files whose columns a mapping file names.

dataset: shop
interactions:
  files: [events/*.csv.gz]
  columns: {user_id: customer, item_id: sku, event_time: at, weight: quantity, event_type: kind}
  time: iso                      # or s, ms, us: a number since 1970
  zone: Europe/Berlin            # of times without one
items:
  files: [products.csv]
  columns: {item_id: sku, title: name}
features:
  text: {files: [text.parquet], columns: {item_id: sku, vector: embedding}}
  image: {files: [image.npy], ids: image_ids.txt}
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from pydantic import Field, ValidationError, field_validator

from crane_core.allowed import remedy_of
from crane_core.config import known_zone
from crane_core.errors import ConfigError, DataError
from crane_core.raw.files import FEATURES_FOLDER, ITEMS_FOLDER, check_modality
from crane_core.raw.importers.tables import LogCounts, list_files, read_batches, write_log
from crane_core.raw.importers.target import Imported, write_features, write_raw
from crane_core.schema import EVENT_TIME, EVENT_TYPE, ITEM_ID, LABEL, TITLE, USER_ID, VECTOR, WEIGHT
from crane_core.section import Section
from crane_core.storage.artifacts import sha256_file

FORMAT = "mapped-1"
EXAMPLE = f"See an example of a mapping: python -m pydoc {__name__}."
OPTIONAL = {WEIGHT: pa.float32(), LABEL: pa.int8(), EVENT_TYPE: pa.string()}


class MappedLog(Section):
    """The interactions of a mapping file."""

    files: tuple[str, ...]
    """Patterns relative to the mapping file."""
    columns: dict[Literal["user_id", "item_id", "event_time", "weight", "label", "event_type"], str]
    """Column of the raw layout to column of the files; the first three are required."""
    time: Literal["iso", "s", "ms", "us"] = "iso"
    """Format of the times: ISO 8601, or a number of seconds, milliseconds or microseconds since 1970."""
    zone: str = "UTC"
    """Time zone of ISO times without one."""

    @field_validator("columns")
    @classmethod
    def _has_all(cls, columns: dict[str, str]) -> dict[str, str]:
        missing = sorted({USER_ID, ITEM_ID, EVENT_TIME} - set(columns))
        if missing:
            raise ValueError(f"interactions.columns must name {', '.join(missing)}")
        return columns

    @field_validator("zone")
    @classmethod
    def _known(cls, name: str) -> str:
        return known_zone(name)


class MappedItems(Section):
    """The catalog of a mapping file."""

    files: tuple[str, ...]
    """Patterns relative to the mapping file."""
    columns: dict[Literal["item_id", "title"], str]
    """Column of the raw layout to column of the files."""


class MappedModality(Section):
    """The features of one modality in a mapping file."""

    files: tuple[str, ...]
    """Patterns relative to the mapping file; Parquet, or one `.npy` matrix."""
    columns: dict[Literal["item_id", "vector"], str] = Field({"item_id": ITEM_ID, "vector": VECTOR})
    """Column of the raw layout to column of Parquet files."""
    ids: str | None = None
    """File with the item of each row of the matrix, one per line."""


class Mapping(Section):
    """A mapping file."""

    dataset: str = Field(min_length=1)
    """Name of the dataset."""
    interactions: MappedLog
    items: MappedItems | None = None
    features: dict[str, MappedModality] = Field({})


def import_mapped(mapping: str | Path, raw: str | Path) -> Imported:
    """Import the files that a mapping file describes into `raw`; a second import of the same files changes nothing.

    Raises:
        ConfigError: the mapping file is not valid.
        DataError: a file is missing or does not have the described format; `raw` holds another dataset.
    """
    path = Path(mapping)
    chosen = read_mapping(path)
    folder = path.parent
    log = list_files(folder, chosen.interactions.files)
    catalog = list_files(folder, chosen.items.files) if chosen.items else []
    vectors = {name: _feature_files(folder, name, entry) for name, entry in chosen.features.items()}
    everything = [*log, *catalog, *(file for files in vectors.values() for file in files)]
    files = {str(file.relative_to(folder)): sha256_file(file) for file in everything}
    source = {
        "dataset": chosen.dataset,
        "format": FORMAT,
        "mapping": chosen.model_dump(mode="json"),
        "files": files,
    }

    def build(target: Path) -> Imported:
        counts = LogCounts()
        batches = (batch for file in log for batch in read_log(file, chosen.interactions))
        write_log(target, counts.counted(batches))
        if counts.last is None:
            raise DataError(
                f"{', '.join(map(str, log[:3]))}: {counts.num_rows} rows, none with a time.",
                "Let interactions.columns.event_time name the column of the times.",
            )
        items = counts.items
        if chosen.items:
            items |= _write_catalog(target, catalog, chosen.items)
        widths = {name: _write_modality(target, name, vectors[name], entry) for name, entry in chosen.features.items()}
        last = counts.last.date()
        return Imported(
            dataset=chosen.dataset,
            raw=str(Path(raw).absolute()),
            num_users=len(counts.users),
            num_items=len(items),
            num_interactions=counts.num_rows,
            modalities=widths,
            split="label" if LABEL in chosen.interactions.columns else "temporal",
            start=last,
            end=last + timedelta(days=1),
        )

    return write_raw(Path(raw), source, build)


def read_mapping(path: Path) -> Mapping:
    """Read and check a mapping file.

    Raises:
        ConfigError: it cannot be read, or a field is unknown, missing or not valid.
    """
    try:
        return Mapping.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"The mapping {path} cannot be read ({error}).",
            "Give a file in YAML with at least dataset, interactions.files and interactions.columns.",
        ) from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(
            f"The mapping {path}: {problems}.", remedy_of(error, Mapping, "{field}: VALUE in the mapping")
        ) from error


def read_log(path: Path, entry: MappedLog) -> Iterator[pa.RecordBatch]:
    """Yield batches of interactions with the columns of the raw layout.

    Raises:
        DataError: the file does not have the described format.
    """
    kinds: dict[str, pa.DataType] = {USER_ID: pa.string(), ITEM_ID: pa.string(), **OPTIONAL}
    kinds[EVENT_TIME] = pa.string() if entry.time == "iso" else pa.int64()
    types = {column: kinds[name] for name, column in entry.columns.items()}
    for batch in read_batches(path, types, list(types)):
        columns: dict[str, pa.Array] = {name: batch.column(column) for name, column in entry.columns.items()}
        columns[EVENT_TIME] = _instants(columns[EVENT_TIME], entry, path)
        yield pa.record_batch(columns)


def _instants(values: pa.Array, entry: MappedLog, path: Path) -> pa.Array:
    instants = pa.timestamp("us", "UTC")
    try:
        if entry.time != "iso":
            return values.cast(pa.timestamp(entry.time, "UTC")).cast(instants)
        zoned = pc.match_substring_regex(values, r"(Z|[+-]\d\d:?\d\d)$")
        local = pc.if_else(zoned, pa.scalar(None, pa.string()), values).cast(pa.timestamp("us"))
        local = pc.assume_timezone(local, entry.zone, ambiguous="earliest", nonexistent="earliest")
        exact = pc.if_else(zoned, values, pa.scalar(None, pa.string())).cast(instants)
        return pc.coalesce(exact, local.cast(instants))
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: a time does not have the format interactions.time={entry.time}: {error}.",
            "Set interactions.time in the mapping to iso, s, ms or us, or correct the rows.",
        ) from error


def _feature_files(folder: Path, name: str, entry: MappedModality) -> list[Path]:
    check_modality(name, folder)
    files = [path for pattern in entry.files for path in sorted(folder.glob(pattern)) if path.is_file()]
    matrix = any(path.suffix == ".npy" for path in files)
    if not files or any(path.suffix not in (".npy", ".parquet") for path in files) or (matrix and len(files) > 1):
        raise DataError(
            f"features.{name}: {', '.join(entry.files)} matches {len(files)} files, expected Parquet files or one "
            ".npy matrix.",
            f"Set features.{name}.files in the mapping to Parquet files or to one .npy matrix.",
        )
    if matrix and entry.ids is None:
        raise ConfigError(
            f"features.{name} is a matrix without ids.",
            f"Add features.{name}.ids: FILE to the mapping, a file with one item id a line.",
        )
    if matrix and entry.ids and not (folder / entry.ids).is_file():
        raise DataError(
            f"features.{name}: there is no file {folder / entry.ids}.",
            f"Set features.{name}.ids in the mapping to a file below {folder}, one item id a line.",
        )
    return [*files, *([folder / entry.ids] if matrix and entry.ids else [])]


def _write_catalog(target: Path, files: list[Path], entry: MappedItems) -> set[str]:
    """Write the catalog and return its items."""
    (target / ITEMS_FOLDER).mkdir()
    types = dict.fromkeys(entry.columns.values(), pa.string())
    seen: set[str] = set()
    schema = pa.schema([(ITEM_ID, pa.string()), (TITLE, pa.string())])
    with pq.ParquetWriter(target / ITEMS_FOLDER / "part-0.parquet", schema, compression="zstd") as writer:
        for path in files:
            for batch in read_batches(path, types, list(types)):
                title = batch.column(entry.columns["title"]) if "title" in entry.columns else None
                ids = batch.column(entry.columns["item_id"])
                seen.update(filter(None, ids.to_pylist()))
                writer.write_batch(
                    pa.record_batch([ids, pa.nulls(len(ids), pa.string()) if title is None else title], schema=schema)
                )
    return seen


def _write_modality(target: Path, name: str, files: list[Path], entry: MappedModality) -> int:
    """Write one modality and return the width of its vectors."""
    if files[0].suffix == ".npy":
        matrix = np.load(files[0], mmap_mode="r", allow_pickle=False)
        ids = files[1].read_text().split("\n")
        ids = ids[:-1] if ids and not ids[-1] else ids
        if matrix.ndim != 2 or matrix.dtype.kind != "f" or len(ids) != len(matrix):
            raise DataError(
                f"{files[0]} has shape {list(matrix.shape)} and type {matrix.dtype}, {files[1]} {len(ids)} ids; "
                "expected a floating [items, dim] matrix and as many ids.",
                f"Save with numpy.save a floating matrix whose rows are those of the {len(ids)} ids, in their order.",
            )
        write_features(target, name, ids, matrix)
        return int(matrix.shape[1])
    out = target / FEATURES_FOLDER / name
    out.mkdir(parents=True)
    width = 0
    for index, path in enumerate(files):
        try:
            table = pq.read_table(path, columns=list(entry.columns.values()), partitioning=None)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path} cannot be read: {error}.", "Save it again as Parquet with the columns that the mapping names."
            ) from error
        names = {column: raw for raw, column in entry.columns.items()}
        if set(names) - set(table.column_names):
            raise DataError(
                f"{path} has no column {', '.join(sorted(set(names) - set(table.column_names)))}.",
                f"Name in the mapping, under features, columns of the file: {', '.join(table.column_names)}.",
            )
        table = table.rename_columns([names[column] for column in table.column_names])
        pq.write_table(table, out / f"part-{index}.parquet", compression="zstd")
        lengths = pc.list_value_length(table[VECTOR])
        width = max(width, pc.max(lengths).as_py() or 0)
    return width
