from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crane_core.storage.rows import read_columns, read_rows

TABLE = pa.table({"user": ["a", "b", "b", "d", "é", "é"], "rank": [1, 1, 2, 1, 1, 2], "item": list("xyzxyz")})


@pytest.fixture(params=["file", "folder", "no statistics", "small groups"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "table.parquet"
    if request.param != "folder":
        size = 2 if request.param == "small groups" else None
        pq.write_table(TABLE, path, row_group_size=size, write_statistics=request.param != "no statistics")
        return path
    for number in range(3):
        pq.write_table(TABLE.slice(2 * number, 2), tmp_path / f"part-{number}.parquet")
    return tmp_path


@pytest.mark.parametrize("user", ["a", "b", "c", "d", "é", "", "z"])
def test_the_rows_of_a_value(place: Path, user: str) -> None:
    expected = [{"item": row["item"], "rank": row["rank"]} for row in TABLE.to_pylist() if row["user"] == user]
    assert read_rows(place, ("item", "rank"), "user", user) == expected


def test_groups_without_the_value_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(TABLE, tmp_path / "table.parquet", row_group_size=2)
    read, real = [], pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, **columns: list[str]) -> pa.Table:
        read.append(group)
        return real(self, group, **columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert len(read_rows(tmp_path / "table.parquet", ("rank",), "user", "é")) == 2
    assert set(read) == {2}


def test_columns(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "table.parquet")
    assert read_columns(tmp_path / "table.parquet", ("item",)) == {"item": list("xyzxyz")}


def test_columns_that_a_file_lacks_are_left_out(place: Path) -> None:
    assert read_rows(place, ("rank", "because"), "user", "d") == [{"rank": 1}]
