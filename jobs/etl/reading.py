"""Parquet files as a table: by Spark where it can reach them, through Python and pyarrow where it cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.datasource import DataSource, DataSourceReader, InputPartition
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import StructType

from crane_core.raw.files import RawFile
from crane_core.raw.location import Location
from jobs.etl.session import glob_escaped, unreadable

BATCH_ROWS = 65_536
S3A = "org.apache.hadoop.fs.s3a.S3AFileSystem"


def read_files(spark: SparkSession, files: Sequence[RawFile], schema: str, day: str | None = None) -> DataFrame:
    """The columns of the schema as the files store them.

    Args:
        spark: the session.
        files: Parquet files of the same types, all local or all on S3.
        schema: names and Spark types of the columns.
        day: name of a date column to add, the arrival day of the file.
    """
    if files[0].path.scheme and not has_s3a(spark):
        spark.dataSource.register(ArrowParquet)
        pieces = json.dumps([[str(file.path), str(file.day or "")] for file in files])
        wanted = f"{schema}, {day} date" if day else schema
        return spark.read.format(ArrowParquet.name()).schema(wanted).option("pieces", pieces).load()
    paths = [glob_escaped(str(file.path).replace("s3://", "s3a://")) for file in files]
    reader = spark.read.schema(f"{schema}, {day} date" if day else schema)
    if day:
        folder = files[0].path.parent
        while not folder.name.startswith(f"{day}="):
            folder = folder.parent
        reader = reader.option("basePath", str(folder.parent).replace("s3://", "s3a://"))
    return reader.parquet(*paths)


def has_s3a(spark: SparkSession) -> bool:
    """Return whether Spark's own S3 file system is on the class path; False for a Connect server."""
    jvm = getattr(spark, "_jvm", None)
    if jvm is None:
        return False
    try:
        jvm.java.lang.Class.forName(S3A)
    except Exception:
        return False
    return True


class ArrowParquet(DataSource):
    """Parquet files that the workers read with pyarrow, a partition per row group."""

    @classmethod
    def name(cls) -> str:
        return "crane_parquet"

    def reader(self, schema: StructType) -> DataSourceReader:
        return ArrowParquetReader(self.options["pieces"], schema)


class ArrowParquetReader(DataSourceReader):
    """Reads row groups as Arrow batches in the types of the schema."""

    def __init__(self, pieces: str, schema: StructType) -> None:
        self.pieces: list[list[str]] = json.loads(pieces)
        self.schema = schema

    def partitions(self) -> Sequence[InputPartition]:
        found = []
        for path, day in self.pieces:
            try:
                location = Location.at(path)
                with pq.ParquetFile(str(location.path), filesystem=location.filesystem) as parquet:
                    found += [InputPartition((path, day, group)) for group in range(parquet.num_row_groups)]
            except (pa.ArrowException, OSError) as error:
                raise unreadable(path) from error
        return found or [InputPartition(None)]

    def read(self, partition: InputPartition) -> Iterator[pa.RecordBatch]:
        if partition.value is None:
            return
        path, day, group = partition.value
        wanted = to_arrow_schema(self.schema, timezone="UTC")
        location = Location.at(path)
        try:
            with pq.ParquetFile(str(location.path), filesystem=location.filesystem) as parquet:
                stored = [name for name in wanted.names if name in parquet.schema_arrow.names and name != "dt"]
                for batch in parquet.iter_batches(BATCH_ROWS, [group], stored):
                    columns = []
                    for field in wanted:
                        if field.name in stored:
                            columns.append(_as(batch.column(field.name), field.type))
                        elif pa.types.is_date(field.type):
                            columns.append(pa.repeat(pa.scalar(day).cast(field.type), batch.num_rows))
                        else:
                            columns.append(pa.nulls(batch.num_rows, field.type))
                    yield pa.record_batch(columns, schema=wanted)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(path) from error


def _as(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_timestamp(values.type) and pa.types.is_integer(kind):
        return values.cast(pa.int64())
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return values.cast(kind)
