from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crane_core.config import Etl, RunConfig, Window
from crane_core.errors import ConfigError, DataError
from crane_core.raw.checks import check_features, check_interactions, check_items, read_matrix_rows
from crane_core.raw.files import list_features, list_interactions, list_items, raw_root
from crane_core.schema import INTERACTIONS
from tests.worlds.raw_data import at, write_day, write_items, write_vectors


def window(start: str, end: str) -> Window:
    return Window.model_validate({"start": start, "end": end})


def config(raw: str | None) -> RunConfig:
    return RunConfig.model_validate({"window": {"start": "2026-01-05", "end": "2026-01-06"}, "runtime": {"raw": raw}})


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for day in ("2026-01-03", "2026-01-04", "2026-01-05", "2026-01-06"):
        write_day(tmp_path, day, [("a", "x", at(day))])
    return tmp_path


@pytest.mark.parametrize(
    ("end", "history", "expected"),
    [
        ("2026-01-06", None, [3, 4, 5]),
        ("2026-01-06", 2, [4, 5]),
        ("2026-01-06", 1, [5]),
        ("2026-01-05", None, [3, 4]),
        ("2026-01-05T00:00:01", None, [3, 4, 5]),
        ("2026-01-05T12:00", 1, [4, 5]),
        ("2026-02-01", None, [3, 4, 5, 6]),
    ],
)
def test_partitions_of_the_days_before_the_end_are_read(
    raw: Path, end: str, history: int | None, expected: list[int]
) -> None:
    files = list_interactions(raw, window("2026-01-01", end), Etl(history_days=history))
    assert [file.day for file in files] == [date(2026, 1, day) for day in expected]


def test_identity_names_size_and_time_of_every_file(raw: Path) -> None:
    path = write_day(raw, "2026-01-05", [("a", "x", at("2026-01-05"))], name="b.parquet")
    os.utime(path, ns=(0, 123))
    (path.parent / "_SUCCESS").touch()
    (path.parent / ".b.parquet.crc").touch()
    (raw / "interactions" / ".staging").mkdir()
    (raw / "interactions" / ".staging" / "c.parquet").touch()
    files = list_interactions(raw, window("2026-01-05", "2026-01-06"), Etl(history_days=1))
    assert [file.name for file in files] == [
        f"interactions/dt=2026-01-05/{name}" for name in ("b.parquet", "part-0.parquet")
    ]
    assert files[0].identity == ["interactions/dt=2026-01-05/b.parquet", path.stat().st_size, 123]


@pytest.mark.parametrize(
    "name", ["dt=2026-13-01", "dt=yesterday", "2026-01-05", "dt=20260105", "dt=__HIVE_DEFAULT_PARTITION__"]
)
def test_folders_that_are_no_day_are_refused(raw: Path, name: str) -> None:
    (raw / "interactions" / name).mkdir()
    with pytest.raises(DataError, match=rf"{name} \(a folder, row count unknown\) is no daily partition.*Remedy: Move"):
        list_interactions(raw, window("2026-01-05", "2026-01-06"), Etl())


def test_stray_files_are_refused(raw: Path) -> None:
    (raw / "interactions" / "dt=2026-01-01").write_text("12345")
    with pytest.raises(DataError, match=r"dt=2026-01-01 \(5 bytes, row count unknown\) is no daily partition"):
        list_interactions(raw, window("2026-01-05", "2026-01-06"), Etl())


def test_nothing_before_the_end_is_an_error(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(DataError, match="it holds 4 daily partitions, 2026-01-03 to 2026-01-06"):
        list_interactions(raw, window("2025-01-05", "2025-01-06"), Etl())
    with pytest.raises(DataError, match="it holds no daily partition"):
        list_interactions(tmp_path_factory.mktemp("empty"), window("2026-01-05", "2026-01-06"), Etl())


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


def test_modalities_are_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no modality, 0 rows of item features"):
        list_features(tmp_path, ())
    for name in ("text", "image"):
        write_vectors(tmp_path, name, [("a", [1.0])])
    assert list(list_features(tmp_path, ())) == ["image", "text"]
    assert [file.name for file in list_features(tmp_path, ("text",))["text"]] == ["features/text/part-0.parquet"]
    with pytest.raises(ConfigError, match=r"asks for sound; .* holds image, text"):
        list_features(tmp_path, ("sound",))
    (tmp_path / "features" / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no file, 0 rows"):
        list_features(tmp_path, ())


def test_vectors_must_be_lists_of_floating_numbers(tmp_path: Path) -> None:
    path = write_vectors(tmp_path, "text", [("a", [1.0])], pa.list_(pa.float16()))
    assert check_features(list_features(tmp_path, ())["text"])[0].num_row_groups == 1
    pq.write_table(pa.table({"item_id": ["a"], "vector": [[1]]}), path)
    with pytest.raises(DataError, match=r"\(1 rows\): column 'vector' is list<\w+: int64>, expected list of float32"):
        check_features(list_features(tmp_path, ())["text"])
    pq.write_table(
        pa.table({"item_id": pa.array([], pa.string()), "vector": pa.array([], pa.list_(pa.float32()))}), path
    )
    with pytest.raises(DataError, match="has 0 rows in 1 files"):
        check_features(list_features(tmp_path, ())["text"])


def test_raw_data_are_on_a_disk_or_on_s3(tmp_path: Path) -> None:
    assert str(raw_root(config(str(tmp_path)), "/somewhere")) == str(tmp_path)
    assert str(raw_root(config(tmp_path.as_uri()), "/somewhere")) == str(tmp_path)
    (tmp_path / "raw").mkdir()
    assert str(raw_root(config(None), str(tmp_path))) == str(tmp_path / "raw")
    with pytest.raises(ConfigError, match="expected a local path or s3://bucket/prefix"):
        raw_root(config("hdfs://name/raw"), "/somewhere")
    with pytest.raises(DataError, match=r"There is no raw data at .*absent, 0 rows"):
        raw_root(config(str(tmp_path / "absent")), "/somewhere")


def write_matrix(folder: Path, name: str, rows: Any, ids: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}.npy", rows)
    (folder / f"{name}.ids.txt").write_text("".join(f"{item}\n" for item in ids))
    return folder / f"{name}.npy"


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
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


@pytest.mark.parametrize(
    ("rows", "ids", "damage", "expected"),
    [
        (np.ones((2, 2)), ["a"], None, r"\(2 rows\) has 1 ids"),
        (np.ones((2, 2)), ["a", "b"], "ids", r"\(2 rows\) has no ids"),
        (np.ones((2, 2)), ["a", "b"], "cut", "no complete matrix of floating numbers: .* bytes are not what"),
        (np.ones((2, 2)), ["a", "b"], "garbage", "no complete matrix"),
        (np.ones((2, 2), dtype=int), ["a", "b"], None, "no complete matrix .* of int64"),
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
