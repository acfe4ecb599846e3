"""Parquet files are read as their columns are stored."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crane_core.raw.parquet import int96_instants, open_parquet


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.int64()])
def test_null_rows_of_fixed_size_lists_are_null(tmp_path: Path, kind: pa.DataType) -> None:
    rows = [[1, 2], None, [3, 4]]
    number = float if pa.types.is_floating(kind) else int
    vectors = pa.array([row and [number(each) for each in row] for row in rows], pa.list_(kind, 2))
    pq.write_table(pa.table({"vector": vectors}), tmp_path / "a.parquet")
    with open_parquet(tmp_path / "a.parquet") as parquet:
        assert parquet.schema_arrow.field("vector").type.value_type == kind
        assert parquet.read()["vector"].to_pylist() == rows


@pytest.mark.parametrize(
    ("zone", "hint", "expected"), [("UTC", True, {"t"}), (None, True, set()), (None, False, {"t"})]
)
def test_int96_times_are_instants_unless_their_writer_says_otherwise(
    tmp_path: Path, zone: str | None, hint: bool, expected: set[str]
) -> None:
    times = pa.array([-62_135_510_400, 253_402_128_000], pa.int64()).cast(pa.timestamp("s", zone))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"t": times}), path, use_deprecated_int96_timestamps=True, store_schema=hint)
    with open_parquet(path) as parquet:
        assert int96_instants(parquet) == expected
        found = parquet.read()["t"]
        assert found.type.unit == "us" and found.cast(pa.int64()).to_pylist() == [
            -62_135_510_400_000_000,
            253_402_128_000_000_000,
        ]


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1PAR1", b"\xff\xff\xff\xffPAR1", b"x" * 100])
def test_a_file_without_a_footer_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises((pa.ArrowInvalid, OSError)), open_parquet(tmp_path / "a.parquet"):
        pass
