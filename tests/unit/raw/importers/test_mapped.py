"""Files described by a mapping become raw data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crane_core.errors import ConfigError, DataError
from crane_core.raw.importers import check_mapping, import_mapped
from tests.worlds.sources import check, table

MAPPING = """
dataset: shop
interactions:
  files: [events/*.csv]
  columns: {user_id: customer, item_id: sku, event_time: at, weight: quantity, event_type: kind}
  zone: Europe/Berlin
items:
  files: [products.tsv]
  columns: {item_id: sku, title: name}
features:
  text: {files: [text.parquet], columns: {item_id: sku, vector: embedding}}
  image: {files: [image.npy], ids: image_ids.txt}
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "a.csv").write_text(
        "at,customer,sku,quantity,kind,note\n2026-01-05 23:30:00,c1,00017,2,view,x\n"
        '2026-01-05T23:30:00Z,c2,"a,b",,purchase,y\n'
    )
    (tmp_path / "products.tsv").write_text("sku\tname\tprice\n00017\tKettle\t9\nz\tCup\t1\n")
    pq.write_table(pa.table({"sku": ["00017"], "embedding": [[1.0, 2.0]]}), tmp_path / "text.parquet")
    np.save(tmp_path / "image.npy", np.ones((2, 3), dtype=np.float16))
    (tmp_path / "image_ids.txt").write_text("00017\nz\n")
    (tmp_path / "mapping.yaml").write_text(MAPPING)
    return tmp_path


def test_mapped_files_become_raw_data(shop: Path) -> None:
    raw = shop / "raw"
    imported = import_mapped(shop / "mapping.yaml", raw)
    assert (imported.num_users, imported.num_items, imported.num_interactions) == (2, 3, 2)
    assert imported.modalities == {"image": 3, "text": 2}
    rows = [row for day in ("05", "06") for row in table(raw, f"interactions/dt=2026-01-{day}").to_pylist()]
    found = [
        (row["user_id"], row["item_id"], row["event_time"].isoformat(), row["weight"], row["event_type"])
        for row in rows
    ]
    assert found == [
        ("c1", "00017", "2026-01-05T22:30:00+00:00", 2.0, "view"),
        ("c2", "a,b", "2026-01-05T23:30:00+00:00", None, "purchase"),
    ]
    assert imported.time_zone == "Europe/Berlin"
    assert imported.instants() == ("2026-01-06T00:00:00+01:00", "2026-01-07T00:00:00+01:00")
    check(raw, imported.start, imported.end, needs_label=False)
    assert not import_mapped(shop / "mapping.yaml", raw).is_new


@pytest.mark.parametrize(
    ("before", "after", "error", "expected"),
    [
        ("event_time: at, ", "", ConfigError, "must name event_time"),
        ("zone: Europe/Berlin", "zone: Mars", ConfigError, "IANA"),
        ("dataset: shop", "datasets: shop", ConfigError, "dataset"),
        ("customer", "client", DataError, "no column client|client"),
        ("events/*.csv", "events/*.xls", DataError, "no file 'events/.\\\\*.xls'"),
        ("zone: Europe/Berlin", "time: s", DataError, "bad_event_time 2 .*a.csv line 2, column 'at'"),
        ("ids: image_ids.txt", "ids: products.tsv", DataError, "3 ids"),
        ("vector: embedding", "vector: vec", DataError, "cannot be read|no column"),
    ],
)
def test_wrong_mappings_are_errors(shop: Path, before: str, after: str, error: type[Exception], expected: str) -> None:
    (shop / "mapping.yaml").write_text(MAPPING.replace(before, after))
    with pytest.raises(error, match=expected):
        import_mapped(shop / "mapping.yaml", shop / "raw")
    assert not (shop / "raw").exists()


def test_the_first_row_of_an_item_is_the_one_of_the_catalog(shop: Path) -> None:
    (shop / "products.tsv").write_text("sku\tname\n00017\tKettle\nz\tCup\n00017\tPot\n\tNone\n\tNone\n")
    imported = import_mapped(shop / "mapping.yaml", shop / "raw")
    found = [(row["item_id"], row["title"]) for row in table(shop / "raw", "items").to_pylist()]
    assert found == [("00017", "Kettle"), ("z", "Cup"), (None, "None"), (None, "None")]
    assert imported.counts["items"]["set_aside"] == {"repeated_id": 1}
    assert f"({shop / 'products.tsv'} line 4, column 'sku': '00017')" in "".join(imported.notes)


def test_a_catalog_without_an_item_stops(shop: Path) -> None:
    (shop / "products.tsv").write_text("sku\tname\n\tKettle\n \tCup\n")
    with pytest.raises(DataError, match="items: none of 2 rows has an item_id"):
        import_mapped(shop / "mapping.yaml", shop / "raw")
    assert "none of 2 rows has an item_id" in check_mapping(shop / "mapping.yaml").problems[0]["found"]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("2026-01-05,,i\n2026-01-05,,i\n", "2 without user_id"),
        ("2026-01-05,u,\n2026-01-05,u, \n", "2 without item_id"),
        (",u,i\n,u,i\n", "2 without event_time"),
        ("2026-01-05,u,\n,u,i\n", "1 without item_id; 1 without event_time"),
    ],
)
def test_a_log_without_a_row_that_has_all_stops(tmp_path: Path, rows: str, told: str) -> None:
    (tmp_path / "ev.csv").write_text("at,customer,sku\n" + rows)
    log = "{files: [ev.csv], columns: {user_id: customer, item_id: sku, event_time: at}}"
    (tmp_path / "m.yaml").write_text(f"dataset: d\ninteractions: {log}\n")
    with pytest.raises(DataError, match=rf"none of 2 rows has a user, an item and a time \({told}\)"):
        import_mapped(tmp_path / "m.yaml", tmp_path / "raw")
    assert [each["found"] for each in check_mapping(tmp_path / "m.yaml").problems]


def test_columns_that_differ_in_case_are_two(tmp_path: Path) -> None:
    columns = {"U": ["A"], "u": ["a"], "i": ["x"], "I": ["X"], "t": ["2026-01-05"]}
    pq.write_table(pa.table(columns), tmp_path / "ev.parquet")
    (tmp_path / "it.csv").write_text("I,i,Name,name\nX,x,Kettle,pot\n")
    (tmp_path / "m.yaml").write_text(
        "dataset: d\ninteractions: {files: [ev.parquet], columns: {user_id: u, item_id: I, event_time: t}}\n"
        "items: {files: [it.csv], columns: {item_id: I, title: Name, Title: name, TITLE: i}}\n"
    )
    import_mapped(tmp_path / "m.yaml", tmp_path / "raw")
    assert [(row["user_id"], row["item_id"]) for row in table(tmp_path / "raw", "interactions").to_pylist()] == [
        ("a", "X")
    ]
    assert table(tmp_path / "raw", "items").to_pylist() == [
        {"item_id": "X", "title": "Kettle", "Title": "pot", "TITLE": "x"}
    ]


def test_a_log_of_which_all_rows_are_set_aside_says_what_helps(tmp_path: Path) -> None:
    (tmp_path / "ev.csv").write_text("u,i,t,w\na,x,2026-01-05,much\n")
    log = "{files: [ev.csv], columns: {user_id: u, item_id: i, event_time: t, weight: w}, max_set_aside: 1}"
    (tmp_path / "m.yaml").write_text(f"dataset: d\ninteractions: {log}\n")
    with pytest.raises(DataError, match=r"all 1 rows are set aside: bad_weight 1 \(.*line 2, column 'w'") as caught:
        import_mapped(tmp_path / "m.yaml", tmp_path / "raw")
    assert "interactions.decimal" in caught.value.remedy
