from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crane_core.config import Etl, Window
from crane_core.errors import ConfigError, DataError
from crane_core.raw.checks import check_features, check_interactions, check_items
from crane_core.raw.files import list_features, list_interactions, list_items
from crane_core.raw.importers import import_amazon, import_mapped, import_mmrec, import_movielens

DATA = Path(__file__).parents[4] / "shared" / "data"
LOG = "userID\titemID\tx_label\n0\t0\t0\n0\t1\t0\n1\t2\t1\n1\t0\t2\n"
RATED = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "1\t10\t5\t881250949\n2\t20\t3\t881250950\n2\t10\t4\t881337349\n"
)
MOVIES = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "10\tToy Story\t1995\tAnimation Comedy\n20\tComedy of Toys\t1995\tComedy\n30\t\t\t\n"
)


@pytest.fixture
def mmrec(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tiny.inter").write_text(LOG)
    np.save(folder / "text_feat.npy", np.arange(6, dtype=np.float32).reshape(3, 2))
    np.save(folder / "audio_deep_feat.npy", np.full((3, 1), np.nan, dtype=np.float16))
    (folder / "items.tsv").write_text('itemID\tartist\tname\n1\t7\tThe "B" side\n0\t8\tA\n')
    return folder


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    wheel = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", RATED)
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.item", MOVIES)
    return wheel


def table(raw: Path, name: str) -> pa.Table:
    return pq.read_table(raw / name, partitioning=None)


def check(raw: Path, start: date, end: date, needs_label: bool) -> None:
    """What an importer writes passes the checks of the ETL."""
    window = Window.model_validate({"start": start, "end": end})
    etl = Etl(split="label" if needs_label else "temporal")
    check_interactions(list_interactions(raw, window, etl), window, etl)
    check_items(list_items(raw))
    for files in list_features(raw, ()).values():
        check_features(files)


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
    assert np.isnan(table(raw, "features/audio_deep")["vector"].to_pylist()).all()


def test_ratings_become_weights(mmrec: Path, tmp_path: Path) -> None:
    (mmrec / "tiny.inter").write_text("userID\titemID\trating\tx_label\n0\t2\t4.5\t0\n")
    import_mmrec(mmrec, tmp_path / "raw")
    assert table(tmp_path / "raw", "interactions")["weight"].to_pylist() == [4.5]


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_second_import_touches_nothing_and_others_are_refused(mmrec: Path, movielens: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    first = import_mmrec(mmrec, raw)
    before = files_of(raw)
    second = import_mmrec(mmrec, raw)
    assert (first.is_new, second.is_new) == (True, False)
    assert second.modalities == first.modalities and second.start == first.start
    with pytest.raises(DataError, match=r"holds the dataset 'tiny' \(4 rows\), not this version of 'ml-100k'"):
        import_movielens(movielens, raw)
    np.save(mmrec / "text_feat.npy", np.zeros((3, 2)))
    with pytest.raises(DataError, match="not this version of 'tiny'"):
        import_mmrec(mmrec, raw)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"is not empty and holds no source\.json"):
        import_mmrec(mmrec, tmp_path / "foreign")
    assert files_of(raw) == before


def test_failed_import_leaves_nothing(mmrec: Path, tmp_path: Path) -> None:
    np.save(mmrec / "text_feat.npy", np.zeros((2, 2)))
    with pytest.raises(DataError):
        import_mmrec(mmrec, tmp_path / "raw")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


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
            r"tiny\.inter \(1 rows\) has no column 'x_label'; it has userID",
        ),
        (write("tiny.inter", LOG + "x\t1\t0\n"), r"tiny\.inter \(5 rows\) cannot be read: .*x"),
        (
            write("tiny.inter", LOG + "1\t\t0\n"),
            r"tiny\.inter \(5 rows\): 1 rows have no valid itemID, the first on line 6",
        ),
        (write("tiny.inter", LOG + "1\t1\t3\n"), r"1 rows have no valid x_label, the first on line 6"),
        (write("tiny.inter", LOG + "-1\t1\t0\n"), r"1 rows have no valid userID"),
        (write("tiny.inter", LOG + "1\t1\n"), r"tiny\.inter \(5 rows\) cannot be read"),
        (write("tiny.inter", "userID\titemID\tx_label\n"), r"tiny\.inter has 0 rows"),
        (write("items.tsv", "id\tname\n0\tA\n"), r"items\.tsv \(1 rows\) has no column 'itemID'"),
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
        (write("tiny.inter", LOG.replace("userID", "itemID", 1)), r"tiny\.inter \(\d rows\) names a column twice"),
        (
            lambda folder: (folder / "items.tsv").write_bytes(b"itemID\tname\n0\t\xff\xfe\n"),
            r"items\.tsv \(1 rows\): the column 'name' is not UTF-8",
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


def test_items_without_interactions_need_a_catalog(mmrec: Path, tmp_path: Path) -> None:
    for name in ("text", "audio_deep"):
        np.save(mmrec / f"{name}_feat.npy", np.zeros((5, 2)))
    (mmrec / "items.tsv").unlink()
    (mmrec / "items.csv").write_text('itemID,title\n4,"Four, and last"\n')
    assert import_mmrec(mmrec, tmp_path / "raw").num_items == 5
    assert table(tmp_path / "raw", "items")["title"].to_pylist() == [None] * 4 + ["Four, and last"]


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
    assert table(raw, "features/genres")["vector"].to_pylist() == [[1, 1], [0, 1], [0, 0]]
    assert import_movielens(movielens, raw).is_new is False


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "ml-100k.inter",
            RATED.replace("timestamp", "time"),
            r"ml-100k\.inter \(3 rows\) has no column timestamp:float",
        ),
        ("ml-100k.inter", RATED.replace("881250950", "soon"), r"ml-100k\.inter \(3 rows\) cannot be read"),
        (
            "ml-100k.inter",
            RATED.replace("881250950", ""),
            r"ml-100k\.inter \(3 rows\) has 1 rows without timestamp:float",
        ),
        ("ml-100k.item", MOVIES.replace("class", "kind"), r"ml-100k\.item \(3 rows\) has no column class:token_seq"),
        ("ml-100k.item", None, r"does not hold ml-100k\.inter and ml-100k\.item: .*No such file"),
    ],
)
def test_movielens_errors_name_file_rows_and_remedy(tmp_path: Path, name: str, text: str | None, expected: str) -> None:
    (tmp_path / "source").mkdir()
    for file, content in {"ml-100k.inter": RATED, "ml-100k.item": MOVIES, name: text}.items():
        if content is not None:
            (tmp_path / "source" / file).write_text(content)
    with pytest.raises(DataError, match=expected) as caught:
        import_movielens(tmp_path / "source", tmp_path / "raw")
    assert "pip download --no-deps recbole==1.2.1" in caught.value.remedy


def test_a_file_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wheel.whl").write_text("not a zip")
    with pytest.raises(DataError, match=r"wheel\.whl \(row count unknown\) does not hold"):
        import_movielens(tmp_path / "wheel.whl", tmp_path / "raw")


@pytest.mark.parametrize(("name", "modalities"), [("tiktok", {"audio": 128, "image": 128}), ("baby", {})])
def test_shared_folders_are_imported(name: str, modalities: dict[str, int], tmp_path: Path) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is absent: research data is not part of the project")
    assert import_mmrec(DATA / name, tmp_path / "raw").modalities == modalities


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
    assert not import_amazon(tmp_path / f"Kitchen.jsonl{suffix}", raw).is_new


def test_broken_amazon_files_are_errors(tmp_path: Path) -> None:
    reviews = tmp_path / "Kitchen.jsonl"
    with pytest.raises(DataError, match="There is no file"):
        import_amazon(reviews, tmp_path / "raw")
    write_lines(tmp_path / "meta_Kitchen.jsonl", PRODUCTS)
    reviews.write_text('{"user_id": "A1", "rating": \n')
    with pytest.raises(DataError, match="cannot be read after 0 rows"):
        import_amazon(reviews, tmp_path / "raw")
    write_lines(reviews, [{"user_id": "A1"}])
    with pytest.raises(DataError, match="no review with a time"):
        import_amazon(reviews, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


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
    rows = table(raw, "interactions/dt=2026-01-05").to_pylist()
    found = [
        (row["user_id"], row["item_id"], row["event_time"].isoformat(), row["weight"], row["event_type"])
        for row in rows
    ]
    assert found == [
        ("c1", "00017", "2026-01-05T22:30:00+00:00", 2.0, "view"),
        ("c2", "a,b", "2026-01-05T23:30:00+00:00", None, "purchase"),
    ]
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
        ("zone: Europe/Berlin", "time: s", DataError, "cannot be read"),
        ("ids: image_ids.txt", "ids: products.tsv", DataError, "3 ids"),
        ("vector: embedding", "vector: vec", DataError, "cannot be read|no column"),
    ],
)
def test_wrong_mappings_are_errors(shop: Path, before: str, after: str, error: type[Exception], expected: str) -> None:
    (shop / "mapping.yaml").write_text(MAPPING.replace(before, after))
    with pytest.raises(error, match=expected):
        import_mapped(shop / "mapping.yaml", shop / "raw")
    assert not (shop / "raw").exists()
