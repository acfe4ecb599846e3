"""The MovieLens wheel becomes raw data, or an error names the file, its rows and a remedy."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from crane_core.errors import DataError
from crane_core.raw.importers import import_movielens
from tests.worlds.sources import MOVIES, RATED, check, table


def test_movielens_wheel_becomes_raw_data(movielens: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    imported = import_movielens(movielens, raw)
    assert (imported.num_users, imported.num_items, imported.num_interactions) == (2, 3, 3)
    assert (imported.split, imported.start, imported.end) == ("temporal", date(1997, 12, 5), date(1997, 12, 6))
    assert imported.modalities["genres"] == 2
    check(raw, imported.start, imported.end, needs_label=False)
    assert [day.name for day in sorted((raw / "interactions").iterdir())] == ["dt=1997-12-04", "dt=1997-12-05"]
    assert table(raw, "interactions")["weight"].to_pylist() == [5, 3, 4]
    assert table(raw, "interactions")["event_time"][0].as_py().isoformat() == "1997-12-04T15:55:49+00:00"
    assert table(raw, "items")["title"].to_pylist() == ["Toy Story (1995)", "Comedy of Toys (1995)", None]
    assert table(raw, "features/genres")["vector"].to_pylist() == [[1, 1], [0, 1]]
    assert imported.matched == {"items": 1, "features.genres": 1, "features.text": 1}
    assert "genres: 1 of 3 items without a word that another item has, too" in imported.notes
    assert import_movielens(movielens, raw).is_new is False


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "ml-100k.inter",
            RATED.replace("timestamp", "time"),
            r"ml-100k\.inter has no column timestamp:float; its first line has 4: 'user_id:token'",
        ),
        (
            "ml-100k.inter",
            RATED.replace("881250950", "soon"),
            r"1 of 3 rows do not fit: bad_event_time 1 .*line 3.*soon",
        ),
        (
            "ml-100k.inter",
            RATED.replace("881250950", ""),
            r"1 of 3 rows do not fit: bad_event_time 1 .*ml-100k\.inter line 3",
        ),
        ("ml-100k.item", MOVIES.replace("class", "kind"), r"ml-100k\.item has no column class:token_seq"),
        ("ml-100k.item", MOVIES.replace("20\t", "10\t"), r"ml-100k\.item has 1 items twice, such as '10'"),
        ("ml-100k.item", MOVIES.replace("0\t", "0x\t"), r"ml-100k\.item: none of its 3 ids, .*'10', '20'"),
        ("ml-100k.item", MOVIES.replace("Toy", "\udcff"), r"ml-100k\.item: 2 of 3 rows do not fit: bad_name 2"),
        ("ml-100k.item", None, r"does not hold ml-100k\.inter and ml-100k\.item: .*No such file"),
    ],
)
def test_movielens_errors_name_file_rows_and_remedy(tmp_path: Path, name: str, text: str | None, expected: str) -> None:
    (tmp_path / "source").mkdir()
    for file, content in {"ml-100k.inter": RATED, "ml-100k.item": MOVIES, name: text}.items():
        if content is not None:
            (tmp_path / "source" / file).write_text(content, errors="surrogateescape")
    with pytest.raises(DataError, match=expected) as caught:
        import_movielens(tmp_path / "source", tmp_path / "raw")
    assert "pip download --no-deps recbole==1.2.1" in caught.value.remedy


def test_a_file_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wheel.whl").write_text("not a zip")
    with pytest.raises(DataError, match=r"wheel\.whl \(row count unknown\) does not hold"):
        import_movielens(tmp_path / "wheel.whl", tmp_path / "raw")
