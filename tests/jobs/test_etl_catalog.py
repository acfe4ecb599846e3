"""Columns of the catalog, from the delivered files to the table of items."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from crane_core.dataset.interactions import load_item_columns
from crane_core.errors import EXIT_DATA, EXIT_OK
from crane_core.storage.artifacts import Artifact
from jobs.etl import interactions
from jobs.stores import open_store
from tests.worlds.raw_data import write_log

pytestmark = pytest.mark.spark

EVENTS = [("a", "x", "2026-01-02"), ("a", "y", "2026-01-03"), ("b", "x", "2026-01-03"), ("b", "z", "2026-01-08")]
SOON = datetime(2026, 2, 1, 12, 30, tzinfo=UTC)


def etl(folder: Path, run: str, *settings: str, end: date = date(2026, 1, 10)) -> int:
    chosen = [
        *(f"window.start={date(2026, 1, 2)}", f"window.end={end}", f"runtime.raw={folder / 'raw'}"),
        *("etl.validation_days=2", "etl.test_days=2", *settings),
    ]
    flags = [word for setting in chosen for word in ("--set", setting)]
    return interactions.main(["--store", str(folder / "store"), "--run", run, *flags])


def artifact(folder: Path, run: str) -> Artifact:
    return open_store(str(folder / "store")).artifact(run, "etl.interactions")


def deliver(folder: Path, name: str = "part-0.parquet", **columns: Any) -> None:
    path = folder / "raw" / "items" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def by_item(found: Artifact) -> dict[str, dict[str, Any]]:
    rows = load_item_columns(found).to_pylist()
    return {row.pop("item_id"): row for row in rows}


def test_columns_are_carried_in_one_type(spark: SparkSession, tmp_path: Path) -> None:
    """Files may lack a column or have it in another width; names may hold any character."""
    write_log(tmp_path / "raw", EVENTS)
    deliver(
        tmp_path,
        item_id=["x", "y", "y", None],
        title=["X", "b", "a", "no id"],
        category=pa.array(["tea", "left out", "pots", "tea"]).dictionary_encode(),
        available_until=pa.array([SOON, None, SOON, None], pa.timestamp("ns", "UTC")),
        in_stock=[True, True, False, None],
        price=pa.array([1, 2, 3, 4], pa.int32()),
        **{"the `name`, in.full": ["é", "", None, "q"], "sizes": [[1], [2], [3], [4]]},
    )
    deliver(
        tmp_path,
        "part-1.parquet",
        item_id=["w"],
        available_from=pa.array([SOON], pa.timestamp("ms", "Europe/Berlin")),
        price=[2.5],
        STATE=["other"],
    )
    assert etl(tmp_path, "r") == EXIT_OK
    found = artifact(tmp_path, "r")
    nothing = {
        **dict.fromkeys(("available_from", "available_until", "category", "in_stock", "price")),
        "the `name`, in.full": None,
    }
    assert by_item(found) == {
        "x": nothing | {"available_until": SOON, "category": "tea", "in_stock": True, "price": 1.0}
        | {"the `name`, in.full": "é"},
        # Of two rows of an item that with the least title counts.
        "y": nothing | {"available_until": SOON, "category": "pots", "in_stock": False, "price": 3.0},
        "w": nothing | {"available_from": SOON, "price": 2.5},
    }  # fmt: skip
    assert found.facts["ignored_columns"] == {"STATE": ["items/part-1.parquet"], "sizes": ["items/part-0.parquet"]}
    assert found.facts["catalog"] == {"num_rows_read": 5, "quarantine": {"duplicate_item": 1, "null_id": 1}}


def test_without_such_columns_the_items_are_what_they_were(spark: SparkSession, tmp_path: Path) -> None:
    write_log(tmp_path / "raw", EVENTS)
    deliver(tmp_path, item_id=["x", "y"], title=["X", "Y"])
    assert etl(tmp_path, "plain") == EXIT_OK
    plain = artifact(tmp_path, "plain")
    assert pq.read_table(plain.file("items")).column_names == ["item_idx", "item_id", "title", "state"]
    deliver(tmp_path, item_id=["x", "y"], title=["X", "Y"], sizes=[[1], [2]])
    assert etl(tmp_path, "ignored") == EXIT_OK
    assert artifact(tmp_path, "ignored").manifest["content"] == plain.manifest["content"]
    deliver(tmp_path, item_id=["x", "y"], title=["X", "Y"], in_stock=[True, False])
    assert etl(tmp_path, "stock") == EXIT_OK
    assert artifact(tmp_path, "stock").manifest["content"] != plain.manifest["content"]


def test_columns_are_those_of_today_for_items_that_keep_their_numbers(spark: SparkSession, tmp_path: Path) -> None:
    write_log(tmp_path / "raw", EVENTS)
    deliver(tmp_path, item_id=["x", "y"], title=["X", "Y"], in_stock=[True, False], category=["tea", "tea"])
    assert etl(tmp_path, "one") == EXIT_OK
    deliver(tmp_path, item_id=["x"], title=["X"], in_stock=[False])
    assert etl(tmp_path, "two", "etl.base_run=one", end=date(2026, 1, 11)) == EXIT_OK
    found = pq.read_table(artifact(tmp_path, "two").file("items")).sort_by("item_idx").to_pylist()
    assert [(row["item_id"], row["title"], row["in_stock"]) for row in found[:2]] == [
        ("x", "X", False),
        # No longer listed: the name stays, what the catalog said of it does not.
        ("y", "Y", None),
    ]
    assert "category" not in found[0]


def test_what_the_rules_cannot_read_is_said_before_spark_starts(tmp_path: Path, capsys: Any) -> None:
    write_log(tmp_path / "raw", EVENTS)
    deliver(tmp_path, item_id=["x", "y"], price=[1.0, 2.0])
    assert etl(tmp_path, "r", "export.rules={max_per_category: 3}") == EXIT_DATA
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "export.rules.max_per_category needs the column category" in told["found"]
    assert "price" in told["found"] and "leave the rule out" in told["remedy"]
    for column, kind in [
        ("category", pa.array([1, 2])),
        ("in_stock", pa.array([1, 0])),
        ("available_from", ["a", "b"]),
    ]:
        deliver(tmp_path, item_id=["x", "y"], **{column: kind})
        assert etl(tmp_path, f"r-{column}") == EXIT_DATA
        assert f"column '{column}' is" in json.loads(capsys.readouterr().out.splitlines()[-1])["found"]
