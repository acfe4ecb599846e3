"""A check of a mapping tells what each column is taken for, and changes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crane_core.errors import DataError
from crane_core.raw import importers
from crane_core.raw.importers import check, check_mapping, import_mapped, rows
from crane_core.raw.importers.mapping import read_mapping
from jobs import cli

README = Path(importers.__file__).with_name("README.md")
DATA = Path(__file__).parents[5] / "shared" / "data" / "movietweetings"
MAPPING = """
dataset: shop
interactions:
  files: [ev.csv]
  columns: {user_id: u, item_id: i, event_time: t, weight: w}
  max_set_aside: 0.5
items:
  files: [items.csv]
  columns: {item_id: id, title: name}
features:
  text: {files: [f.parquet]}
  image: {files: [image.npy], ids: ids.txt}
  genres: {files: [items.csv], kind: categories, columns: {item_id: id, vector: genres}}
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "ev.csv").write_text(
        "u,i,t,w\na,i1,2026-01-05 10:00,1.5\nb,i2,2026-01-07,NA\nb,i1,2026-01-06,much\nb,,2026-01-06,9\n"
    )
    (tmp_path / "items.csv").write_text("id,name,genres\ni1,Kettle,Tea|Steel\ni2,Cup,\ni3,Pot,Tea\n")
    pq.write_table(pa.table({"item_id": ["i1", "i9"], "vector": [[1, 2], [0, 7]]}), tmp_path / "f.parquet")
    np.save(tmp_path / "image.npy", np.ones((2, 3), dtype=np.float16))
    (tmp_path / "ids.txt").write_text("i1\ni2\n")
    (tmp_path / "m.yaml").write_text(MAPPING)
    return tmp_path


def test_each_column_is_told_with_its_type_range_and_what_would_be_set_aside(shop: Path) -> None:
    before = sorted(shop.rglob("*"))
    checked = check_mapping(shop / "m.yaml")
    assert sorted(shop.rglob("*")) == before and checked.problems == []
    found = {section.name: section for section in checked.sections}
    log = {column.name: column for column in found["interactions"].columns}
    assert (log["item_id"].taken, log["item_id"].missing) == ("id", 1)
    assert (log["weight"].missing, log["weight"].bad, log["weight"].low, log["weight"].high) == (1, 1, 1.5, 9.0)
    assert f"{log['event_time'].low:%d %H} {log['event_time'].high:%d %H}" == "05 10 07 00"
    assert found["interactions"].set_aside == {"bad_weight": 1}
    taken = {name: section.columns[1].taken for name, section in found.items() if name.startswith("features")}
    assert taken == {
        "features.text": "vector of 2 numbers",
        "features.image": "vector of 3 numbers",
        "features.genres": "2 categories",
    }
    assert checked.matched == {"items": 1, "features.text": 0.5, "features.image": 1, "features.genres": 0.5}
    assert import_mapped(shop / "m.yaml", shop / "raw").counts["interactions"]["set_aside"] == {"bad_weight": 1}


def test_problems_are_those_that_would_stop_the_import(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["import", "check", str(shop / "m.yaml")]) == 0
    assert "0 problems; nothing was written" in capsys.readouterr().out
    (shop / "m.yaml").write_text(MAPPING.replace("max_set_aside: 0.5", "").replace("name: id", "name: x"))
    (shop / "ids.txt").write_text("x\ny\n")
    (shop / "f.parquet").write_text("damaged")
    assert cli.main(["import", "check", str(shop / "m.yaml"), "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert [problem["found"].partition(":")[0] for problem in told["problems"]] == [
        "interactions",
        f"{shop / 'f.parquet'} (7 bytes) cannot be read after 0 rows",
        "features.image",
    ]
    assert told["problems"][-1]["found"].endswith("is among the 2 items of the log, such as 'i1', 'i2'.")
    (shop / "ids.txt").write_text("a\nb\n")
    assert cli.main(["import", "check", str(shop / "m.yaml"), "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert "exchange the columns user_id and item_id" in told["problems"][-1]["remedy"]
    assert not (shop / "raw").exists()


def test_ids_beyond_the_sample_of_a_table_are_no_problem(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shop / "items.csv").write_text("id,name,genres\ni8,A,\ni9,B,\n")
    assert [each["found"].partition(":")[0] for each in check_mapping(shop / "m.yaml").problems] == ["items"]
    monkeypatch.setattr(check, "SAMPLE_ROWS", 1)
    monkeypatch.setattr(rows, "CHUNK_ROWS", 1)
    assert check_mapping(shop / "m.yaml").problems == []


def test_the_example_of_the_readme_is_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping, shown = re.findall(r"```(?:yaml)?\n(.*?)```", README.read_text(), re.DOTALL)[:2]
    (tmp_path / "mapping.yaml").write_text(mapping)
    assert read_mapping(tmp_path / "mapping.yaml").dataset == "movietweetings"
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is absent: research data is not part of the project")
    for name in ("ratings.csv", "movies.csv"):
        (tmp_path / name).symlink_to(DATA / name)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["import", "check", "mapping.yaml"]) == 0
    assert capsys.readouterr().out == shown


def no_rows(folder: Path) -> None:
    np.save(folder / "image.npy", np.ones((0, 3)))
    (folder / "ids.txt").write_text("")


def many_words(folder: Path) -> None:
    (folder / "items.csv").write_text("id,name,genres\n" + "".join(f"i{n},x,g{n}\n" for n in range(1200)))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (no_rows, "features.image: the files hold 0 rows"),
        (many_words, "features.genres has 1200 categories"),
        (lambda folder: (folder / "items.csv").write_text("id,name,genres\ni1,x,\ni2,y,NA\n"), "features.genres: none"),
        (lambda folder: np.save(folder / "image.npy", np.full((2, 3), np.nan)), "features.image: none of 2 rows"),
        (lambda folder: (folder / "ev.csv").write_text("u,i,t,w\na,i1,,1\n"), "interactions: none of 1 rows has"),
        (lambda folder: np.save(folder / "image.npy", np.array([[np.inf] * 3] * 2)), "features.image: 2 of 2 rows do"),
    ],
)
def test_what_stops_the_import_is_a_problem_of_the_check(
    shop: Path, spoil: Callable[[Path], None], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(shop)
    assert any(each["found"].startswith(told) for each in check_mapping(shop / "m.yaml").problems)
    with pytest.raises(DataError, match=re.escape(told)):
        import_mapped(shop / "m.yaml", shop / "raw")
    monkeypatch.setattr(check, "SAMPLE_ROWS", 1)
    assert not any(shop.glob("*raw*")) and check_mapping(shop / "m.yaml").sections


@pytest.mark.parametrize("flags", [["check", "m.yaml", "raw"], ["mapped", "m.yaml"]])
def test_a_check_takes_no_folder_and_an_import_takes_one(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["import", *flags]) == 2
    assert "crane import check MAPPING" in capsys.readouterr().err
