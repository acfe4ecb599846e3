"""Read files of rows in bounded memory, under the names of the raw layout: CSV, TSV, JSON lines and Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.json
import pyarrow.parquet as pq

from crane_core.errors import DataError
from crane_core.raw.files import DAY_PREFIX, INTERACTIONS_FOLDER
from crane_core.schema import EVENT_TIME, INTERACTIONS

BATCH_ROWS = 65_536
BLOCK_BYTES = 8 * 1024 * 1024
DAY = DAY_PREFIX.removesuffix("=")
MOST_DAYS = 40_000
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")


def list_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files that match any of the patterns, in order of their names.

    Raises:
        DataError: a pattern matches nothing, or a file of no known format.
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
    """The suffix that tells the format, that of a compression left off."""
    return Path(path.name.removesuffix(".gz")).suffix


def read_batches(path: Path, types: Mapping[str, pa.DataType], needed: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batches with the named columns; one that is not there and not needed is null.

    Args:
        path: a file of one of `FORMATS`.
        types: column of the file to the type it is read as.
        needed: those that must be there.

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
                    "Name in the mapping a column that the file has, or deliver the file again with the missing one.",
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
            "Correct the lines named, or write every column with one type, and deliver the file again.",
        ) from error


def write_log(target: Path, batches: Iterator[pa.RecordBatch]) -> None:
    """Write interactions, each into the partition of the day of its event, in bounded memory.

    A row without a time goes to the first day of the epoch, where the ETL counts it.

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
