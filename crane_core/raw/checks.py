"""Check the footers of the delivered files, before Spark starts."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from tokenize import TokenError
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from crane_core.config import Etl, Window
from crane_core.errors import DataError
from crane_core.raw.files import MATRIX, RawFile, arrives_within
from crane_core.raw.location import Location
from crane_core.raw.parquet import int96_instants, open_parquet
from crane_core.schema import (
    AVAILABLE_FROM,
    AVAILABLE_UNTIL,
    CATEGORY,
    EVENT_TIME,
    EVENT_TYPE,
    IN_STOCK,
    INTERACTIONS,
    ITEM_ID,
    ITEM_IDX,
    ITEMS,
    LABEL,
    REASON,
    STATE,
    TITLE,
    USER_ID,
    VECTOR,
    WEIGHT,
)

GROUP_ROWS = 262_144
"""Rows of a matrix in a group, which one Spark task reads."""
_RESERVED = (ITEM_ID, TITLE, ITEM_IDX, STATE, REASON, "dt")
"""Names that the ETL has a use of its own for."""

UNREADABLE = (
    OSError,
    zipfile.BadZipFile,
    ValueError,
    LookupError,
    EOFError,
    SyntaxError,
    TypeError,
    OverflowError,
    MemoryError,
    TokenError,
)
"""Errors of numpy for a header that is none: it is read as a Python literal."""


@dataclass(frozen=True)
class Footer:
    """The footer of a Parquet file, or the header of a matrix.

    Attributes:
        file: the file.
        num_rows: number of rows.
        num_row_groups: number of row groups.
        types: column name to Arrow type, without the columns of type null, which hold no values.
    """

    file: RawFile
    num_rows: int
    num_row_groups: int
    types: dict[str, pa.DataType]


def check_interactions(files: Sequence[RawFile], window: Window, etl: Etl) -> list[Footer]:
    """Read and check the footers of interaction files.

    Args:
        files: from `list_interactions`.
        window: at least one partition that arrived within it must hold rows.
        etl: gives the time zone of the days, and tells whether the column `label` is required.

    Raises:
        DataError: a file is not Parquet, lacks a column or has a column of a wrong type; or the window is empty.
    """
    footers = _footers(files)
    needs_label = etl.split == "label"
    for footer in footers:
        _expect(footer, USER_ID, _is_text, "string", "Cast the ids to string when writing the file.")
        _expect(footer, ITEM_ID, _is_text, "string", "Cast the ids to string when writing the file.")
        _expect(
            footer,
            EVENT_TIME,
            _is_instant,
            "timestamp with time zone",
            "Write the instants as timestamp[us, tz=UTC].",
        )
        _expect(footer, WEIGHT, _is_number, "float32", "Write the weights as float32.", required=False)
        _expect(footer, LABEL, pt.is_integer, "int8", "Write the labels as int8: 0, 1 or 2.", required=needs_label)
        _expect(footer, EVENT_TYPE, _is_text, "string", "Write the event types as strings.", required=False)
    rows = sum(footer.num_rows for footer in footers if arrives_within(footer.file, window, etl.time_zone))
    if rows == 0:
        days = [footer.file.day for footer in footers if footer.file.day]
        raise DataError(
            f"The window [{window.start:%Y-%m-%d %H:%M}, {window.end:%Y-%m-%d %H:%M}) is empty: 0 rows arrived in it; "
            f"{files[0].path.parent.parent} holds data of {min(days)} to {max(days)}.",
            "Move the window to days that have data, or deliver the missing partitions dt=YYYY-MM-DD.",
        )
    return footers


def check_items(files: Sequence[RawFile]) -> list[Footer]:
    """Read and check the footers of catalog files.

    Raises:
        DataError: a file is not Parquet, lacks `item_id` or has a column of a wrong type.
    """
    footers = _footers(files)
    for footer in footers:
        _expect(footer, ITEM_ID, _is_text, "string", "Cast the ids to string when writing the file.")
        _expect(footer, TITLE, _is_text, "string", "Write the titles as strings.", required=False)
        _expect(footer, CATEGORY, _is_text, "string", "Write the categories as strings.", required=False)
        _expect(footer, IN_STOCK, pt.is_boolean, "bool", "Write true or false: is the item in stock.", required=False)
        for name in (AVAILABLE_FROM, AVAILABLE_UNTIL):
            remedy = "Write the instants as timestamp[us, tz=UTC]."
            _expect(footer, name, _is_instant, "timestamp with time zone", remedy, required=False)
    return footers


def item_columns(footers: Sequence[Footer]) -> dict[str, str]:
    """Return the columns of the catalog beside id and title that are carried to the export.

    Args:
        footers: from `check_items`.

    Returns:
        Name to Spark type: string, boolean, bigint, double or timestamp. Left out are columns of other types, those
        whose types differ between files by more than the width of numbers, and names that the ETL uses or that differ
        from another one in case only, which Spark does not tell apart.
    """
    found: dict[str, set[str]] = {}
    for footer in footers:
        for name, kind in footer.types.items():
            found.setdefault(name, set()).add(_item_kind(kind))
    folded = Counter(name.casefold() for name in (*found, *_RESERVED))
    kinds = {name: "double" if of == {"bigint", "double"} else of.pop() for name, of in found.items() if _agree(of)}
    return {name: kinds[name] for name in sorted(kinds) if kinds[name] and folded[name.casefold()] == 1}


def _item_kind(kind: pa.DataType) -> str:
    """Return the Spark type by which a column of the catalog is carried, empty where it is not."""
    checks: dict[str, Callable[[pa.DataType], bool]] = {
        "string": _is_text,
        "boolean": pt.is_boolean,
        "bigint": pt.is_signed_integer,
        "double": _is_number,
        "timestamp": _is_instant,
    }
    return next((name for name, accepts in checks.items() if accepts(kind)), "")


def _agree(kinds: set[str]) -> bool:
    return len(kinds) == 1 or kinds == {"bigint", "double"}


def check_features(files: Sequence[RawFile], binary: str = "float32") -> list[Footer]:
    """Read and check the footers of the files of one modality, and the headers of its `.npy` matrices.

    Args:
        files: from `list_features`; a file with the ids of a matrix is read with the matrix.
        binary: number type of vectors that are stored as fixed-size binary.

    Raises:
        DataError: a file is neither Parquet nor a matrix, lacks a column or has a column of a wrong type; a matrix has
            more or fewer rows than ids; or there is no row.
    """
    matrices = [file for file in files if file.path.path.suffix == MATRIX]
    ids = {str(_ids_of(file.path)) for file in matrices}
    footers = _footers([file for file in files if file not in matrices and str(file.path) not in ids])
    for footer in footers:
        kind = footer.types.get(VECTOR)
        if kind is not None and pt.is_fixed_size_binary(kind) and kind.byte_width % np.dtype(binary).itemsize:
            raise DataError(
                f"{footer.file.path} ({footer.num_rows} rows): column {VECTOR!r} is {kind}, which is no row of "
                f"{binary}.",
                "Set features.binary to float16, float32 or float64, or write each item's vector as a list of float32.",
            )
        _expect(footer, ITEM_ID, _is_text, "string", "Cast the ids to string when writing the file.")
        _expect(footer, VECTOR, _is_vector, "list of float32", "Write each item's vector as a list of float32.")
    footers += [_matrix_header(file, files) for file in matrices]
    if not any(footer.num_rows for footer in footers):
        raise DataError(
            f"{files[0].path.parent} has 0 rows in {len(files)} files.",
            "Deliver the features, remove the folder, or set features.modalities to the other modalities.",
        )
    return footers


def read_matrix_rows(path: Location, group: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Yield one group of `GROUP_ROWS` rows of a matrix in batches, with the columns of `schema.FEATURES`."""
    ids = _read_ids(_ids_of(path))
    with path.filesystem.open_input_file(str(path.path)) as file:
        shape, kind = _read_header(file)
        begin = file.tell()
        for first in range(group * GROUP_ROWS, min(shape[0], (group + 1) * GROUP_ROWS), batch_rows):
            count = min(batch_rows, shape[0] - first, (group + 1) * GROUP_ROWS - first)
            row_bytes = shape[1] * kind.itemsize
            file.seek(begin + first * row_bytes)
            data = file.read(count * row_bytes)
            values = np.frombuffer(data, kind, count * shape[1]).astype(np.float32)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), shape[1])
            yield pa.record_batch([ids.slice(first, count), vectors], names=[ITEM_ID, VECTOR])


def read_ids(footer: Footer, column: str = ITEM_ID) -> Iterator[pa.Array]:
    """Yield the ids of a file in batches: a column of a table, or what is in the file beside a matrix.

    Raises:
        DataError: they cannot be read.
    """
    path = footer.file.path
    try:
        if path.path.suffix == MATRIX:
            yield _read_ids(_ids_of(path))
            return
        with open_parquet(path) as parquet:
            for batch in parquet.iter_batches(columns=[column]):
                yield _readable(batch.column(0).cast(pa.string()))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} ({footer.file.size} bytes, row count unknown) has an intact footer but its pages cannot be read: "
            f"{error}.",
            "The file is damaged or was removed meanwhile: deliver it again, or remove it for good.",
        ) from error


def _readable(ids: pa.Array) -> pa.Array:
    """Return text in which bytes that are no UTF-8 are replaced; the ETL sets such rows aside later."""
    try:
        ids.validate(full=True)
        return ids
    except pa.ArrowInvalid:
        told = [None if each is None else each.decode(errors="replace") for each in ids.cast(pa.binary()).to_pylist()]
        return pa.array(told, pa.string())


def ignored_columns(log: Sequence[Footer], catalog: Sequence[Footer]) -> dict[str, list[str]]:
    """Return the columns that are in the files but not read, each with the names of its files."""
    found: dict[str, list[str]] = {}
    carried = {*ITEMS.names, *item_columns(catalog)}
    for footer in (*log, *catalog):
        known = carried if footer.file.day is None else INTERACTIONS.names
        for name in footer.types:
            if name not in known:
                found.setdefault(name, []).append(footer.file.name)
    return dict(sorted(found.items()))


def _ids_of(path: Location) -> Location:
    return path.parent / f"{path.path.stem}.ids.txt"


def _read_ids(path: Location) -> pa.Array:
    with path.filesystem.open_input_file(str(path.path)) as file:
        lines = file.read().decode("utf-8-sig").split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    return pa.array(lines[:-1] if lines[-1] == "" else lines, pa.string())


def _read_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, is_fortran, kind = read(file)
    if is_fortran or len(shape) != 2 or kind.kind not in "fiu" or shape[1] == 0:
        raise ValueError(f"shape {list(shape)} of {kind}{', column by column' if is_fortran else ''}")
    return shape, kind


def _matrix_header(file: RawFile, files: Sequence[RawFile]) -> Footer:
    try:
        with file.path.filesystem.open_input_file(str(file.path.path)) as handle:
            shape, kind = _read_header(handle)
            if handle.tell() + shape[0] * shape[1] * kind.itemsize != file.size:
                raise ValueError(f"{file.size} bytes are not what shape {list(shape)} of {kind} takes")
    except UNREADABLE as error:
        raise DataError(
            f"{file.path} ({file.size} bytes, row count unknown) is no complete matrix of numbers: {error}.",
            "Save it again with numpy.save, one row per item.",
        ) from error
    ids = _ids_of(file.path)
    try:
        found = len(_read_ids(ids)) if str(ids) in {str(each.path) for each in files} else None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{ids} cannot be read: {error}.", "Write one item id a line, in UTF-8.") from error
    if found != shape[0]:
        raise DataError(
            f"{file.path} ({shape[0]} rows) has {'no' if found is None else found} ids in {ids}.",
            f"Write {ids} with the item id of each row of the matrix, one id a line: {shape[0]} lines.",
        )
    groups = -(-shape[0] // GROUP_ROWS)
    return Footer(file, shape[0], groups, {ITEM_ID: pa.string(), VECTOR: pa.list_(pa.float32())})


def _footers(files: Sequence[RawFile]) -> list[Footer]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(_footer, files))


def _footer(file: RawFile) -> Footer:
    try:
        with open_parquet(file.path) as parquet:
            types = {field.name: field.type for field in parquet.schema_arrow if not pt.is_null(field.type)}
            types |= dict.fromkeys(int96_instants(parquet), pa.timestamp("us", "UTC"))
            return Footer(file, parquet.metadata.num_rows, parquet.metadata.num_row_groups, types)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file.path} ({file.size} bytes, row count unknown) is no complete Parquet file: {error}.",
            "Deliver it again as a Parquet file (this one is truncated or of another format), or remove it.",
        ) from error


def _expect(
    footer: Footer,
    column: str,
    accepts: Callable[[pa.DataType], bool],
    expected: str,
    remedy: str,
    required: bool = True,
) -> None:
    found = footer.types.get(column)
    if found is None and required:
        raise DataError(
            f"{footer.file.path} ({footer.num_rows} rows) has no column {column!r}, expected {expected}; "
            f"it has {', '.join(footer.types) or 'none'}.",
            f"Deliver the file again with the column. {remedy}",
        )
    if found is not None and not accepts(found):
        raise DataError(
            f"{footer.file.path} ({footer.num_rows} rows): column {column!r} is {found}, expected {expected}.", remedy
        )


def _is_text(kind: pa.DataType) -> bool:
    if pt.is_dictionary(kind):
        kind = kind.value_type
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)


def _is_instant(kind: pa.DataType) -> bool:
    return pt.is_timestamp(kind) and kind.tz is not None


def _is_number(kind: pa.DataType) -> bool:
    return pt.is_float32(kind) or pt.is_float64(kind) or pt.is_signed_integer(kind)


def _is_vector(kind: pa.DataType) -> bool:
    listed = pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)
    return pt.is_fixed_size_binary(kind) or (listed and _is_any_number(kind.value_type))


def _is_any_number(kind: pa.DataType) -> bool:
    return pt.is_floating(kind) or pt.is_integer(kind) or pt.is_decimal(kind)
