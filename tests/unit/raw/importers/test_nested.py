"""Fields within fields are found by their path, in objects and in columns."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from crane_core.raw.importers.nested import ABSENT, column_at, column_path, field_paths, type_paths, value_at

ROW = {"a": {"b": {"c": 1}, "x": None}, "l": [{"n": 1}, {"m": 2}, {"n": 3}], "a.x": "as it stands", "e": []}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.b.c", 1),
        ("a.b", {"c": 1}),
        ("a.x", "as it stands"),
        ("l.n", [1, None, 3]),
        ("a.x.y", ABSENT),
        ("l.z", ABSENT),
        ("none", ABSENT),
        ("a.none", ABSENT),
        (1, ABSENT),
    ],
)
def test_a_path_gives_the_value_within(name: str | int, expected: Any) -> None:
    assert value_at(ROW, name) is expected if expected is ABSENT else value_at(ROW, name) == expected


def test_the_paths_of_an_object_are_told() -> None:
    assert list(field_paths(ROW)) == ["a", "a.b", "a.b.c", "a.x", "l", "l.n", "a.x", "e"]
    assert list(field_paths([1, "x"])) == []


LISTED = pa.list_(pa.struct([("n", pa.int8())]))
TABLE = pa.table(
    {
        "s": pa.array([{"t": {"u": 1}}, None, {"t": None}], pa.struct([("t", pa.struct([("u", pa.int32())]))])),
        "l": pa.array([[{"n": 1}, None], None, []], LISTED),
        "f": pa.array([[{"n": 1}], None, [{"n": 2}]], pa.list_(LISTED.value_type, 1)),
        "s.t": ["x", "y", "z"],
    }
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s.t.u", [1, None, None]),
        ("l.n", [[1, None], None, []]),
        ("f.n", [[1], None, [2]]),
        ("s.t", ["x", "y", "z"]),
        (4, ["x", "y", "z"]),
    ],
)
def test_a_path_gives_the_column_within(name: str | int, expected: list[Any]) -> None:
    found = column_path(TABLE.schema, name)
    assert found is not None
    for start in (0, 1):
        column = TABLE[found[0]].combine_chunks().slice(start)
        assert column_at(column, found[1]).to_pylist() == expected[start:]


@pytest.mark.parametrize("name", ["s.x", "l.n.x", "none", "none.x", "s.t.u.v", 0, 5])
def test_a_path_that_leads_nowhere_is_none(name: str | int) -> None:
    assert column_path(TABLE.schema, name) is None


def test_the_paths_of_a_table_are_told() -> None:
    assert list(type_paths(TABLE.schema)) == ["s", "s.t", "l", "l.n", "f", "f.n", "s.t"]
