"""Listing raw data: partitions of days, modalities, and locations."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

import pytest

from crane_core.config import Etl, RunConfig
from crane_core.errors import ConfigError, CraneError, DataError
from crane_core.raw.files import check_zone, list_features, list_interactions, raw_root
from crane_core.raw.location import Location
from tests.worlds.raw_data import at, window, write_day, write_four_days, write_vectors


def config(raw: str | None) -> RunConfig:
    return RunConfig.model_validate({"window": {"start": "2026-01-05", "end": "2026-01-06"}, "runtime": {"raw": raw}})


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_four_days(tmp_path)


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


def test_raw_data_are_on_a_disk_or_on_s3(tmp_path: Path) -> None:
    assert str(raw_root(config(str(tmp_path)), "/somewhere")) == str(tmp_path)
    assert str(raw_root(config(tmp_path.as_uri()), "/somewhere")) == str(tmp_path)
    (tmp_path / "raw").mkdir()
    assert str(raw_root(config(None), str(tmp_path))) == str(tmp_path / "raw")
    with pytest.raises(ConfigError, match="expected a local path or s3://bucket/prefix"):
        raw_root(config("hdfs://name/raw"), "/somewhere")
    with pytest.raises(DataError, match=r"There is no raw data at .*absent, 0 rows"):
        raw_root(config(str(tmp_path / "absent")), "/somewhere")


@pytest.mark.parametrize(
    ("record", "zone", "expected"),
    [
        (None, "Asia/Tokyo", None),
        ('{"imported": {"time_zone": "Asia/Tokyo"}}', "Asia/Tokyo", None),
        ('{"imported": {"time_zone": null}}', "Asia/Tokyo", None),
        ('{"imported": {}}', "UTC", None),
        ('{"imported": {"time_zone": "Asia/Tokyo"}}', "UTC", ConfigError),
        ('{"imported": {}}', "Asia/Tokyo", ConfigError),
        ("{", "UTC", DataError),
        ("[]", "UTC", DataError),
    ],
)
def test_imported_days_must_be_days_of_the_run(
    tmp_path: Path, record: str | None, zone: str, expected: type[CraneError] | None
) -> None:
    if record is not None:
        (tmp_path / "source.json").write_text(record)
    if expected is None:
        check_zone(Location.at(tmp_path), Etl(time_zone=zone))
        return
    with pytest.raises(expected) as caught:
        check_zone(Location.at(tmp_path), Etl(time_zone=zone))
    if expected is ConfigError:
        assert "--set etl.time_zone=" in caught.value.remedy
