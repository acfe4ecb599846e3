"""Amazon reviews and metadata become raw data."""

from __future__ import annotations

import gzip
import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from crane_core.errors import DataError
from crane_core.raw.checks import check_features
from crane_core.raw.files import list_features
from crane_core.raw.importers import import_amazon
from tests.worlds.sources import check, table

REVIEWS = [
    {"rating": 5.0, "user_id": "A1", "parent_asin": "B1", "asin": "B1x", "timestamp": 1588687728923, "text": "good"},
    {"rating": 1.0, "user_id": "A2", "parent_asin": "B1", "timestamp": 1588687728923, "verified_purchase": True},
    {"rating": 4.0, "user_id": "A1", "parent_asin": "B2", "timestamp": 1609459199999},
    {"rating": 4.0, "user_id": None, "parent_asin": "B2", "timestamp": None},
]

PRODUCTS = [
    {
        "parent_asin": f"B{n}",
        "title": f"Blue kettle {n}",
        "average_rating": 4.9,
        "features": ["steel", "cordless"],
        "description": ["boils water"],
        "categories": ["Kitchen", "Kettles"],
        "details": {"x": "y"},
    }
    for n in (1, 2, 3)
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_amazon_reviews_become_raw_data(tmp_path: Path, suffix: str) -> None:
    write_lines(tmp_path / f"Kitchen.jsonl{suffix}", REVIEWS)
    write_lines(tmp_path / f"meta_Kitchen.jsonl{suffix}", PRODUCTS)
    raw = tmp_path / "raw"
    imported = import_amazon(tmp_path / f"Kitchen.jsonl{suffix}", raw)
    assert (imported.num_users, imported.num_items, imported.num_interactions) == (2, 3, 4)
    assert (imported.start, imported.end) == (date(2020, 12, 31), date(2021, 1, 1))
    days = {path.name: table(raw, f"interactions/{path.name}") for path in (raw / "interactions").iterdir()}
    assert {name: rows.num_rows for name, rows in days.items()} == {
        "dt=2020-05-05": 2,
        "dt=2020-12-31": 1,
        "dt=1970-01-01": 1,
    }
    rows = days["dt=2020-05-05"].select(["user_id", "item_id", "weight"]).to_pylist()
    assert rows == [
        {"user_id": "A1", "item_id": "B1", "weight": 5.0},
        {"user_id": "A2", "item_id": "B1", "weight": 1.0},
    ]
    assert days["dt=2020-12-31"]["event_time"][0].as_py().microsecond == 999000
    check(raw, imported.start, imported.end, needs_label=False)
    assert table(raw, "items")["title"].to_pylist() == ["Blue kettle 1", "Blue kettle 2", "Blue kettle 3"]
    check_features(list_features(raw, ())["text"])
    assert imported.matched == {"items": 1, "features.text": 1}
    assert not import_amazon(tmp_path / f"Kitchen.jsonl{suffix}", raw).is_new


def test_broken_amazon_files_are_errors(tmp_path: Path) -> None:
    reviews = tmp_path / "Kitchen.jsonl"
    with pytest.raises(DataError, match="There is no file"):
        import_amazon(reviews, tmp_path / "raw")
    write_lines(tmp_path / "meta_Kitchen.jsonl", PRODUCTS)
    reviews.write_text('{"user_id": "A1", "rating": \n')
    with pytest.raises(DataError, match="line 1 is no JSON object"):
        import_amazon(reviews, tmp_path / "raw")
    write_lines(reviews, [{"user_id": "A1"}])
    with pytest.raises(DataError, match="none of 1 objects has parent_asin, rating, timestamp; they have user_id"):
        import_amazon(reviews, tmp_path / "raw")
    write_lines(reviews, [{**REVIEWS[3]}])
    with pytest.raises(DataError, match=r"none of 1 rows has a user, an item and a time \(1 without user_id; 1"):
        import_amazon(reviews, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_metadata_of_other_items_stop_the_import(tmp_path: Path) -> None:
    write_lines(tmp_path / "Kitchen.jsonl", REVIEWS[:3])
    write_lines(tmp_path / "meta_Kitchen.jsonl", [{**each, "parent_asin": f"b{n}"} for n, each in enumerate(PRODUCTS)])
    with pytest.raises(DataError, match=r"metadata: none of its 3 ids, such as 'b0'.* 'B1', 'B2'") as caught:
        import_amazon(tmp_path / "Kitchen.jsonl", tmp_path / "raw")
    assert "meta_CATEGORY.jsonl" in caught.value.remedy


@pytest.mark.parametrize("rows", [[], [{"parent_asin": None}, {"parent_asin": ""}], [{"parent_asin": [1]}] * 3])
def test_metadata_without_an_item_stop_the_import(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_lines(tmp_path / "Kitchen.jsonl", REVIEWS[:3])
    write_lines(tmp_path / "meta_Kitchen.jsonl", rows)
    with pytest.raises(DataError, match=r"meta"):
        import_amazon(tmp_path / "Kitchen.jsonl", tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_a_few_odd_lines_of_metadata_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "Kitchen.jsonl", REVIEWS[:3])
    many = [{**PRODUCTS[0], "parent_asin": f"B{n}"} for n in range(200)]
    write_lines(tmp_path / "meta_Kitchen.jsonl", many)
    with (tmp_path / "meta_Kitchen.jsonl").open("a") as file:
        file.write("garbage\n")
    imported = import_amazon(tmp_path / "Kitchen.jsonl", tmp_path / "raw")
    assert imported.counts["metadata"]["set_aside"] == {"not_json": 1}
    (tmp_path / "meta_Kitchen.jsonl").write_text(json.dumps(PRODUCTS[0]) + "\n" + "garbage\n" * 99)
    with pytest.raises(DataError, match="metadata: 99 of 100 rows do not fit"):
        import_amazon(tmp_path / "Kitchen.jsonl", tmp_path / "other")


def test_an_item_without_words_has_no_features(tmp_path: Path) -> None:
    write_lines(tmp_path / "Kitchen.jsonl", REVIEWS[:3])
    write_lines(tmp_path / "meta_Kitchen.jsonl", [{"parent_asin": "B1", "title": ""}, *PRODUCTS[1:]])
    imported = import_amazon(tmp_path / "Kitchen.jsonl", tmp_path / "raw")
    assert table(tmp_path / "raw", "features/text")["item_id"].to_pylist() == ["B2", "B3"]
    assert imported.matched == {"items": 1, "features.text": 0.5}
    assert "text: 1 of 3 items without a word that another item has, too" in imported.notes
