"""MMRec folders become raw data, or an error names the file, its rows and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from crane_core.errors import DataError
from crane_core.raw.importers import import_mmrec
from tests.worlds.sources import LOG, check, table

DATA = Path(__file__).parents[5] / "shared" / "data"


def test_mmrec_folder_becomes_raw_data(mmrec: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    imported = import_mmrec(mmrec, raw)
    assert (imported.num_users, imported.num_items, imported.num_interactions) == (2, 3, 4)
    assert imported.modalities == {"audio_deep": 1, "text": 2}
    assert (imported.split, imported.start, imported.end) == ("label", date(2000, 1, 1), date(2000, 1, 4))
    check(raw, imported.start, imported.end, needs_label=True)
    days = sorted((raw / "interactions").iterdir())
    assert [day.name for day in days] == ["dt=2000-01-01", "dt=2000-01-02", "dt=2000-01-03"]
    log = table(raw, "interactions")
    assert log["user_id"].to_pylist() == ["0", "0", "1", "1"]
    assert log["label"].to_pylist() == [0, 0, 1, 2]
    assert table(raw, "items").to_pylist() == [
        {"item_id": "0", "title": "A"},
        {"item_id": "1", "title": 'The "B" side'},
        {"item_id": "2", "title": None},
    ]
    assert table(raw, "features/text")["vector"].to_pylist() == [[0, 1], [2, 3], [4, 5]]
    assert table(raw, "features/audio_deep").to_pylist() == [
        {"item_id": "1", "vector": [1]},
        {"item_id": "2", "vector": [2]},
    ]
    assert imported.counts["features.audio_deep"] == {"rows": 3, "written": 2, "set_aside": {"no_vector": 1}}
    assert imported.matched == {
        "items": pytest.approx(2 / 3),
        "features.audio_deep": pytest.approx(2 / 3),
        "features.text": 1,
    }


def test_rows_with_some_numbers_missing_are_named(mmrec: Path, tmp_path: Path) -> None:
    np.save(mmrec / "text_feat.npy", np.array([[1, np.nan], [np.inf, 1], [1, 1]]))
    imported = import_mmrec(mmrec, tmp_path / "raw")
    assert imported.counts["features.text"]["written"] == 3 and imported.matched["features.text"] == pytest.approx(
        1 / 3
    )
    assert any("text: 2 rows with NaN or infinity" in note and "(item 0, item 1)" in note for note in imported.notes)
    np.save(mmrec / "text_feat.npy", np.full((3, 2), np.nan))
    with pytest.raises(DataError, match="none of 3 rows is a vector of finite numbers"):
        import_mmrec(mmrec, tmp_path / "other")


def test_ratings_become_weights(mmrec: Path, tmp_path: Path) -> None:
    (mmrec / "tiny.inter").write_text("userID\titemID\trating\tx_label\n0\t2\t4.5\t0\n")
    import_mmrec(mmrec, tmp_path / "raw")
    assert table(tmp_path / "raw", "interactions")["weight"].to_pylist() == [4.5]


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def save(name: str, rows: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, rows)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "tiny.inter").unlink(), r"holds 0 \*\.inter files"),
        (write("more.inter", LOG), r"holds 2 \*\.inter files \(more\.inter, tiny\.inter"),
        (
            write("tiny.inter", "userID\titemID\n0\t0\n"),
            r"tiny\.inter has no column x_label; its first line has 2: 'userID'",
        ),
        (
            write("tiny.inter", LOG + "x\t1\t0\n"),
            r"1 of 5 rows do not fit: bad_userID 1 .*tiny\.inter line 6, column 'userID': 'x'",
        ),
        (
            write("tiny.inter", LOG + "1\t\t0\n"),
            r"1 of 5 rows do not fit: bad_itemID 1 .*tiny\.inter line 6",
        ),
        (write("tiny.inter", LOG + "1\t1\t3\n"), r"bad_x_label 1 .*line 6, column 'x_label': '3'"),
        (write("tiny.inter", LOG + "-1\t1\t0\n"), r"bad_userID 1 .*'-1'"),
        (write("tiny.inter", LOG + "1\t1\n"), r"wrong_fields 1 .*tiny\.inter line 6: '2 values, expected 3'"),
        (write("tiny.inter", "userID\titemID\tx_label\n"), r"tiny\.inter has 0 rows"),
        (write("items.tsv", "id\tname\n0\tA\n"), r"items\.tsv has no column itemID; its first line has 2"),
        (write("items.tsv", "itemID\tname\n0\tA\n0\tB\n"), r"items\.tsv \(2 rows\): itemID must be .* each once"),
        (
            save("text_feat.npy", np.zeros((2, 2))),
            r"text_feat\.npy has 2 rows, but the items count from 0 to 2, 3 in all",
        ),
        (save("text_feat.npy", np.zeros((4, 2))), r"text_feat\.npy has 4 rows, .* list items without interactions"),
        (save("text_feat.npy", np.zeros(3)), r"text_feat\.npy has shape \[3\] and type float64"),
        (save("text_feat.npy", np.array([["a"]] * 3)), r"text_feat\.npy has shape \[3, 1\] and type <U1"),
        (write("text_feat.npy", "no array"), r"text_feat\.npy \(8 bytes, row count unknown\) is no complete \.npy"),
        (
            lambda folder: (folder / "text_feat.npy").write_bytes((folder / "text_feat.npy").read_bytes()[:-5]),
            "no complete",
        ),
        (
            lambda folder: (
                np.savez(folder / "a.npz", np.zeros(3)),
                (folder / "a.npz").rename(folder / "text_feat.npy"),
            ),
            r"text_feat\.npy .* is an archive of arrays",
        ),
        (save("quarantine_feat.npy", np.zeros((3, 2))), "'quarantine' cannot name a modality"),
        (save("_feat.npy", np.zeros((3, 2))), "'' cannot name a modality"),
        (save("a.counts_feat.npy", np.zeros((3, 2))), r"'a\.counts' cannot name a modality"),
        (write("tiny.inter", LOG.replace("userID", "itemID", 1)), r"tiny\.inter names a column twice in its header"),
        (
            lambda folder: (folder / "items.tsv").write_bytes(b"itemID\tname\n0\t\xff\xfe\n"),
            r"bad_name 1 .*items\.tsv line 2, column 'name'",
        ),
        (write("tiny.inter", LOG + "1\t99999999999\t0\n"), "has 3 rows, but the items count from 0 to 99999999999"),
    ],
)
def test_mmrec_errors_name_file_rows_and_remedy(
    mmrec: Path, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    damage(mmrec)
    with pytest.raises(DataError, match=expected) as caught:
        import_mmrec(mmrec, tmp_path / "raw")
    assert str(mmrec) in caught.value.found and caught.value.remedy


def test_a_pair_of_stray_quotes_in_the_catalog_has_its_own_remedy(mmrec: Path, tmp_path: Path) -> None:
    (mmrec / "items.tsv").unlink()
    (mmrec / "items.csv").write_text('itemID,title,brand\n0,"a,x\n1,b,y\n2,c",z\n')
    with pytest.raises(DataError, match="look like rows") as caught:
        import_mmrec(mmrec, tmp_path / "raw")
    assert caught.value.remedy.startswith("Close, double or remove the quote")


def test_items_without_interactions_need_a_catalog(mmrec: Path, tmp_path: Path) -> None:
    for name in ("text", "audio_deep"):
        np.save(mmrec / f"{name}_feat.npy", np.zeros((5, 2)))
    (mmrec / "items.tsv").unlink()
    (mmrec / "items.csv").write_text('itemID,title\n4,"Four, and last"\n')
    assert import_mmrec(mmrec, tmp_path / "raw").num_items == 5
    assert table(tmp_path / "raw", "items")["title"].to_pylist() == [None] * 4 + ["Four, and last"]


@pytest.mark.parametrize(("name", "modalities"), [("tiktok", {"audio": 128, "image": 128}), ("baby", {})])
def test_shared_folders_are_imported(name: str, modalities: dict[str, int], tmp_path: Path) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is absent: research data is not part of the project")
    assert import_mmrec(DATA / name, tmp_path / "raw").modalities == modalities
