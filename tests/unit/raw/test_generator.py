"""The generator: equal settings give equal rows, and the rows agree with the latent variables."""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from crane_core.config import Etl, Window
from crane_core.errors import ConfigError
from crane_core.raw.checks import check_features, check_interactions, check_items
from crane_core.raw.files import list_features, list_interactions, list_items
from crane_core.raw.generator import DIRT, GeneratorSettings, generate, make_world

SETTINGS = GeneratorSettings(20_000, 500, 200, 10, date(2026, 1, 1), 10, {"text": 8, "image": 4}, dirt_share=0.04)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "raw"
    assert generate(SETTINGS, folder).is_new
    return folder


def log(raw: Path) -> dict[date, object]:
    folders = sorted((raw / "interactions").iterdir())
    return {date.fromisoformat(path.name[3:]): pq.read_table(path, partitioning=None) for path in folders}


def test_it_passes_the_checks_and_has_the_rows_it_was_asked_for(raw: Path) -> None:
    window = Window.model_validate({"start": "2026-01-10", "end": "2026-01-11"})
    footers = check_interactions(list_interactions(raw, window, Etl()), window, Etl())
    assert sum(footer.num_rows for footer in footers) == SETTINGS.num_rows
    assert len(footers) == SETTINGS.num_days
    check_items(list_items(raw))
    for files in list_features(raw, ()).values():
        check_features(files)


def test_dirt_and_late_rows_are_those_of_the_truth(raw: Path) -> None:
    counts = json.loads((raw / "truth" / "counts.json").read_text())
    assert counts["rows"] == SETTINGS.num_rows
    assert sum(counts["dirt"].values()) == 800 and min(counts["dirt"][kind] for kind in DIRT) > 90
    nulls = blanks = early = late = 0
    for day, table in log(raw).items():
        nulls += table["event_time"].null_count
        blanks += pc.sum(pc.equal(table["user_id"], "")).as_py() or 0
        days = table["event_time"].cast("timestamp[us]").cast("date32")
        late_days = [(day - event).days for event in days.to_pylist() if event]
        early += sum(days < 0 for days in late_days)
        late += sum(0 < days <= 3 for days in late_days)
    assert nulls == counts["dirt"]["null_event_time"]
    assert blanks == counts["dirt"]["empty_id"]
    assert early == counts["dirt"]["after_arrival"]
    # Spoilt copies of late rows are late too.
    assert counts["late"] <= late <= counts["late"] + 100
    assert 0.03 < counts["late"] / SETTINGS.num_rows < 0.06


def test_popularity_falls_and_categories_drive_choices_and_features(raw: Path) -> None:
    world = make_world(SETTINGS)
    tables = [table for _, table in sorted(log(raw).items())]
    users = np.concatenate([table["user_id"].to_numpy() for table in tables])
    _, counts = np.unique(users[[bool(user) for user in users]].astype(str), return_counts=True)
    assert np.sort(counts)[::-1][:50].sum() > 0.3 * counts.sum()
    vectors = pq.read_table(raw / "features" / "text").to_pylist()
    category = dict(zip(world.item_ids.to_pylist(), world.item_category.tolist(), strict=True))
    matrix = np.array([row["vector"] for row in vectors])
    kinds = np.array([category[row["item_id"]] for row in vectors])
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    same = kinds[:, None] == kinds[None]
    similarity = matrix @ matrix.T
    assert similarity[same].mean() > similarity[~same].mean() + 0.5
    assert 0.01 < 1 - len(vectors) / SETTINGS.num_items < 0.12


def test_no_item_is_met_before_its_launch(raw: Path) -> None:
    world = make_world(SETTINGS)
    launch = dict(zip(world.item_ids.to_pylist(), world.item_launch.tolist(), strict=True))
    assert max(launch.values()) > 5
    first: dict[str, int] = {}
    for table in log(raw).values():
        clean = table.filter(pc.greater(table["event_time"], pc.cast("2025-12-31T00:00Z", table["event_time"].type)))
        for item, event in zip(clean["item_id"].to_pylist(), clean["event_time"].to_pylist(), strict=True):
            first[item] = min(first.get(item, 99), (event.date() - SETTINGS.start).days)
    assert all(day >= launch[item] for item, day in first.items() if item)


def test_equal_plans_give_equal_bytes_and_touch_nothing_twice(raw: Path, tmp_path: Path) -> None:
    generate(SETTINGS, tmp_path / "again")
    for path in sorted(raw.rglob("*.parquet")):
        other = tmp_path / "again" / path.relative_to(raw)
        assert other.read_bytes() == path.read_bytes(), path
    assert not generate(SETTINGS, raw).is_new


def test_the_end_is_the_day_after_the_last(raw: Path) -> None:
    assert generate(SETTINGS, raw).end == SETTINGS.start + timedelta(days=SETTINGS.num_days)


@pytest.mark.parametrize(
    "wrong", [{"num_rows": 0}, {"late_share": 1.0}, {"num_categories": 20_000}, {"modalities": {}}]
)
def test_impossible_plans_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        GeneratorSettings(**wrong)  # type: ignore[arg-type]
