"""Open Parquet files as their columns are stored, whatever Arrow types their writer had in mind."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from crane_core.raw.location import Location

_MAGIC = b"PAR1"
_END = 1 << 16
"""Bytes read first. A few would do, but pyarrow asks S3 no second time where the body of an error is longer than what
was asked for."""
_HINT, _NO_HINT = b"ARROW:schema", b"arrow_schema"


@contextmanager
def open_parquet(path: Location | Path) -> Iterator[pq.ParquetFile]:
    """Open a file without the Arrow schema that pyarrow keeps in the footer.

    With that schema a fixed-size list is read as one, and pyarrow 25 cannot do so where a list is null. Without it the
    same column is a list, as it is for Spark and DuckDB. Dictionaries are read as their values. INT96 times are read
    in microseconds, since nanoseconds overflow outside the years 1677 to 2262; `int96_instants` tells what they are.

    Raises:
        pa.ArrowInvalid: it is no complete Parquet file.
        OSError: it cannot be read.
    """
    location = Location.at(path)
    with location.filesystem.open_input_file(str(location.path)) as file:
        size = file.size()
        end = _last(file, size, _END)
        length = int.from_bytes(end[-8:-4], "little")
        if end[-4:] != _MAGIC or length > size - 12:
            raise pa.ArrowInvalid(f"{size} bytes that end in no footer of Parquet")
        if length + 8 > len(end):
            end = _last(file, size, length + 8)
        footer = end[-8 - length : -8].replace(_HINT, _NO_HINT)
        metadata = pq.read_metadata(pa.BufferReader(_MAGIC + footer + end[-8:]))
        yield pq.ParquetFile(file, metadata=metadata, coerce_int96_timestamp_unit="us")


def _last(file: pa.NativeFile, size: int, num_bytes: int) -> bytes:
    """Read the last bytes of a file of a size; all of a smaller file."""
    file.seek(max(0, size - num_bytes))
    return file.read(num_bytes)


def int96_instants(parquet: pq.ParquetFile) -> set[str]:
    """Return the columns of INT96 times that are instants, although they are read without a zone.

    Spark and Impala write instants so. Pyarrow writes times without a zone so, too, and says it in its Arrow schema.

    Raises:
        pa.ArrowInvalid: that schema cannot be read.
    """
    metadata = parquet.metadata
    columns = (metadata.schema.column(index) for index in range(metadata.num_columns))
    names = {column.path for column in columns if column.physical_type == "INT96"}
    hint = (metadata.metadata or {}).get(_NO_HINT)
    if not names or not hint:
        return names
    try:
        told = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(hint)))
    except binascii.Error as error:
        raise pa.ArrowInvalid(f"the Arrow schema in its footer is damaged: {error}") from error
    return {name for name in names if name not in told.names or getattr(told.field(name).type, "tz", None) is not None}
