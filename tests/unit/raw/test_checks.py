"""Checks of footers and of matrix headers: types, missing columns, empty windows, damaged files."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crane_core.config import Etl
from crane_core.errors import DataError
from crane_core.raw.checks import check_features, check_interactions, check_items, read_ids, read_matrix_rows
from crane_core.raw.files import list_features, list_interactions, list_items
from crane_core.schema import INTERACTIONS
from tests.worlds.raw_data import at, window, write_day, write_four_days, write_items, write_vectors


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_four_days(tmp_path)


def test_window_without_a_row_is_an_error(raw: Path) -> None:
    checked = window("2026-01-07", "2026-01-09")
    write_day(raw, "2026-01-08", [])
    with pytest.raises(DataError, match=r"is empty: 0 rows arrived in it; .* holds data of 2026-01-03 to 2026-01-08"):
        check_interactions(list_interactions(raw, checked, Etl()), checked, Etl())
    part_of_a_day = window("2026-01-06T18:00", "2026-01-09")
    footers = check_interactions(list_interactions(raw, part_of_a_day, Etl()), part_of_a_day, Etl())
    assert sum(footer.num_rows for footer in footers) == 4


@pytest.mark.parametrize(
    ("column", "kind", "is_fine"),
    [
        ("user_id", pa.large_string(), True),
        ("user_id", pa.dictionary(pa.int32(), pa.string()), True),
        ("user_id", pa.int32(), False),
        ("user_id", pa.binary(), False),
        ("event_time", pa.timestamp("ms", "UTC"), True),
        ("event_time", pa.timestamp("ns", "Europe/Zurich"), True),
        ("event_time", pa.timestamp("us"), False),
        ("event_time", pa.date32(), False),
        ("weight", pa.float64(), True),
        ("weight", pa.int16(), True),
        ("weight", pa.null(), True),
        ("weight", pa.string(), False),
        ("label", pa.int64(), True),
        ("label", pa.float32(), False),
        ("label", pa.null(), False),
    ],
)
def test_types_that_lose_nothing_are_accepted(tmp_path: Path, column: str, kind: pa.DataType, is_fine: bool) -> None:
    path = write_day(tmp_path, "2026-01-05", [("a", "x", at("2026-01-05"), 1.0, 0)])
    table = pq.read_table(path, partitioning=None)
    index = table.column_names.index(column)
    values = pa.array([None] * table.num_rows, pa.string() if pa.types.is_dictionary(kind) else kind)
    values = values.dictionary_encode() if pa.types.is_dictionary(kind) else values
    pq.write_table(table.set_column(index, pa.field(column, values.type), values), path)
    checked = window("2026-01-05", "2026-01-06")
    files = list_interactions(tmp_path, checked, Etl())
    if is_fine:
        assert check_interactions(files, checked, Etl(split="label"))[0].num_rows == 1
    else:
        with pytest.raises(DataError, match=rf"part-0\.parquet \(1 rows\).*{column!r}.*Remedy: "):
            check_interactions(files, checked, Etl(split="label"))


def test_optional_columns_may_be_absent(tmp_path: Path) -> None:
    schema = pa.schema(list(INTERACTIONS)[:3])
    write_day(tmp_path, "2026-01-05", [("a", "x", at("2026-01-05"))], schema)
    checked = window("2026-01-05", "2026-01-06")
    files = list_interactions(tmp_path, checked, Etl())
    assert set(check_interactions(files, checked, Etl())[0].types) == set(schema.names)
    with pytest.raises(
        DataError, match=r"\(1 rows\) has no column 'label', expected int8; it has user_id, item_id, event_time"
    ):
        check_interactions(files, checked, Etl(split="label"))


def test_catalog_is_optional_but_must_be_right(tmp_path: Path) -> None:
    assert check_items(list_items(tmp_path)) == []
    path = write_items(tmp_path, [("a", "A")])
    assert check_items(list_items(tmp_path))[0].num_rows == 1
    pq.write_table(pa.table({"item_id": ["a"], "title": [1]}), path)
    with pytest.raises(DataError, match=r"\(1 rows\): column 'title' is int64, expected string"):
        check_items(list_items(tmp_path))


@pytest.mark.parametrize("kind", [pa.float16(), pa.float64(), pa.int8(), pa.uint64(), pa.decimal128(5, 2)])
def test_vectors_are_lists_of_any_numbers(tmp_path: Path, kind: pa.DataType) -> None:
    rows = [("a", [1, 2]), ("b", None)]
    number = Decimal if pa.types.is_decimal(kind) else int
    rows = [(item, row and [number(each) for each in row]) for item, row in rows]
    for listed in (pa.list_(kind), pa.large_list(kind), pa.list_(kind, 2)):
        write_vectors(tmp_path, "text", rows, listed)
        assert check_features(list_features(tmp_path, ())["text"])[0].num_row_groups == 1


def test_vectors_must_be_lists_of_numbers(tmp_path: Path) -> None:
    path = write_vectors(tmp_path, "text", [("a", [1.0])])
    pq.write_table(pa.table({"item_id": ["a"], "vector": [["1"]]}), path)
    with pytest.raises(DataError, match=r"\(1 rows\): column 'vector' is list<\w+: string>, expected list of float32"):
        check_features(list_features(tmp_path, ())["text"])
    pq.write_table(
        pa.table({"item_id": pa.array([], pa.string()), "vector": pa.array([], pa.list_(pa.float32()))}), path
    )
    with pytest.raises(DataError, match="has 0 rows in 1 files"):
        check_features(list_features(tmp_path, ())["text"])


def write_matrix(folder: Path, name: str, rows: Any, ids: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}.npy", rows)
    (folder / f"{name}.ids.txt").write_text("".join(f"{item}\n" for item in ids))
    return folder / f"{name}.npy"


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int16, np.uint64])
def test_matrices_with_ids_are_features(tmp_path: Path, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crane_core.raw.checks.GROUP_ROWS", 3)
    rows = np.arange(14, dtype=kind).reshape(7, 2)
    write_matrix(tmp_path / "features" / "image", "a", rows, list("abcdefg"))
    write_vectors(tmp_path, "image", [("z", [1.0, 2.0])])
    footers = check_features(list_features(tmp_path, ())["image"])
    assert [(footer.file.path.name, footer.num_rows, footer.num_row_groups) for footer in footers] == [
        ("part-0.parquet", 1, 1),
        ("a.npy", 7, 3),
    ]
    batches = [batch for group in range(3) for batch in read_matrix_rows(footers[1].file.path, group, 2)]
    assert [batch.num_rows for batch in batches] == [2, 1, 2, 1, 1]
    assert [item for batch in batches for item in batch.column(0).to_pylist()] == list("abcdefg")
    assert [vector for batch in batches for vector in batch.column(1).to_pylist()] == rows.tolist()


def test_ids_of_a_matrix_may_have_a_mark_and_ends_of_windows(tmp_path: Path) -> None:
    path = write_matrix(tmp_path / "features" / "image", "a", np.ones((2, 1)), [])
    (path.parent / "a.ids.txt").write_bytes(b"\xef\xbb\xbfi1\r\ni2\r\n")
    footer = check_features(list_features(tmp_path, ())["image"])[0]
    assert [ids.to_pylist() for ids in read_ids(footer)] == [["i1", "i2"]]


def test_old_timestamps_of_spark_are_instants(tmp_path: Path) -> None:
    rows = [("a", "x", at("2026-01-05"), 1.0, 0)]
    path = write_day(tmp_path, "2026-01-05", rows)
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table, path, use_deprecated_int96_timestamps=True, store_schema=False)
    checked = window("2026-01-05", "2026-01-06")
    footers = check_interactions(list_interactions(tmp_path, checked, Etl()), checked, Etl())
    assert footers[0].types["event_time"] == pa.timestamp("us", "UTC")


@pytest.mark.parametrize(
    ("rows", "ids", "damage", "expected"),
    [
        (np.ones((2, 2)), ["a"], None, r"\(2 rows\) has 1 ids"),
        (np.ones((2, 2)), ["a", "b"], "ids", r"\(2 rows\) has no ids"),
        (np.ones((2, 2)), ["a", "b"], "cut", "no complete matrix of numbers: .* bytes are not what"),
        (np.ones((2, 2)), ["a", "b"], "garbage", "no complete matrix"),
        (np.ones((2, 2), dtype=complex), ["a", "b"], None, "no complete matrix .* of complex128"),
        (np.ones(4), list("abcd"), None, "no complete matrix"),
        (np.asfortranarray(np.ones((2, 3))), ["a", "b"], None, "column by column"),
        (np.array([[object()]]), ["a"], None, "no complete matrix"),
    ],
)
def test_wrong_matrices_are_errors(tmp_path: Path, rows: Any, ids: list[str], damage: str, expected: str) -> None:
    path = write_matrix(tmp_path / "features" / "image", "a", rows, ids)
    if damage == "ids":
        (path.parent / "a.ids.txt").unlink()
    elif damage:
        path.write_bytes(path.read_bytes()[:-3] if damage == "cut" else b"\x93NUMPY\x09\x09 nonsense")
    with pytest.raises(DataError, match=expected):
        check_features(list_features(tmp_path, ())["image"])


def test_binary_vectors_must_be_whole_numbers_of_numbers(tmp_path: Path) -> None:
    write_vectors(tmp_path, "text", [("a", b"123456")], pa.binary(6))
    files = list_features(tmp_path, ())["text"]
    assert check_features(files, "float16")[0].num_rows == 1
    with pytest.raises(DataError, match="no row of float32"):
        check_features(files)
