"""Features of a mapping: vectors, categories as multi-hot, numbers as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crane_core.errors import ConfigError, DataError
from crane_core.raw.importers import import_mapped, modality, target
from crane_core.raw.importers.account import Account
from crane_core.raw.importers.mapping import MappedModality
from crane_core.raw.importers.modality import feature_files, write_modality
from tests.worlds.sources import table

DATA = Path(__file__).parents[5] / "shared" / "data" / "movietweetings"


def write(folder: Path, account: Account | None = None, **entry: Any) -> dict[str | None, Any]:
    """Write a modality and return the vector of each item."""
    mapped = MappedModality.model_validate(entry)
    account = account or Account("features.x")
    write_modality(folder / "raw", "x", feature_files(folder, "x", mapped), mapped, account)
    return {row["item_id"]: row["vector"] for row in table(folder / "raw", "features/x").to_pylist()}


WORDS = {"i1": "Tea|Steel", "i2": "", "i3": "Tea", "i4": "NA", "i5": " Tea | Tea "}
HOT = {"i1": [1, 1], "i3": [0, 1], "i5": [0, 1]}


def test_words_of_a_column_become_one_column_each(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,g\n" + "".join(f"{item},{words}\n" for item, words in WORDS.items()))
    account = Account("features.x")
    entry: dict[str, Any] = {"kind": "categories", "columns": {"item_id": "id", "vector": "g"}}
    assert write(tmp_path, account, files=["a.csv"], **entry) == HOT
    assert account.as_dict() == {
        "lines": 6, "headers": 1, "rows": 5, "written": 3, "set_aside": {"no_category": 2}
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_lists_of_words_are_categories_too(tmp_path: Path, name: str) -> None:
    lists = [[word for word in words.split("|") if word.strip() not in ("", "NA")] for words in WORDS.values()]
    if name == "a.parquet":
        pq.write_table(pa.table({"id": list(WORDS), "g": lists}), tmp_path / name)
    else:
        rows = [json.dumps({"id": item, "g": words}) for item, words in zip(WORDS, lists, strict=True)]
        (tmp_path / name).write_text("\n".join(rows))
    entry: dict[str, Any] = {"kind": "categories", "columns": {"item_id": "id", "vector": "g"}}
    assert write(tmp_path, files=[name], **entry) == HOT


def test_lists_that_are_written_as_text_are_lists(tmp_path: Path) -> None:
    lists = ["['Tea', 'Steel']", "[]", '["Tea", null]', "['NA']", "[ Tea ]"]
    (tmp_path / "a.tsv").write_text("id\tg\n" + "".join(f"i{n}\t{words}\n" for n, words in enumerate(lists, 1)))
    entry: dict[str, Any] = {"files": ["a.tsv"], "kind": "categories", "columns": {"item_id": "id", "vector": "g"}}
    assert write(tmp_path, **entry) == {"i1": [1, 1, 0], "i3": [0, 1, 0], "i5": [0, 0, 1]}
    (tmp_path / "a.tsv").write_text("id\tg\ni1\t[{'id': 1, 'name': 'Tea'}]\ni2\tTea\n")
    with pytest.raises(DataError, match=r"bad_category_0 1 .*line 2, column 'g'"):
        write(tmp_path / "..", **{**entry, "files": [str(tmp_path / "a.tsv")]})


@pytest.mark.parametrize("text", ["[{[]: 1}]", "[{[1]}]"])
def test_text_that_only_looks_like_a_list_is_a_word(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.tsv").write_text(f"id\tg\ni1\t{text}\ni2\tTea\n")
    entry: dict[str, Any] = {"files": ["a.tsv"], "kind": "categories", "columns": {"item_id": "id", "vector": "g"}}
    assert sorted(write(tmp_path, **entry).values()) == [[0, 1], [1, 0]]


def test_several_columns_of_words_keep_their_names_and_too_many_words_stop(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,colour,size\ni1,1,1\ni2,2,1\n")
    entry: dict[str, Any] = {"kind": "categories", "columns": {"item_id": "id", "vector": ["colour", "size"]}}
    assert write(tmp_path, files=["a.csv"], **entry) == {"i1": [1, 0, 1], "i2": [0, 1, 1]}
    with pytest.raises(DataError, match="has 3 categories in 2 rows") as caught:
        write(tmp_path / "..", files=[str(tmp_path / "a.csv")], most=2, **entry)
    assert "Set features.x.most: 3" in caught.value.remedy


@pytest.mark.parametrize(
    ("kind", "column", "expected"),
    [("categories", "g", [1.0]), ("numbers", "n", [2.0]), ("vectors", "v", [3.0])],
)
def test_vectors_of_no_item_are_counted(tmp_path: Path, kind: str, column: str, expected: list[float]) -> None:
    rows = [{"id": item, "g": "Tea", "n": 2, "v": [3]} for item in ("i1", None, "")] + [{"id": None, "g": None}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    account = Account("features.x")
    columns = {"item_id": "id", "vector": column}
    assert write(tmp_path, account, files=["a.json"], kind=kind, columns=columns) == {"i1": expected}
    reason = "no_category" if kind == "categories" else "no_vector"
    assert account.set_aside == {"no_id": 2, reason: 1} and not account.noticed


def test_rows_of_a_matrix_without_an_item_are_counted(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.arange(3.0).reshape(3, 1))
    (tmp_path / "ids.txt").write_text("i0\n\ni2\n")
    account = Account("features.x")
    assert write(tmp_path, account, files=["f.npy"], ids="ids.txt") == {"i0": [0], "i2": [2]}
    assert account.set_aside == {"no_id": 1} and account.written == 2


def test_columns_of_numbers_are_a_vector_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id;h;w\ni1;1,5;2\ni2;;2\ni3;-3;1e3\n")
    entry: dict[str, Any] = {"kind": "numbers", "columns": {"item_id": "id", "vector": ["h", "w"]}}
    account = Account("features.x")
    found = write(tmp_path, account, files=["a.csv"], separator=";", decimal=",", **entry)
    assert found == {"i1": [1.5, 2], "i3": [-3, 1000]}
    assert account.set_aside == {"no_vector": 1}


def test_matrices_are_written_in_parts_whose_offsets_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modality, "MOST_NUMBERS", 10)
    rows = np.arange(28, dtype=np.int64).reshape(4, 7).T
    np.save(tmp_path / "a.npy", rows)
    (tmp_path / "ids.txt").write_text("".join(f"i{n}\n" for n in range(7)))
    assert write(tmp_path, files=["a.npy"], ids="ids.txt") == {f"i{n}": row.tolist() for n, row in enumerate(rows)}
    with pq.ParquetFile(tmp_path / "raw" / "features" / "x" / "part-0.parquet") as parquet:
        assert parquet.num_row_groups == 4


def test_parts_of_a_large_matrix_stay_below_the_offsets_of_a_list() -> None:
    for width in (1, 384, 10**6):
        assert max(1, target.MOST_NUMBERS // width) * width < 2**31


@pytest.mark.parametrize(
    ("entry", "error", "expected"),
    [
        ({"files": ["a.npy"]}, ConfigError, "is a matrix without ids"),
        ({"files": ["a.npy"], "ids": "none.txt"}, DataError, "no file 'none.txt'"),
        ({"files": ["a.npy", "a.csv"], "ids": "a.csv"}, DataError, "matches 2 files"),
        ({"files": ["a.npy"], "ids": "a.csv", "kind": "numbers"}, DataError, "one .npy matrix of vectors"),
        ({"files": ["a.csv"], "columns": {"item_id": "id", "vector": "g"}}, DataError, "bad_vector 1 .*a.csv line 2"),
        ({"files": ["z.npy"], "ids": "a.csv"}, DataError, "is no complete .npy array"),
    ],
)
def test_features_that_cannot_be_read_are_errors(
    tmp_path: Path, entry: dict[str, Any], error: type[Exception], expected: str
) -> None:
    np.save(tmp_path / "a.npy", np.ones((1, 1)))
    (tmp_path / "a.csv").write_text("id,g\ni1,Tea\n")
    (tmp_path / "z.npy").write_bytes(b"PK\x03\x04xx")
    with pytest.raises(error, match=expected):
        write(tmp_path, **entry)


@pytest.mark.slow
def test_movietweetings_comes_through_one_mapping(tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is absent: research data is not part of the project")
    films = {"files": [str(DATA / "movies.csv")]}
    mapping = {
        "dataset": "movietweetings",
        "interactions": {
            "files": [str(DATA / "ratings.csv")],
            "columns": {"user_id": "user_id", "item_id": "movie_id", "event_time": "timestamp", "weight": "rating"},
            "time": "s",
        },
        "items": {**films, "columns": {"item_id": "movie_id", "title": "title", "genres": "genres"}},
        "features": {"genres": {**films, "kind": "categories", "columns": {"item_id": "movie_id", "vector": "genres"}}},
    }
    (tmp_path / "m.yaml").write_text(json.dumps(mapping))
    imported = import_mapped(tmp_path / "m.yaml", tmp_path / "raw")
    assert (imported.num_users, imported.num_items, imported.num_interactions) == (16554, 10506, 100000)
    assert imported.modalities == {"genres": 25} and imported.matched["items"] == 1
    assert (str(imported.start), str(imported.end)) == ("2013-09-01", "2013-09-02")
    items = {row["item_id"]: row for row in table(tmp_path / "raw", "items").to_pylist()}
    assert items["0002844"] == {
        "item_id": "0002844",
        "title": "Fantômas - À l'ombre de la guillotine (1913)",
        "genres": "Crime|Drama",
    }
    vectors = {row["item_id"]: row["vector"] for row in table(tmp_path / "raw", "features/genres").to_pylist()}
    assert sum(vectors["0002844"]) == 2 and {len(vector) for vector in vectors.values()} == {25}


NOT_A_NUMBER, ENDLESS = float("nan"), float("inf")
VECTORS: list[list[float | None] | None] = [
    [1, 2], None, [], [NOT_A_NUMBER, NOT_A_NUMBER], [None, None], [None, NOT_A_NUMBER], [3, 4],
]  # fmt: skip
DAMAGED: list[list[float | None]] = [[1, None], [NOT_A_NUMBER, 1], [ENDLESS, 1], [1e300, 1]]


def deliver(folder: Path, form: str, rows: list[Any], ids: list[str] | None = None) -> dict[str, Any]:
    """Write vectors in a form and return the settings that read them."""
    ids = ids or [f"i{n}" for n in range(len(rows))]
    if form == "parquet":
        pq.write_table(
            pa.table({"item_id": ids, "vector": pa.array(rows, pa.list_(pa.float64()))}), folder / "f.parquet"
        )
        return {"files": ["f.parquet"]}
    if form == "json":
        lines = [json.dumps({"item_id": item, "vector": row}) for item, row in zip(ids, rows, strict=True)]
        (folder / "f.jsonl").write_text("\n".join(lines))
        return {"files": ["f.jsonl"]}
    matrix = [[NOT_A_NUMBER if each is None else each for each in row or [None, None]] for row in rows]
    np.save(folder / "f.npy", np.array(matrix, dtype=np.float64))
    (folder / "ids.txt").write_text("".join(f"{item}\n" for item in ids))
    return {"files": ["f.npy"], "ids": "ids.txt"}


@pytest.mark.parametrize("form", ["parquet", "json", "matrix"])
def test_a_vector_without_a_number_is_missing_and_a_broken_one_does_not_fit(tmp_path: Path, form: str) -> None:
    account = Account("features.x")
    assert write(tmp_path, account, **deliver(tmp_path, form, VECTORS)) == {"i0": [1, 2], "i6": [3, 4]}
    assert dict(account.set_aside) == {"no_vector": 5} and account.examples["no_vector"][0].count("i1") == 1
    entry = deliver(tmp_path, form, [*VECTORS, *DAMAGED])
    (tmp_path / "b").mkdir()
    entry = {**entry, "files": [str(tmp_path / entry["files"][0])]} | ({"ids": "../ids.txt"} if "ids" in entry else {})
    with pytest.raises(DataError, match=r"4 of 11 rows do not fit: .*bad_vector 4 \("):
        write(tmp_path / "b", Account("features.x"), **entry)
    (tmp_path / "c").mkdir()
    account = Account("features.x", 0.5)
    assert set(write(tmp_path / "c", account, **entry)) == {"i0", "i6"}
    assert dict(account.set_aside) == {"no_vector": 5, "bad_vector": 4}


@pytest.mark.parametrize("form", ["parquet", "json", "matrix"])
def test_the_first_vector_of_an_item_counts(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modality, "MOST_NUMBERS", 4)
    rows = [None, [1, 2], [3, 4], [5, 6], [7, 8]]
    account = Account("features.x")
    entry = deliver(tmp_path, form, rows, ["a", "a", "b", "a", "b"])
    assert write(tmp_path, account, **entry) == {"a": [1, 2], "b": [3, 4]}
    assert dict(account.set_aside) == {"no_vector": 1, "repeated_id": 2}
    assert "the first row of an item counts" in "".join(account.notes())
    assert "'a'" in account.examples["repeated_id"][0]


def test_the_words_of_all_rows_of_an_item_count(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,g\na,Tea\nb,Tea\na,Steel\na,\n")
    account = Account("features.x")
    entry: dict[str, Any] = {"files": ["a.csv"], "kind": "categories", "columns": {"item_id": "id", "vector": "g"}}
    assert write(tmp_path, account, **entry) == {"a": [1, 1], "b": [0, 1]}
    assert dict(account.set_aside) == {"no_category": 1, "joined_id": 1} and account.rows == 4


def test_empty_lines_at_the_end_of_the_ids_are_no_ids(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 1)))
    (tmp_path / "ids.txt").write_bytes(b"i1\r\n\r\ni3\r\n\r\n\r\n")
    assert write(tmp_path, files=["a.npy"], ids="ids.txt") == {"i1": [1], "i3": [1]}


def test_vectors_without_a_usual_length_stop(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no length is that of most of its 2 vectors: 1 of length 1, 1 of length 2"):
        write(tmp_path, **deliver(tmp_path, "json", [[1], [1, 2], None]))
