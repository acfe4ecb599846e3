"""Find fields within fields, such as `user.id`, in objects of JSON and in struct columns of Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

ABSENT: Any = object()
"""Value of a field that an object does not have."""
_DEPTH = 3


def value_at(row: Mapping[str, Any], name: str | int) -> Any:
    """Return a field of an object of JSON, `ABSENT` where there is none.

    Args:
        row: the object.
        name: of the field; with dots, of a field within it. The name as it stands comes first.
    """
    if isinstance(name, int):
        return ABSENT
    return row[name] if name in row else _within(row, name.split("."))


def _within(value: Any, steps: Sequence[str]) -> Any:
    """Return the value at the end of a path; a list on the way gives the list of the values of its members."""
    for index, step in enumerate(steps):
        if isinstance(value, list):
            found = [_within(each, steps[index:]) for each in value]
            return ABSENT if found and all(each is ABSENT for each in found) else [_known(each) for each in found]
        if not isinstance(value, dict) or step not in value:
            return ABSENT
        value = value[step]
    return value


def _known(value: Any) -> Any:
    return None if value is ABSENT else value


def field_paths(value: Any, prefix: str = "", depth: int = _DEPTH) -> Iterator[str]:
    """Yield the names of the fields of an object, and of the fields within them down to a depth."""
    if isinstance(value, list):
        value = next((each for each in value if isinstance(each, dict)), None)
    if not isinstance(value, dict) or depth == 0:
        return
    for name, inner in value.items():
        yield f"{prefix}{name}"
        yield from field_paths(inner, f"{prefix}{name}.", depth - 1)


def column_path(schema: pa.Schema, name: str | int) -> tuple[str, list[str]] | None:
    """Return the column of a Parquet file that a name or position means, and the steps within it; None without one."""
    names = schema.names
    if isinstance(name, int):
        return (names[name - 1], []) if 1 <= name <= len(names) else None
    if name in names:
        return name, []
    root, *steps = name.split(".")
    if root not in names or not steps or names.count(root) > 1:
        return None
    kind = schema.field(root).type
    for step in steps:
        kind = kind.value_type if _is_list(kind) else kind
        if not pt.is_struct(kind) or kind.get_field_index(step) < 0:
            return None
        kind = kind.field(step).type
    return root, steps


def type_paths(schema: pa.Schema) -> Iterator[str]:
    """Yield the names of the columns, and of the fields of struct columns."""
    for column in schema:
        yield column.name
        kind = column.type.value_type if _is_list(column.type) else column.type
        if pt.is_struct(kind):
            yield from (f"{column.name}.{kind.field(index).name}" for index in range(kind.num_fields))


def column_at(values: pa.Array, steps: Sequence[str]) -> pa.Array:
    """Return the values at the end of a path within a column; in a list, the list of those of its members."""
    if not steps:
        return values
    if _is_list(values.type):
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
        offsets = pa.array(np.cumsum([0, *lengths]).astype(np.int64))
        members = column_at(pc.list_flatten(values), steps)
        return pa.LargeListArray.from_arrays(offsets, members, mask=values.is_null())
    return column_at(pc.struct_field(values, [steps[0]]), steps[1:])


def _is_list(kind: pa.DataType) -> bool:
    return pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)
