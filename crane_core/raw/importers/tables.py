"""Read CSV, TSV, JSON lines and Parquet files, and write logs, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.json
import pyarrow.parquet as pq

from crane_core.errors import DataError
from crane_core.raw.files import DAY_PREFIX, INTERACTIONS_FOLDER
from crane_core.schema import EVENT_TIME, INTERACTIONS, ITEM_ID, USER_ID

BATCH_ROWS = 65_536
BLOCK_BYTES = 8 * 1024 * 1024
DAY = DAY_PREFIX.removesuffix("=")
MOST_DAYS = 40_000
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")


def list_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """List the files that match any of the patterns, by name.

    Raises:
        DataError: a pattern matches no file, or a file has an unknown format.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = {path for path in folder.glob(pattern) if path.is_file()}
        if not matches:
            raise DataError(
                f"{folder} has no file {pattern!r}, 0 rows.",
                "Name in the mapping a pattern of files that it has, for example *.csv, or deliver them.",
            )
        found |= matches
    for path in found:
        if file_format(path) not in FORMATS:
            raise DataError(
                f"{path} ({path.stat().st_size} bytes) is of no known format.",
                f"Deliver {', '.join(FORMATS)} files, text ones as they are or compressed with gzip (.gz).",
            )
    return sorted(found)


def file_format(path: Path) -> str:
    """Return the suffix of the format, without that of the compression."""
    return Path(path.name.removesuffix(".gz")).suffix


def read_batches(path: Path, types: Mapping[str, pa.DataType], needed: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield batches of some columns; a missing column that is not needed is null.

    Args:
        path: a file in one of `FORMATS`.
        types: column of the file to the type that it is read as.
        needed: columns that must exist.

    Raises:
        DataError: the file cannot be read, lacks a needed column, or holds values of other types.
    """
    rows = 0
    try:
        for batch in _open(path, types):
            missing = [name for name in needed if name not in batch.schema.names]
            if missing:
                raise DataError(
                    f"{path} has no column {', '.join(missing)}; it has {', '.join(batch.schema.names) or 'none'}.",
                    "Name one of these columns, or deliver the file again with the missing ones.",
                )
            columns = [
                batch.column(name).cast(kind) if name in batch.schema.names else pa.nulls(batch.num_rows, kind)
                for name, kind in types.items()
            ]
            rows += batch.num_rows
            yield pa.record_batch(columns, names=list(types))
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DataError(
            f"{path} ({path.stat().st_size} bytes) cannot be read after {rows} rows: {error}.",
            "Correct the lines or the types that the message names, or deliver the file again.",
        ) from error


@dataclass
class LogCounts:
    """Counts of a log, taken while its batches are written.

    Attributes:
        num_rows: rows.
        users, items: distinct ids, without empty ones.
        last: time of the last event in UTC, None without any time.
    """

    num_rows: int = 0
    users: set[str] = field(default_factory=set)
    items: set[str] = field(default_factory=set)
    last: datetime | None = None

    def counted(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the batches unchanged, columns of `schema.INTERACTIONS`, and count them."""
        for batch in batches:
            self.num_rows += batch.num_rows
            self.users.update(filter(None, pc.unique(batch.column(USER_ID)).to_pylist()))
            self.items.update(filter(None, pc.unique(batch.column(ITEM_ID)).to_pylist()))
            last = pc.max(batch.column(EVENT_TIME)).as_py()
            self.last = max(filter(None, (self.last, last)), default=None)
            yield batch


def write_log(target: Path, batches: Iterator[pa.RecordBatch]) -> None:
    """Write interactions in bounded memory, each into the partition of the day of its event.

    A row without a time goes to 1970-01-01, so that the ETL counts it as dropped.

    Args:
        target: raw root.
        batches: columns of `schema.INTERACTIONS`.
    """
    loose = pa.schema([pa.field(name, INTERACTIONS.field(name).type) for name in INTERACTIONS.names])
    parted = loose.append(pa.field(DAY, pa.string()))

    def with_day() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            instants = pc.fill_null(batch.column(EVENT_TIME).cast(pa.timestamp("us")), pa.scalar(0, pa.timestamp("us")))
            day = pc.strftime(instants, format="%Y-%m-%d")
            columns = [
                batch.column(field.name) if field.name in batch.schema.names else pa.nulls(batch.num_rows, field.type)
                for field in loose
            ]
            yield pa.record_batch([*columns, day], schema=parted)

    ds.write_dataset(
        with_day(),
        target / INTERACTIONS_FOLDER,
        schema=parted,
        format="parquet",
        partitioning=ds.partitioning(pa.schema([(DAY, pa.string())]), flavor="hive"),
        max_partitions=MOST_DAYS,
        max_open_files=512,
        basename_template="part-{i}.parquet",
        file_options=ds.ParquetFileFormat().make_write_options(compression="zstd"),
    )


def _open(path: Path, types: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    kind = file_format(path)
    if kind == ".parquet":
        with pq.ParquetFile(path) as parquet:
            names = [name for name in types if name in parquet.schema_arrow.names]
            if parquet.metadata.num_rows == 0 or not names:
                yield pa.record_batch(
                    [pa.nulls(0, field.type) for field in parquet.schema_arrow], parquet.schema_arrow.names
                )
            yield from parquet.iter_batches(BATCH_ROWS, columns=names)
        return
    with pa.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else None) as stream:
        if kind == ".jsonl":
            yield from pa.json.open_json(
                stream,
                read_options=pa.json.ReadOptions(block_size=BLOCK_BYTES),
                parse_options=pa.json.ParseOptions(
                    explicit_schema=pa.schema(list(types.items())), unexpected_field_behavior="ignore"
                ),
            )
            return
        yield from pa.csv.open_csv(
            stream,
            read_options=pa.csv.ReadOptions(block_size=BLOCK_BYTES),
            parse_options=pa.csv.ParseOptions(delimiter="\t" if kind == ".tsv" else ",", newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict(types), strings_can_be_null=True, null_values=[""], quoted_strings_can_be_null=False
            ),
        )
