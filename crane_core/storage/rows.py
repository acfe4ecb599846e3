"""Read a few rows of Parquet files without the parts of pyarrow that import pandas, which takes half a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def read_rows(path: Path, columns: Sequence[str], key: str, value: str) -> list[dict[str, Any]]:
    """Return the rows of a table that have a value in a column, in the order of the files.

    Row groups that cannot hold the value are not read. Columns that a file lacks are left out, as those of a file of an
    earlier version.

    Args:
        path: Parquet file, or folder of such files.
        columns: names of the columns to return.
        key: name of a string column.
        value: what it holds in the rows.
    """
    found: list[dict[str, Any]] = []
    for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        with pq.ParquetFile(file) as parquet:
            present = [name for name in columns if name in parquet.schema_arrow.names]
            for group in range(parquet.num_row_groups):
                if not _may_hold(parquet.metadata.row_group(group), key, value):
                    continue
                keys = parquet.read_row_group(group, columns=[key])[key].to_pylist()
                places = [place for place, each in enumerate(keys) if each == value]
                if places:
                    table = parquet.read_row_group(group, columns=present)
                    found += [{name: table[name][place].as_py() for name in present} for place in places]
    return found


def read_columns(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Return all values of some columns of a Parquet file."""
    with pq.ParquetFile(path) as parquet:
        return parquet.read(list(columns)).to_pydict()


def _may_hold(group: pq.RowGroupMetaData, key: str, value: str) -> bool:
    columns = (group.column(place) for place in range(group.num_columns))
    statistics = next(column.statistics for column in columns if column.path_in_schema == key)
    return statistics is None or not statistics.has_min_max or statistics.min <= value <= statistics.max
