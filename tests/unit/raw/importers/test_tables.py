"""Files of rows in several formats, and logs counted while they are written."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crane_core.errors import DataError
from crane_core.raw.importers.tables import LogCounts, list_files, read_batches, write_log
from tests.worlds.raw_data import at
from tests.worlds.sources import table

TYPES = {"sku": pa.string(), "price": pa.float32(), "absent": pa.int64()}


def test_formats_give_the_same_batches(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sku,price,note\n007,1.5,x\n,2,y\n")
    (tmp_path / "b.tsv").write_text("price\tsku\n1.5\t007\n2\t\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"sku": "007", "price": 1.5}\n{"price": 2}\n'))
    pq.write_table(pa.table({"sku": ["007", None], "price": [1.5, 2.0]}), tmp_path / "d.parquet")
    files = list_files(tmp_path, ["*.parquet", "[a-c].*"])
    assert [path.name for path in files] == ["a.csv", "b.tsv", "c.jsonl.gz", "d.parquet"]
    for path in files:
        rows = [row for batch in read_batches(path, TYPES, ["sku"]) for row in batch.to_pylist()]
        assert rows == [{"sku": "007", "price": 1.5, "absent": None}, {"sku": None, "price": 2.0, "absent": None}]
    for name in ("a.csv", "d.parquet"):
        with pytest.raises(DataError, match=rf"{name} has no column absent; it has .*price"):
            list(read_batches(tmp_path / name, TYPES, ["absent"]))


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xls").write_text("12")
    with pytest.raises(DataError, match=r"a\.xls \(2 bytes\) is of no known format"):
        list_files(tmp_path, ["*"])


def test_a_log_is_counted_while_it_is_written(tmp_path: Path) -> None:
    batches = [
        pa.record_batch(
            {
                "user_id": pa.array(users, pa.string()),
                "item_id": pa.array(items, pa.string()),
                "event_time": pa.array(times, pa.timestamp("us", "UTC")),
            }
        )
        for users, items, times in (
            (["a", "", "b"], ["x", "y", "x"], [at("2026-01-06 23:59"), at("2026-01-05"), None]),
            (["a", None], ["z", ""], [at("2026-01-04"), at("2026-01-05")]),
        )
    ]
    counts = LogCounts()
    write_log(tmp_path, counts.counted(iter(batches)))
    assert (counts.num_rows, counts.users, counts.items) == (5, {"a", "b"}, {"x", "y", "z"})
    assert counts.last == datetime(2026, 1, 6, 23, 59, tzinfo=UTC)
    written = {
        path.name: table(tmp_path, f"interactions/{path.name}") for path in (tmp_path / "interactions").iterdir()
    }
    assert {name: rows.num_rows for name, rows in written.items()} == {
        "dt=1970-01-01": 1,
        "dt=2026-01-04": 1,
        "dt=2026-01-05": 2,
        "dt=2026-01-06": 1,
    }
    assert LogCounts().last is None
