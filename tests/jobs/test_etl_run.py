"""Run the ETL jobs through their command lines, on raw data written by hand, sound and broken."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from crane_core.config_file import load_config
from crane_core.errors import EXIT_CONFIG, EXIT_DATA, EXIT_OK
from crane_core.raw.importers import import_mapped, import_mmrec
from crane_core.schema import INTERACTIONS
from crane_core.stages import STAGES
from crane_core.storage.artifacts import Artifact
from jobs.etl import features, interactions, profiles
from jobs.etl.stages import interactions as log_stage
from jobs.etl.stages.features import describe, write_matrix
from jobs.stores import open_store
from tests.worlds.raw_data import at, write_day, write_items, write_log, write_vectors

LFM2K = Path(__file__).parents[3] / "shared" / "data" / "lfm2k"
JOBS = {"interactions": interactions, "features": features, "profiles": profiles}
SETTINGS = {
    "window.start": "2026-01-20",
    "window.end": "2026-01-21",
    "etl.validation_days": "2",
    "etl.test_days": "2",
    "features.standardise": "zscore",
}
LOG = [
    ("ann", "i1", "2026-01-10 10:00"),
    ("ann", "i2", "2026-01-11 10:00"),
    ("bob", "i1", "2026-01-11 11:00"),
    ("bob", "i3", "2026-01-12 11:00"),
    ("cat", "i3", "2026-01-13 11:00"),
    ("cat", "i2", "2026-01-17 11:00"),
    ("ann", "i3", "2026-01-18 11:00"),
    ("bob", "i4", "2026-01-19 11:00"),
    ("ann", "i9", "2026-01-19 12:00"),
    ("dan", "i1", "2026-01-20 11:00"),
]
"""i4 is in the catalog but cold; i9 is in no catalog, dan has no training row."""
VECTORS = [("i1", [1.0, 0.0]), ("i2", [3.0, 4.0]), ("i3", [0.0, 2.0]), ("i4", [5.0, 5.0])]


def etl(store: Path, raw: Path, stages: tuple[str, ...] = tuple(JOBS), run: str = "r", **settings: str) -> int:
    """Run stages in-process and return the first exit code that is not 0."""
    chosen = {**SETTINGS, "runtime.raw": str(raw), **{key.replace("__", "."): value for key, value in settings.items()}}
    flags = [flag for key, value in chosen.items() for flag in ("--set", f"{key}={value}")]
    for stage in stages:
        code = JOBS[stage].main(["--store", str(store), "--run", run, *flags])
        if code != EXIT_OK:
            return code
    return EXIT_OK


def artifact(store: Path, stage: str, run: str = "r") -> Artifact:
    return open_store(str(store)).artifact(run, f"etl.{stage}")


def rows_of(artifact: Artifact, table: str) -> list[dict[str, Any]]:
    return pq.read_table(artifact.path / table).to_pylist()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw data, shared: no test may change it."""
    folder = tmp_path_factory.mktemp("given") / "raw"
    write_log(folder, LOG)
    write_items(folder, [(f"i{n}", f"Item {n}") for n in (4, 3, 2, 1)])
    write_vectors(folder, "text", VECTORS)
    write_vectors(folder, "image", [(item, [7.0]) for item, _ in VECTORS[:2]])
    return folder


@pytest.fixture
def raw(given: Path, tmp_path: Path) -> Path:
    """A copy with the times of its files, so that the fingerprint is the same until a test changes something."""
    return shutil.copytree(given, tmp_path / "raw")


@pytest.fixture(scope="module")
def reference(spark: SparkSession, given: Path) -> Path:
    """A store in which run `r` over the raw data is complete."""
    store = given.parent / "store"
    assert etl(store, given) == EXIT_OK
    return store


@pytest.mark.spark
def test_a_run_leaves_exactly_these_rows(reference: Path) -> None:
    found = artifact(reference, "interactions")
    assert rows_of(found, "users") == [
        {"user_idx": n, "user_id": name, "state": "trained"} for n, name in enumerate(("ann", "bob", "cat"))
    ]
    assert rows_of(found, "items") == [
        {"item_idx": n - 1, "item_id": f"i{n}", "title": f"Item {n}", "state": "cold" if n == 4 else "trained"}
        for n in (1, 2, 3, 4)
    ]
    placed = [(row["user_idx"], row["item_idx"], row["split"], row["weight"]) for row in rows_of(found, "interactions")]
    assert sorted(placed) == [
        (0, 0, 0, 1.0),
        (0, 1, 0, 1.0),
        (0, 2, 1, 1.0),
        (1, 0, 0, 1.0),
        (1, 2, 0, 1.0),
        (1, 3, 2, 1.0),
        (2, 1, 1, 1.0),
        (2, 2, 0, 1.0),
    ]
    schema = pq.read_schema(next((found.path / "interactions").iterdir()))
    assert [str(kind) for kind in schema.types] == ["int32", "int32", "timestamp[us, tz=UTC]", "float", "int8"]
    cold = sorted((row["user_id"], row["user_idx"], row["item_idx"], row["reason"]) for row in rows_of(found, "cold"))
    assert cold == [("ann", 0, None, "unknown_item"), ("dan", None, 0, "unknown_user")]
    counted = ("num_rows_read", "num_train", "num_validation", "num_test", "num_cold_rows", "quarantine")
    assert [found.facts[name] for name in counted] == [10, 5, 2, 1, 2, {}]
    quality = json.loads(found.file("quality.json").read_text())
    assert quality["events_per_day"]["2026-01-11"] == 2
    assert quality["density"] == 5 / 9

    matrices = artifact(reference, "features")
    train = np.array([vector for _, vector in VECTORS[:3]])
    expected = (np.array([vector for _, vector in VECTORS]) - train.mean(axis=0)) / train.std(axis=0)
    matrix = np.load(matrices.file("text/matrix.npy"))
    np.testing.assert_allclose(matrix, expected, rtol=1e-6)
    assert matrix.dtype == np.float32 and matrix.flags.c_contiguous
    assert np.load(matrices.file("image/mask.npy")).tolist() == [True, True, False, False]
    assert np.load(matrices.file("image/matrix.npy")).tolist() == [[0], [0], [0], [0]]
    fitted = np.load(matrices.file("text/standardisation.npz"))
    np.testing.assert_array_equal(fitted["mean"], train.mean(axis=0))

    sums = artifact(reference, "profiles")
    np.testing.assert_allclose(
        np.load(sums.file("text.npy")), [matrix[0] + matrix[1], matrix[0] + matrix[2], matrix[2]], rtol=1e-6
    )
    assert np.load(sums.file("image.counts.npy")).tolist() == [2, 1, 0]
    assert np.load(sums.file("image.npy"))[2].tolist() == [0]


@pytest.mark.spark
def test_late_and_regrouped_rows_give_the_same_content(reference: Path, tmp_path: Path) -> None:
    """A second run from scratch: every row in another file, in another order, some late."""
    other = tmp_path / "other"
    for number, (user, item, instant) in enumerate(reversed(LOG)):
        late = at(instant) + timedelta(days=number % 3)
        day = min(late, at("2026-01-20")).date().isoformat()
        write_day(other, day, [(user, item, at(instant))], name=f"{number}.parquet")
    write_items(other, [(f"i{n}", f"Item {n}") for n in (1, 3, 2, 4)])
    write_vectors(other, "text", VECTORS[::-1])
    write_vectors(other, "image", [(item, [7.0]) for item, _ in VECTORS[:2]])
    assert etl(tmp_path / "store", other) == EXIT_OK
    for stage in JOBS:
        first, second = artifact(reference, stage), artifact(tmp_path / "store", stage)
        assert first.manifest["content"] == second.manifest["content"], stage
    assert artifact(reference, "interactions").fingerprint != artifact(tmp_path / "store", "interactions").fingerprint


@pytest.mark.spark
def test_finished_stages_are_found_again(reference: Path, given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert etl(reference, given, run="again") == EXIT_OK
    statuses = [json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()]
    assert statuses == ["found"] * 3


@pytest.mark.spark
def test_a_planted_future_row_changes_nothing_before_the_cutoff(reference: Path, raw: Path, tmp_path: Path) -> None:
    write_log(raw, [("eve", "i1", "2026-01-21 00:00"), ("ann", "i4", "2026-01-22 00:00")])
    write_day(
        raw,
        "2026-01-20",
        [
            ("ann", "i4", at("2026-01-21 00:00")),
            ("aaa", "i2", at("2026-01-20 23:59")),
            ("ann", "new", at("2026-01-19 01:00")),
            ("cat", "i1", at("2026-01-18 23:00")),
        ],
        name="planted.parquet",
    )
    assert etl(tmp_path / "planted", raw) == EXIT_OK

    def before_cutoff(store: Path) -> list[Any]:
        log, matrices, sums = (artifact(store, stage) for stage in JOBS)
        train = [row for row in rows_of(log, "interactions") if row["split"] == 0]
        files = [sums.file(f"{name}.npy").read_bytes() for name in ("text", "image")]
        files += [matrices.file(f"text/{name}").read_bytes() for name in ("matrix.npy", "standardisation.npz")]
        train = sorted(train, key=lambda row: (row["user_idx"], row["item_idx"]))
        return [rows_of(log, "users"), rows_of(log, "items"), train, files]

    assert before_cutoff(tmp_path / "planted") == before_cutoff(reference)
    facts = artifact(tmp_path / "planted", "interactions").facts
    assert facts["num_rows_read"] == 14
    assert facts["quarantine"] == {"after_cutoff": 1}
    assert facts["cold"] == {"unknown_item": 2, "unknown_user": 2}
    assert facts["num_validation"] == 3


@pytest.mark.spark
def test_every_row_read_is_kept_or_counted(spark: SparkSession, raw: Path, tmp_path: Path) -> None:
    loose = pa.schema([pa.field(field.name, field.type) for field in INTERACTIONS])
    dirty = [
        (None, "i1", at("2026-01-12"), 1.0),
        ("", "i1", at("2026-01-12"), 1.0),
        ("ann", "i1", None, 1.0),
        ("ann", "i1", at("2026-01-12"), float("nan")),
        ("ann", "i1", at("2026-01-12"), -2.0),
        ("ann", "i1", at("2026-01-13"), 1.0),
        ("ann", "i1", at("2026-01-01"), 1.0),
        ("ann", "i1", at("2026-01-12"), 0.5),
        ("ann", "i1", at("2026-01-12"), 1.0),
        ("ann", "i1", at("2026-01-12"), 1.0),
        ("zed", "i1", at("2026-01-12"), 1.0),
        ("bob", "i2", at("2026-01-12"), 1.0),
    ]
    write_day(raw, "2026-01-12", dirty, loose, "dirty.parquet")
    assert etl(tmp_path / "store", raw, ("interactions",), etl__min_weight="0.9", etl__k_core="2") == EXIT_OK
    facts = artifact(tmp_path / "store", "interactions").facts
    assert facts["quarantine"] == {
        "after_arrival": 1,
        "below_min_weight": 1,
        "duplicate": 1,
        "empty_id": 1,
        "k_core": 3,
        "negative_weight": 1,
        "non_finite_weight": 1,
        "null_event_time": 1,
        "null_id": 1,
        "repeat": 1,
        "too_late": 1,
    }
    assert (facts["num_rows_read"], facts["num_train"], facts["num_users"], facts["num_train_items"]) == (22, 4, 2, 2)
    assert facts["cold"] == {"unknown_item": 1, "unknown_user": 2}
    assert (facts["num_validation"], facts["num_test"]) == (1, 1)


@pytest.mark.spark
def test_malformed_majority_stops_the_run(
    spark: SparkSession, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_day(raw, "2026-01-20", [("ann", f"i{n}", at("2026-01-01")) for n in range(11)], name="old.parquet")
    assert etl(tmp_path / "store", raw, ("interactions",)) == EXIT_DATA
    message = capsys.readouterr().err
    assert "11 of 21 rows are malformed (too_late 11), most of them in dt=2026-01-20 (11 rows)" in message
    assert "Remedy: " in message and "etl.lookback_days" in message


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def retype(name: str, kind: pa.DataType, values: list[Any] | None = None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        table = pq.read_table(path, partitioning=None)
        column = pa.array([1] * table.num_rows, kind) if values is None else pa.array(values, kind)
        pq.write_table(table.set_column(table.column_names.index(name), name, column), path)

    return change


def drop(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        pq.write_table(pq.read_table(path, partitioning=None).drop_columns([name]), path)

    return change


DAY = "interactions/dt=2026-01-12/part-0.parquet"


@pytest.mark.parametrize(
    ("file", "damage", "settings", "expected"),
    [
        (DAY, drop("event_time"), {}, "(1 rows) has no column 'event_time', expected timestamp with time zone"),
        (DAY, drop("label"), {"etl__split": "label"}, "(1 rows) has no column 'label', expected int8"),
        (DAY, retype("item_id", pa.int64()), {}, "(1 rows): column 'item_id' is int64, expected string"),
        (DAY, retype("event_time", pa.timestamp("us")), {}, "(1 rows): column 'event_time' is timestamp[us], expected"),
        (DAY, retype("event_time", pa.int64()), {}, "(1 rows): column 'event_time' is int64, expected timestamp"),
        (DAY, retype("weight", pa.string(), ["1"]), {}, "(1 rows): column 'weight' is string, expected float32"),
        (DAY, truncate, {}, "bytes, row count unknown) is no complete Parquet file"),
        (DAY, lambda path: path.write_bytes(b""), {}, "(0 bytes, row count unknown) is no complete Parquet file"),
        (DAY, lambda path: path.write_text("user_id,item_id\n"), {}, "(16 bytes, row count unknown) is no complete"),
        ("items/part-0.parquet", drop("item_id"), {}, "(4 rows) has no column 'item_id', expected string"),
        ("items/part-0.parquet", truncate, {}, "row count unknown) is no complete Parquet file"),
    ],
)
def test_wrong_files_stop_the_run_before_spark_starts(
    raw: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    damage: Callable[[Path], None],
    settings: dict[str, str],
    expected: str,
) -> None:
    monkeypatch.setattr(log_stage, "open_session", lambda *_: pytest.fail("Spark was started"))
    damage(raw / file)
    assert etl(tmp_path / "store", raw, ("interactions",), **settings) == EXIT_DATA
    message = capsys.readouterr().err
    assert f"{raw / file} {expected}" in message or (str(raw / file) in message and expected in message)
    assert "error=DataError" in message and "Remedy: " in message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"window.start": "2026-01-21", "window.end": "2026-01-22"}, "is empty: 0 rows arrived in it"),
        ({"window.start": "2025-01-21", "window.end": "2025-01-22"}, "(0 rows): it holds 8 daily partitions"),
        ({"etl.history_days": "1", "window.start": "2026-02-01", "window.end": "2026-02-02"}, "history_days is 1"),
    ],
)
def test_empty_window_is_an_error(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, str], expected: str
) -> None:
    chosen = {key.replace(".", "__"): value for key, value in settings.items()}
    assert etl(tmp_path / "store", raw, ("interactions",), **chosen) == EXIT_DATA
    message = capsys.readouterr().err
    assert expected in message and str(raw / "interactions") in message and "Remedy: Move the window" in message


@pytest.mark.spark
def test_no_training_rows_is_an_error(
    spark: SparkSession, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert etl(tmp_path / "store", raw, ("interactions",), etl__validation_days="30") == EXIT_DATA
    assert "10 rows read, 0 usable training rows before the validation period starts at" in capsys.readouterr().err


@pytest.mark.spark
def test_pages_damaged_behind_an_intact_footer_name_the_file(
    reference: Path, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert etl(reference, raw, ("interactions",), run="damaged") == EXIT_OK
    for stage, name in (("features", "features/text/part-0.parquet"), ("interactions", DAY)):
        path = raw / name
        data = bytearray(path.read_bytes())
        footer = int.from_bytes(data[-8:-4], "little") + 8
        data[4:-footer] = b"\xff" * (len(data) - footer - 4)
        path.write_bytes(data)
        assert etl(reference, raw, (stage,), run="damaged") == EXIT_DATA
        message = capsys.readouterr().err
        assert f"{path} ({len(data)} bytes, row count unknown) has an intact footer" in message


@pytest.mark.spark
def test_bad_vectors_are_quarantined_and_counted(reference: Path, raw: Path) -> None:
    write_vectors(
        raw,
        "text",
        [
            *VECTORS[:3],
            ("i4", [float("nan"), 1.0]),
            ("i4", [1.0, float("inf")]),
            ("i4", [1.0, 2.0, 3.0]),
            ("i2", [3.0, 4.0]),
            ("i2", [9.0, 9.0]),
            ("i77", [1.0, 1.0]),
            (None, [1.0, 1.0]),
            (" ", [1.0, 1.0]),
            ("i4", None),
            ("i1", []),
        ],
    )
    settings = {"features__max_quarantine_share": "0.6", "features__standardise": "none"}
    assert etl(reference, raw, ("interactions", "features"), run="dirty", **settings) == EXIT_OK
    found = artifact(reference, "features", "dirty")
    assert found.facts["quarantine"]["text"] == {
        "duplicate_item": 2,
        "empty_id": 1,
        "non_finite": 2,
        "null_id": 1,
        "null_vector": 2,
        "unknown_item": 1,
        "wrong_length": 1,
    }
    assert found.facts["modalities"]["text"] == {
        "dim": 2,
        "present": 3,
        "missing": 1,
        "num_rows_read": 13,
        "trained_coverage": 1.0,
        "zeroed": 0,
    }
    assert np.load(found.file("text/matrix.npy")).tolist() == [[1, 0], [3, 4], [0, 2], [0, 0]]
    assert np.load(found.file("text/mask.npy")).tolist() == [True, True, True, False]
    assert len(rows_of(found, "quarantine")) == 10


@pytest.mark.spark
def test_features_are_stored_in_half_precision_and_summed_exactly(reference: Path, given: Path) -> None:
    assert etl(reference, given, run="half", features__dtype="float16") == EXIT_OK
    found = artifact(reference, "features", "half").file("text/matrix.npy")
    whole = np.load(artifact(reference, "features").file("text/matrix.npy"))
    rows = np.load(found)
    assert rows.dtype == np.float16 and rows.tolist() == whole.astype(np.float16).tolist()
    assert found.stat().st_size - 128 == whole.nbytes // 2
    rows = rows.astype(np.float64)
    sums = np.array([rows[0] + rows[1], rows[0] + rows[2], rows[2]]).astype(np.float32)
    np.testing.assert_array_equal(np.load(artifact(reference, "profiles", "half").file("text.npy")), sums)


def test_numbers_that_a_type_rounds_to_zero_are_counted(tmp_path: Path) -> None:
    """6e-8 is the smallest of float16."""
    rows = np.array([[1e-8, 0.0, 1.0], [1e-7, -1e-9, 70000.0]])
    assert write_matrix(tmp_path / "half.npy", [(slice(0, 2), rows)], (2, 3), "float16") == (1, 2)
    assert write_matrix(tmp_path / "whole.npy", [(slice(0, 2), rows)], (2, 3), "float32") == (0, 0)


@pytest.mark.spark
@pytest.mark.parametrize(
    ("dtype", "vectors", "standardise", "expected"),
    [
        ("float16", {"i2": [3.0, -65520.0], "i4": [70000.0, 1.0]}, "none", "2 of 4 vectors .* of float16, 65504"),
        ("float16", {"i4": [5.0, 1e6]}, "zscore", "1 of 4 vectors .* of float16, 65504"),
        (
            "float32",
            {"i1": [0, 1e-11], "i2": [1, 0], "i3": [2, 0], "i4": [0, 3e38]},
            "zscore",
            "1 of 4 .* float32, 3",
        ),
    ],
)
def test_numbers_that_do_not_fit_stop_the_run(
    reference: Path,
    raw: Path,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    vectors: dict[str, list[float]],
    standardise: str,
    expected: str,
) -> None:
    write_vectors(raw, "text", list({**dict(VECTORS), **vectors}.items()))
    settings = {"features__dtype": dtype, "features__standardise": standardise}
    run = f"beyond-{dtype}-{standardise}"
    assert etl(reference, raw, ("interactions", "features"), run=run, **settings) == EXIT_DATA
    message = capsys.readouterr().err
    assert re.search(f"{raw}/features/text: {expected}", message) and "Remedy: " in message


@pytest.mark.spark
@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float16()), pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 2)]
)
def test_every_kind_of_vector_is_read(spark: SparkSession, kind: pa.DataType, tmp_path: Path) -> None:
    path = write_vectors(tmp_path, "text", [("a", [1.5, 2.0]), ("b", [0.5, 4.0])], kind)
    described = describe("text", next(pq.ParquetFile(path).iter_batches()))
    assert described.to_pylist() == [
        {"modality": "text", "item_id": "a", "vector": [1.5, 2.0], "dim": 2, "is_finite": True},
        {"modality": "text", "item_id": "b", "vector": [0.5, 4.0], "dim": 2, "is_finite": True},
    ]


@pytest.mark.parametrize(("binary", "width"), [("float16", 4), ("float32", 8), ("float64", 16)])
def test_binary_vectors_are_read(binary: str, width: int, tmp_path: Path) -> None:
    rows = [np.array(row, dtype=binary).tobytes() for row in ([1.5, 2.0], [0.5, float("inf")])]
    path = write_vectors(tmp_path, "text", [("a", rows[0]), ("n", None), ("b", rows[1])], pa.binary(width))
    batch = next(pq.ParquetFile(path).iter_batches())
    for part in (batch, pa.concat_batches([batch, batch]).slice(3)):
        assert describe("text", part, binary).to_pylist() == [
            {"modality": "text", "item_id": "a", "vector": [1.5, 2.0], "dim": 2, "is_finite": True},
            {"modality": "text", "item_id": "n", "vector": None, "dim": 0, "is_finite": True},
            {"modality": "text", "item_id": "b", "vector": [0.5, float("inf")], "dim": 2, "is_finite": False},
        ]


@pytest.mark.spark
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("i1", [1.0]), ("i2", [1.0, 2.0])], "(2 rows): no vector length has a majority, found 1 rows of length 2"),
        ([("i1", None)], "(0 rows): no vector length has a majority, found no vector"),
        ([("i1", [float("nan")]), ("i2", [float("inf")]), ("i3", [1.0])], "2 of 3 rows are malformed (non_finite 2)"),
    ],
)
def test_unusable_modalities_stop_the_run(
    reference: Path, raw: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], expected: str
) -> None:
    write_vectors(raw, "text", rows)
    assert etl(reference, raw, ("interactions",), run="unusable") == EXIT_OK
    assert etl(reference, raw, ("features",), run="unusable") == EXIT_DATA
    message = capsys.readouterr().err
    assert str(raw / "features" / "text") in message and expected in message and "Remedy: " in message


@pytest.mark.spark
def test_items_without_a_vector_are_missing_and_counted(
    reference: Path, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("i1", [1, 2]), ("i2", None), ("i3", None), ("i4", [3, 4]), ("i9", None)]
    write_vectors(raw, "text", rows, pa.list_(pa.int16(), 2))
    shutil.rmtree(raw / "features" / "image")
    assert etl(reference, raw, run="gaps", features__standardise="none") == EXIT_OK
    found = artifact(reference, "features", "gaps")
    assert found.facts["quarantine"]["text"] == {"null_vector": 3}
    trained = [row["item_id"] for row in rows_of(artifact(reference, "interactions", "gaps"), "items")][:3]
    coverage = sum(item in ("i1", "i4") for item in trained) / 3
    assert found.facts["modalities"]["text"]["trained_coverage"] == pytest.approx(coverage)
    assert "coverage modality=text" in capsys.readouterr().err
    stopped = {"features__min_trained_coverage": "0.9"}
    assert etl(reference, raw, ("interactions", "features"), run="stopped", **stopped) == EXIT_DATA
    assert "features.min_trained_coverage is 0.9" in capsys.readouterr().err


@pytest.mark.spark
@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
def test_days_of_an_import_are_days_of_the_run(
    spark: SparkSession, tmp_path: Path, zone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hours = [f"u{n % 5},i{n % 7},2026-01-{10 + n // 24:02} {n % 24:02}:30" for n in range(240)]
    (tmp_path / "ev.csv").write_text("\n".join(["u,i,t", "u0,i0,0001-01-05", *hours]))
    (tmp_path / "m.yaml").write_text(
        "dataset: d\ninteractions:\n  files: [ev.csv]\n  columns: {user_id: u, item_id: i, event_time: t}\n"
        f"  zone: {zone}\n"
    )
    imported = import_mapped(tmp_path / "m.yaml", tmp_path / "raw")
    assert (str(imported.start), imported.time_zone) == ("2026-01-19", zone)
    start, end = imported.instants()
    window = {"window__start": start, "window__end": end}
    store = tmp_path / "store"
    assert etl(store, tmp_path / "raw", ("interactions",), run="other", **window) == EXIT_CONFIG
    assert f"Give --set etl.time_zone={zone}" in capsys.readouterr().err
    assert etl(store, tmp_path / "raw", ("interactions",), etl__time_zone=zone, **window) == EXIT_OK
    found = artifact(store, "interactions")
    assert set(found.facts["quarantine"]) <= {"repeat", "duplicate"} and found.facts["num_rows_read"] == 241
    assert json.loads(found.file("quality.json").read_text())["before_1990"] == 1


@pytest.mark.parametrize("what", ["items", "features/text"])
def test_ids_that_match_nothing_stop_the_run_before_spark_starts(
    raw: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.etl.stages.interactions.open_session", lambda *_: pytest.fail("Spark starts"))
    if what == "items":
        write_items(raw, [("I1", "One"), ("I2", "Two")])
    else:
        write_vectors(raw, "text", [("I1", [1.0]), ("I2", [2.0])])
    assert etl(tmp_path / "store", raw, ("interactions",)) == EXIT_DATA
    message = capsys.readouterr().err
    assert f"{raw / what}: none of its 2 ids, such as 'I1', 'I2', is among the" in message
    assert "They agree in lower case" in message


@pytest.mark.parametrize(
    ("damage", "settings", "code", "expected"),
    [
        ("remove", {}, EXIT_DATA, "holds no modality, 0 rows of item features"),
        ("", {"features__modalities": "[smell]"}, EXIT_CONFIG, "asks for smell"),
        ("drop", {}, EXIT_DATA, "(4 rows) has no column 'vector', expected list of float32; it has item_id"),
        ("text", {}, EXIT_DATA, "(4 rows): column 'vector' is string, expected list of float32"),
    ],
)
def test_wrong_feature_files_are_errors(
    raw: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
    settings: dict[str, str],
    code: int,
    expected: str,
) -> None:
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "made").mkdir()
    facts = {"num_items": 4, "num_train_items": 3}
    manifest = {"stage": "etl.interactions", "part": "", "fingerprint": "given", "facts": facts}
    store.publish(tmp_path / "made", manifest)
    flags = {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}
    store.start_run("r", load_config(None, [f"{key}={value}" for key, value in flags.items()]))
    store.record("r", "etl.interactions", {"fingerprint": "given"})
    path = raw / "features" / "text" / "part-0.parquet"
    if damage == "remove":
        shutil.rmtree(raw / "features")
    elif damage == "drop":
        drop("vector")(path)
    elif damage == "text":
        retype("vector", pa.string(), ["1 2"] * 4)(path)
    assert etl(tmp_path / "store", raw, ("features",), **settings) == code
    assert expected in capsys.readouterr().err


@pytest.mark.spark
@pytest.mark.slow
def test_a_killed_job_leaves_nothing_visible_and_can_be_run_again(reference: Path, given: Path, tmp_path: Path) -> None:
    """Kill Python and its JVM while tables are written, then give the same command again."""
    store = tmp_path / "store"
    settings = {**SETTINGS, "runtime.raw": str(given), "runtime.spark_master": "local[2]"}
    command = [sys.executable, "-m", "jobs.etl.interactions", "--store", str(store), "--run", "r"]
    command += [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
    folder = tmp_path / "folder"
    folder.mkdir()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)
        try:
            deadline = time.monotonic() + 120
            while not any(store.glob(".scratch/etl.interactions/*.out/*")):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, "the job wrote nothing"
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert list(store.glob("etl.interactions/*")) == []
    assert list(folder.iterdir()) == [], "Spark littered the working directory"
    assert open_store(str(store)).entry("r", "etl.interactions") is None
    assert etl(store, given, ("interactions",)) == EXIT_OK
    found, undisturbed = artifact(store, "interactions"), artifact(reference, "interactions")
    assert found.manifest["content"] == undisturbed.manifest["content"]
    found.verify()
    assert not list(store.glob(".scratch/etl.interactions/*.out"))


@pytest.mark.spark
@pytest.mark.skipif(not LFM2K.is_dir(), reason=f"{LFM2K} is absent: research data is not part of the project")
def test_lfm2k_keeps_its_split_and_its_order(spark: SparkSession, tmp_path: Path) -> None:
    imported = import_mmrec(LFM2K, tmp_path / "raw")
    settings = {
        "window__start": str(imported.start),
        "window__end": str(imported.end),
        "etl__split": imported.split,
        "features__standardise": "l2",
    }
    assert etl(tmp_path / "store", tmp_path / "raw", **settings) == EXIT_OK
    found = artifact(tmp_path / "store", "interactions")
    counts = ("num_users", "num_items", "num_train", "num_validation", "num_test", "num_cold_rows", "quarantine")
    assert [found.facts[name] for name in counts] == [1858, 1425, 44327, 4799, 7219, 0, {}]
    assert [int(row["item_id"]) for row in rows_of(found, "items")] == list(range(1425))
    given = np.load(LFM2K / "text_feat.npy").astype(np.float64)
    expected = given / np.linalg.norm(given, axis=1, keepdims=True)
    matrix = np.load(artifact(tmp_path / "store", "features").file("text/matrix.npy"))
    np.testing.assert_allclose(matrix, expected, atol=1e-7)
    train = [row for row in rows_of(found, "interactions") if row["split"] == 0]
    sums = np.zeros((1858, matrix.shape[1]))
    np.add.at(sums, [row["user_idx"] for row in train], matrix[[row["item_idx"] for row in train]].astype(np.float64))
    np.testing.assert_allclose(
        np.load(artifact(tmp_path / "store", "profiles").file("text.npy")), sums, rtol=1e-6, atol=1e-7
    )


def test_replaced_files_change_the_identity_of_the_source(raw: Path, tmp_path: Path) -> None:
    """Only for the stage that reads them, and only for a run that does."""
    store = open_store(str(tmp_path / "store"))

    def sources(end: str = "2026-01-21") -> tuple[str, str]:
        settings = {**SETTINGS, "window.end": end, "window.start": "2026-01-18", "runtime.raw": str(raw)}
        config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
        one, other = (STAGES[name].source(config, store) for name in ("etl.interactions", "etl.features"))
        return json.dumps(one), json.dumps(other)

    first, earlier = sources(), sources("2026-01-20")
    write_log(raw, [("eve", "i1", "2026-01-20 01:00")])
    second = sources()
    assert (second[0] != first[0], second[1] == first[1]) == (True, True)
    assert sources("2026-01-20") == earlier
    write_items(raw, [("i1", "Another title")])
    third = sources()
    assert (third[0] != second[0], third[1] == second[1]) == (True, True)
    write_vectors(raw, "image", [("i1", [8.0])])
    fourth = sources()
    assert (fourth[0] == third[0], fourth[1] != third[1]) == (True, True)
