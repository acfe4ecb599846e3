"""Times are told by the years they give."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from crane_core.errors import DataError
from crane_core.raw.importers import check_mapping, import_mapped
from crane_core.raw.importers.account import Account
from crane_core.raw.importers.instants import Clock
from crane_core.raw.importers.layout import Chunk
from crane_core.raw.importers.years import check_clock
from tests.worlds.sources import table

SECONDS = 1577836800


@pytest.mark.parametrize(
    ("number", "time", "fits"),
    [
        (1433221332, "s", ""),
        (1433221332117, "s", "as ms"),
        (1433221332, "ms", "as s"),
        (1588687728923000, "ms", "as us"),
        (1588687728923000000, "us", "as ns"),
        (1433221332, "iso", "as s"),
        (20190102, "iso", "no unit fits"),
        (20190102, "s", "no unit fits"),
    ],
)
def test_numbers_in_another_unit_are_told_by_their_years(number: int, time: str, fits: str) -> None:
    clock = Clock(time, now=datetime(2026, 6, 1))
    for values in ([str(number)] * 3, pa.array([number] * 3), pa.array([float(number)] * 3)):
        chunk = Chunk(Path("ev.csv"), {"t": values}, [2, 3, 4])
        if fits:
            with pytest.raises(DataError, match=fits) as caught:
                check_clock(chunk, "t", clock, Account("interactions"))
            assert "Set interactions.time" in caught.value.remedy
        else:
            check_clock(chunk, "t", clock, Account("interactions"))


def bring(folder: Path, files: dict[str, str], log: dict[str, Any], items: dict[str, Any] | None = None) -> Any:
    for name, text in files.items():
        (folder / name).write_text(text)
    columns = {"user_id": "u", "item_id": "i", "event_time": "t"}
    mapping = {"dataset": "d", "interactions": {"files": ["ev*.csv"], "columns": columns, **log}}
    mapping |= {"items": items} if items else {}
    (folder / "m.yaml").write_text(yaml.safe_dump(mapping))
    return import_mapped(folder / "m.yaml", folder / "raw")


@pytest.mark.parametrize(
    ("times", "time", "remedy", "mended"),
    [
        ([20230101, 20230102], "iso", "set interactions.time: '%Y%m%d'", {"time": "%Y%m%d"}),
        ([20230101123456] * 2, "s", "set interactions.time: '%Y%m%d%H%M%S'", {"time": "%Y%m%d%H%M%S"}),
        ([100, 200], "s", "set interactions.first_year: 1969", {"first_year": 1969}),
        ([-86400 * 4000] * 2, "s", "set interactions.first_year: 1958", {"first_year": 1958}),
    ],
)
def test_the_remedy_for_numbers_that_are_no_times_works(
    tmp_path: Path, times: list[int], time: str, remedy: str, mended: dict[str, Any]
) -> None:
    files = {"ev.csv": "u,i,t\n" + "".join(f"a,x,{each}\n" for each in times)}
    with pytest.raises(DataError, match="are no times of the format") as caught:
        bring(tmp_path, files, {"time": time})
    assert remedy in caught.value.remedy.lower()[:1] + caught.value.remedy[1:]
    assert bring(tmp_path, files, {"time": time, **mended}).num_interactions == 2


def test_numbers_of_the_future_ask_for_right_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        bring(tmp_path, {"ev.csv": "u,i,t\na,x,4102444800\n"}, {"time": "s"})
    assert "correct these times, which lie in the future" in caught.value.remedy
    assert "first_year" not in caught.value.remedy


def test_days_of_a_spreadsheet_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        bring(tmp_path, {"ev.csv": "u,i,t\na,x,43831.5\n"}, {"time": "iso"})
    assert "days as a spreadsheet counts them" in caught.value.remedy


def test_two_units_in_one_section_ask_for_one(tmp_path: Path) -> None:
    files = {"ev1.csv": f"u,i,t\na,x,{SECONDS}\n", "ev2.csv": f"u,i,t\na,x,{SECONDS}000\n"}
    with pytest.raises(DataError, match=r"ev2\.csv.* as ms they are") as caught:
        bring(tmp_path, files, {"time": "s"})
    assert caught.value.remedy.startswith("Write the times of all files of interactions in one unit")


def test_separators_of_numbers_hold_for_times(tmp_path: Path) -> None:
    files = {"ev.csv": "u;i;t\na;x;1.577.836.800,5\n", "it.csv": "i;f\nx;1577836800,5\n"}
    form = {"separator": ";", "decimal": ",", "time": "s"}
    items = {"files": ["it.csv"], "columns": {"item_id": "i", "available_from": "f"}, **form}
    bring(tmp_path, files, {**form, "thousands": "."}, items)
    expected = datetime.fromisoformat("2020-01-01T00:00:00.5+00:00")
    assert table(tmp_path / "raw", "interactions")["event_time"].to_pylist() == [expected]
    assert table(tmp_path / "raw", "items")["available_from"].to_pylist() == [expected]


@pytest.mark.parametrize(("column", "late"), [("available_until", "2999-01-01"), ("released", "2090-01-01")])
def test_years_of_the_catalog_are_named(tmp_path: Path, column: str, late: str) -> None:
    files = {"ev.csv": "u,i,t\na,x,2020-01-01\n", "it.csv": f"i,r\nx,0002-01-01\ny,{late}\nz,2020-01-01\n"}
    items = {"files": ["it.csv"], "columns": {"item_id": "i", column: "r"}, "types": {column: "time"}}
    notes = "\n".join(bring(tmp_path, files, {}, items).notes)
    assert f"1 rows with {column} before 1990 ({tmp_path / 'it.csv'} line 2, column 'r': '0002-01-01')" in notes
    assert f"1 rows with {column} in the future ({tmp_path / 'it.csv'} line 3" in notes
    told = [note for section in check_mapping(tmp_path / "m.yaml").sections for note in section.noticed]
    assert "\n".join(told) == notes


def test_what_is_available_for_some_years_is_not_odd(tmp_path: Path) -> None:
    files = {"ev.csv": "u,i,t\na,x,2020-01-01\n", "it.csv": "i,r\nx,2060-01-01\n"}
    items = {"files": ["it.csv"], "columns": {"item_id": "i", "available_until": "r"}}
    assert bring(tmp_path, files, {}, items).notes == []


def test_a_unit_of_the_catalog_that_does_not_fit_is_told(tmp_path: Path) -> None:
    files = {"ev.csv": "u,i,t\na,x,2020-01-01\n", "it.csv": f"i,r\nx,{SECONDS}000\n"}
    items = {"files": ["it.csv"], "columns": {"item_id": "i", "available_from": "r"}, "time": "us"}
    with pytest.raises(DataError, match="as ms they are times") as caught:
        bring(tmp_path, files, {}, items)
    assert caught.value.remedy == "Set items.time: ms."
    assert bring(tmp_path, files, {}, {**items, "time": "ms"}).num_items == 1
