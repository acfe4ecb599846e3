"""Shapes of data that people bring: each is imported as what it is, or refused with what really helps."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from crane_core.errors import ConfigError, CraneError, DataError
from crane_core.raw.importers import Imported, import_amazon, import_mapped
from tests.worlds.sources import table

SECONDS = 1433221332
EVENTS = [("u0", "i0"), ("u1", "i1"), ("u0", "i2"), ("u1", "i0")]
LOG = {"files": ["ev.csv"], "columns": {"user_id": "u", "item_id": "i", "event_time": "t"}, "time": "s"}


def text(rows: list[Any], head: str = "u,i,t", end: str = "\n") -> str:
    return "".join(f"{row}{end}" for row in ([head] if head else []) + rows)


def lines(extra: str = "", separator: str = ",") -> list[str]:
    return [separator.join([user, item, str(SECONDS + 86400 * n)]) + extra for n, (user, item) in enumerate(EVENTS)]


def parquet(folder: Path, name: str, columns: dict[str, Any], **options: Any) -> None:
    pq.write_table(pa.table(columns), folder / name, **options)


def bring(folder: Path, log: dict[str, Any], features: dict[str, Any] | None = None, **sections: Any) -> Imported:
    """Import a folder by a mapping with changes to its log."""
    mapping = {"dataset": "d", "interactions": {**LOG, **log}, **sections}
    if features is not None:
        mapping["features"] = {"text": {"files": ["f.parquet"], **features}}
    (folder / "m.yaml").write_text(yaml.safe_dump(mapping))
    return import_mapped(folder / "m.yaml", folder / "raw")


def log_of(folder: Path) -> list[tuple[Any, ...]]:
    """User, item and seconds of each row, in the order of time."""
    rows = table(folder / "raw", "interactions").sort_by("event_time").to_pylist()
    return [(row["user_id"], row["item_id"], int(row["event_time"].timestamp())) for row in rows]


EXPECTED = [(user, item, SECONDS + 86400 * n) for n, (user, item) in enumerate(EVENTS)]


@pytest.mark.parametrize("quoted", ['"q', 'the 12" mix', '"whole"', '""'])
def test_every_line_of_a_tsv_file_is_a_row_whatever_its_quotes(tmp_path: Path, quoted: str) -> None:
    rows = lines("\tq", "\t")
    rows[1] = rows[1].replace("\tq", f"\t{quoted}")
    rows[3] = rows[3].replace("\tq", f"\t{quoted}")
    (tmp_path / "ev.tsv").write_text(text(rows, "u\ti\tt\tquery"))
    imported = bring(tmp_path, {"files": ["ev.tsv"]})
    assert log_of(tmp_path) == EXPECTED
    assert imported.counts["interactions"] == {"lines": 5, "rows": 4, "written": 4, "set_aside": {}, "headers": 1}


@pytest.mark.parametrize(("open_on", "ends"), [((1,), "line 3"), ((1, 2), "line 3"), ((3,), "line 5")])
def test_a_quote_that_is_not_closed_is_an_error_with_its_line_or_a_character(
    tmp_path: Path, open_on: tuple[int, ...], ends: str
) -> None:
    rows = [row + (',"q' if n in open_on else ",q") for n, row in enumerate(lines())]
    (tmp_path / "ev.csv").write_text(text(rows, "u,i,t,query"))
    with pytest.raises(DataError, match=rf"ev\.csv {ends}, .* is not closed") as caught:
        bring(tmp_path, {})
    assert "set interactions.quote: none" in caught.value.remedy
    assert bring(tmp_path, {"quote": "none"}).num_interactions == 4
    assert log_of(tmp_path) == EXPECTED


def test_quoted_values_may_go_on_over_lines_and_that_is_told(tmp_path: Path) -> None:
    rows = [f'{row},"one\ntwo, ""three"""' for row in lines()]
    (tmp_path / "ev.csv").write_text(text(rows, "u,i,t,query"))
    imported = bring(tmp_path, {})
    assert log_of(tmp_path) == EXPECTED
    assert imported.counts["interactions"]["lines"] == 9 and imported.counts["interactions"]["continued"] == 4
    assert "go on over 4 further lines" in imported.notes[-1]


def test_ids_of_json_are_their_decimal_text(tmp_path: Path) -> None:
    ids: list[Any] = [7, 12345678901234567890, 4006381333930.0, "007"]
    rows = [json.dumps({"u": item, "i": item, "t": SECONDS + n}) for n, item in enumerate(ids)]
    (tmp_path / "ev.jsonl").write_text(text(rows, ""))
    bring(tmp_path, {"files": ["ev.jsonl"]})
    told = ["7", "12345678901234567890", "4006381333930", "007"]
    assert [row[:2] for row in log_of(tmp_path)] == [(item, item) for item in told]


@pytest.mark.parametrize("value", ["1.5", "9007199254740993.0", "1e30", "true", "[1]", "Infinity"])
def test_an_id_that_is_no_exact_whole_number_is_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "ev.jsonl").write_text(
        f'{{"u": "a", "i": 1, "t": {SECONDS}}}\n{{"u": "a", "i": {value}, "t": {SECONDS}}}\n'
    )
    with pytest.raises(DataError, match=r"1 of 2 rows do not fit: bad_item_id 1 \(.*ev\.jsonl line 2, column 'i'"):
        bring(tmp_path, {"files": ["ev.jsonl"]})
    kept = bring(tmp_path, {"files": ["ev.jsonl"], "max_set_aside": 0.5})
    assert kept.counts["interactions"] == {"lines": 2, "rows": 2, "written": 1, "set_aside": {"bad_item_id": 1}}


def test_float_ids_match_the_ids_of_the_features(tmp_path: Path) -> None:
    ids = [123456789.0, 4006381333930.0, 2.0**53 - 1, 76561198000000000.0]
    columns = {"u": ids[:3], "i": ids[:3], "t": [SECONDS] * 3}
    parquet(tmp_path, "ev.parquet", columns)
    parquet(tmp_path, "f.parquet", {"item_id": ["123456789", "4006381333930"], "vector": [[1.0], [2.0]]})
    imported = bring(tmp_path, {"files": ["ev.parquet"]}, {})
    assert imported.matched == {"features.text": pytest.approx(2 / 3)}
    parquet(tmp_path, "ev.parquet", {"u": ids, "i": ids, "t": [SECONDS] * 4})
    with pytest.raises(DataError, match=r"bad_item_id 1 .*row 4"):
        import_mapped(tmp_path / "m.yaml", tmp_path / "other")


@pytest.mark.parametrize(
    ("column", "time"),
    [
        (pa.array([f"{SECONDS}.0"]), "s"),
        (pa.array([float(SECONDS)]), "s"),
        (pa.array([SECONDS * 1000], pa.int64()), "ms"),
        (pa.array([SECONDS * 10**6], pa.int64()), "us"),
        (pa.array([SECONDS * 10**9], pa.int64()), "ns"),
        *(
            (pa.array([SECONDS * rate], pa.int64()).cast(pa.timestamp(unit, zone)), time)
            for unit, rate in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9))
            for zone in (None, "UTC", "Asia/Tokyo")
            for time in ("iso", "s", "ms")
        ),
        (pa.array(["2015-06-02 05:02:12 UTC"]), "iso"),
        (pa.array(["2015-06-02T05:02:12.000Z"]), "iso"),
        (pa.array(["2015-06-02 07:02:12+02"]), "iso"),
        (pa.array(["2015/6/2 5:02:12 GMT"]), "iso"),
        (pa.array(["02.06.2015 05:02:12"]), "%d.%m.%Y %H:%M:%S"),
    ],
)
@pytest.mark.parametrize("old_timestamps", [False, True])
def test_an_instant_is_taken_for_what_it_is(tmp_path: Path, column: pa.Array, time: str, old_timestamps: bool) -> None:
    columns = {"u": ["u0"], "i": ["i0"], "t": column}
    parquet(tmp_path, "ev.parquet", columns, use_deprecated_int96_timestamps=old_timestamps)
    bring(tmp_path, {"files": ["ev.parquet"], "time": time})
    assert log_of(tmp_path) == [("u0", "i0", SECONDS)]


@pytest.mark.parametrize(
    ("number", "time", "fits"), [(SECONDS * 1000, "s", "ms"), (SECONDS, "ms", "s"), (SECONDS, "iso", "s")]
)
def test_the_remedy_for_a_wrong_unit_works(tmp_path: Path, number: int, time: str, fits: str) -> None:
    (tmp_path / "ev.csv").write_text(text([f"u0,i0,{number}", f"u1,i1,{number}"]))
    with pytest.raises(DataError, match=f"as {fits} they are times") as caught:
        bring(tmp_path, {"time": time})
    assert caught.value.remedy == f"Set interactions.time: {fits}."
    bring(tmp_path, {"time": fits})
    assert {row[2] for row in log_of(tmp_path)} == {SECONDS}


def test_amazon_times_in_another_unit_name_the_unit(tmp_path: Path) -> None:
    row = {"rating": 5.0, "parent_asin": "B0", "user_id": "A", "timestamp": SECONDS * 10**6}
    (tmp_path / "Cat.jsonl").write_text(json.dumps(row))
    (tmp_path / "meta_Cat.jsonl").write_text(json.dumps({"parent_asin": "B0", "title": "", "features": []}))
    with pytest.raises(DataError, match="as us they are times"):
        import_amazon(tmp_path / "Cat.jsonl", tmp_path / "raw")
    (tmp_path / "Cat.jsonl").write_text(json.dumps(row | {"timestamp": SECONDS * 1000.0}))
    imported = import_amazon(tmp_path / "Cat.jsonl", tmp_path / "raw")
    assert imported.modalities == {} and "too few words" in imported.notes[0]
    assert log_of(tmp_path) == [("A", "B0", SECONDS)]
    (tmp_path / "Cat.jsonl").write_text('{"overall": 5.0, "reviewerID": "A", "asin": "B", "unixReviewTime": 1}\n')
    with pytest.raises(DataError, match="they have overall, reviewerID, asin, unixReviewTime"):
        import_amazon(tmp_path / "Cat.jsonl", tmp_path / "other")


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.float16(), pa.float32(), pa.float64(), pa.decimal128(9, 2)])
@pytest.mark.parametrize("listed", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)])
def test_vectors_of_any_numbers_and_integer_ids_are_features(
    tmp_path: Path, kind: pa.DataType, listed: Callable[[pa.DataType], pa.DataType]
) -> None:
    (tmp_path / "ev.csv").write_text(text([row.replace("i", "") for row in lines()]))
    number = Decimal if pa.types.is_decimal(kind) else float if pa.types.is_floating(kind) else int
    rows = [[number(1), number(2)], None, [number(3), number(4)]]
    vectors = pa.array(rows, listed(kind))
    parquet(tmp_path, "f.parquet", {"item_id": [0, 1, 2], "vector": vectors})
    imported = bring(tmp_path, {}, {})
    written = table(tmp_path / "raw", "features/text").to_pylist()
    assert written == [{"item_id": "0", "vector": [1, 2]}, {"item_id": "2", "vector": [3, 4]}]
    assert imported.counts["features.text"] == {"rows": 3, "written": 2, "set_aside": {"no_vector": 1}}


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        (["[1,2]", "[3]"], "bad_vector 2 .*row 1, column 'vector'"),
        (pa.nulls(2), "none of 2 rows .* is an item with a vector"),
        ([["a"], ["b"]], "bad_vector 2"),
    ],
)
def test_vectors_that_are_none_are_refused(tmp_path: Path, vectors: Any, expected: str) -> None:
    (tmp_path / "ev.csv").write_text(text(lines()))
    parquet(tmp_path, "f.parquet", {"item_id": ["i0", "i1"], "vector": vectors})
    with pytest.raises(DataError, match=expected):
        bring(tmp_path, {}, {})


def test_paths_are_relative_or_absolute_and_name_a_file(tmp_path: Path) -> None:
    (tmp_path / "ev [1].csv").write_text(text(lines()))
    for name in ("ev [1].csv", str(tmp_path / "ev*.csv"), f"../{tmp_path.name}/ev*.csv"):
        assert bring(tmp_path, {"files": [name]}, dataset=name).num_interactions == 4
        (tmp_path / "raw").rename(tmp_path / f"raw{len(name)}")
    for name in ("", "/no/such/place/ev.csv", "no\0name", "**a", "*/"):
        with pytest.raises(DataError, match="has no file"):
            bring(tmp_path, {"files": [name]})
    with pytest.raises(ConfigError, match=r"interactions\.files"):
        bring(tmp_path, {"files": []})


def test_a_column_that_is_there_twice_is_refused_unless_its_position_is_given(tmp_path: Path) -> None:
    (tmp_path / "ev.csv").write_text(text(lines(",z"), "u,i,t,i"))
    with pytest.raises(DataError, match="names a column twice in its header: 'i'"):
        bring(tmp_path, {})
    bring(tmp_path, {"columns": {"user_id": "u", "item_id": 2, "event_time": "t"}})
    assert log_of(tmp_path) == EXPECTED
    (tmp_path / "raw").rename(tmp_path / "first")
    names = ["u", "i", "t", "i"]
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([SECONDS]), pa.array(["c"])], names=names)
    pq.write_table(twice, tmp_path / "ev.parquet")
    with pytest.raises(DataError, match="twice the column i"):
        bring(tmp_path, {"files": ["ev.parquet"]})
    (tmp_path / "ev.jsonl").write_text(f'{{"u": "a", "i": "b", "i": "c", "t": {SECONDS}}}')
    with pytest.raises(DataError, match="names a field twice"):
        bring(tmp_path, {"files": ["ev.jsonl"]})


@pytest.mark.parametrize(
    ("encoding", "setting"),
    [("utf-8-sig", "utf-8"), ("utf-16", "utf-8"), ("latin-1", "latin-1"), ("utf-16-le", "utf-16-le")],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_and_line_ends_change_nothing(tmp_path: Path, encoding: str, setting: str, end: str) -> None:
    rows = [row.replace("u0", "ü").replace("i0", "0108775015") for row in lines()]
    (tmp_path / "ev.csv").write_bytes(text(rows, end=end).encode(encoding))
    bring(tmp_path, {"encoding": setting})
    assert [row[:2] for row in log_of(tmp_path)] == [
        ("ü", "0108775015"), ("u1", "i1"), ("ü", "i2"), ("u1", "0108775015")
    ]  # fmt: skip


def test_text_of_another_encoding_is_named_by_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "ev.csv").write_bytes(text(lines()).replace("u1", "ü").encode("latin-1"))
    with pytest.raises(DataError, match=r"2 of 4 rows do not fit: bad_user_id 2 \(.*ev\.csv line 3, column 'u'"):
        bring(tmp_path, {})


def test_a_misspelt_column_of_json_is_an_error_and_an_absent_value_is_none(tmp_path: Path) -> None:
    rows = [{"u": "a", "i": "x", "t": SECONDS, "w": 2.5}, {"u": "b", "i": "y", "t": SECONDS + 1}]
    (tmp_path / "ev.jsonl").write_text(text(list(map(json.dumps, rows)), ""))
    columns = {"user_id": "u", "item_id": "i", "event_time": "t"}
    with pytest.raises(DataError, match="none of 2 objects has weight; they have u, i, t, w"):
        bring(tmp_path, {"files": ["ev.jsonl"], "columns": columns | {"weight": "weight"}})
    bring(tmp_path, {"files": ["ev.jsonl"], "columns": columns | {"weight": "w"}})
    assert table(tmp_path / "raw", "interactions")["weight"].to_pylist() == [2.5, None]


@pytest.mark.parametrize("content", ['{\n "u": "a"\n}', "3", "nonsense"])
def test_json_that_is_not_one_object_a_line_is_an_error_that_says_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "ev.jsonl").write_text(content)
    with pytest.raises(DataError, match="line 1 is no JSON object") as caught:
        bring(tmp_path, {"files": ["ev.jsonl"]})
    assert ("jq -c" in caught.value.remedy) is content.startswith("{")
    assert "one JSON object a line" in caught.value.remedy


def test_ids_of_a_matrix_may_have_a_mark_and_no_header(tmp_path: Path) -> None:
    (tmp_path / "ev.csv").write_text(text(lines()))
    features = {"files": ["f.npy"], "ids": "ids.txt"}
    for rows in (np.arange(6).reshape(3, 2), np.asfortranarray(np.arange(6.0).reshape(3, 2)), np.ones((3, 2), ">f4")):
        np.save(tmp_path / "f.npy", rows)
        (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbfi0\r\ni1\r\ni2\r\n")
        assert bring(tmp_path, {}, features, dataset=str(rows.dtype)).matched == {"features.text": 1.0}
        assert table(tmp_path / "raw", "features/text")["vector"].to_pylist() == rows.tolist()
        (tmp_path / "raw").rename(tmp_path / f"raw-{rows.dtype.str[1:]}")
    (tmp_path / "ids.txt").write_text("item\ni0\ni1\ni2\n")
    with pytest.raises(DataError, match="4 ids; 'item' may be a header"):
        bring(tmp_path, {}, features)
    np.save(tmp_path / "f.npy", np.array([[None]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"no complete \.npy array of numbers: .*Python objects"):
        bring(tmp_path, {}, features)


def test_columns_may_be_positions_where_there_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "ev.csv").write_text(text(lines(), ""))
    with pytest.raises(DataError, match=r"no columns .*; its first line has 3: 'u0', 'i0'") as caught:
        bring(tmp_path, {})
    assert "set interactions.header: false and give positions" in caught.value.remedy
    positions = {"user_id": 1, "item_id": 2, "event_time": 3}
    mapping = {"dataset": "d", "interactions": {**LOG, "columns": positions}}
    (tmp_path / "forgotten.yaml").write_text(yaml.safe_dump(mapping))
    forgotten = import_mapped(tmp_path / "forgotten.yaml", tmp_path / "other")
    assert any("1 rows taken for a header, though columns are given by position" in note for note in forgotten.notes)
    assert forgotten.num_interactions == len(EXPECTED) - 1
    bring(tmp_path, {"header": False, "columns": positions})
    assert log_of(tmp_path) == EXPECTED


@pytest.mark.parametrize(
    ("name", "separator", "log"),
    [
        ("ev.csv", ";", {"separator": ";"}),
        ("ev.csv", "\t", {"separator": "\t"}),
        ("ev.csv", " ", {"separator": " "}),
        ("ratings.dat", "::", {"format": "csv", "separator": "::"}),
        ("log.txt", "|", {"format": "csv", "separator": "|"}),
    ],
)
def test_other_separators_are_settings(tmp_path: Path, name: str, separator: str, log: dict[str, Any]) -> None:
    (tmp_path / name).write_text(text(lines("", separator), "u,i,t".replace(",", separator)))
    if name == "ev.csv":
        with pytest.raises(DataError) as caught:
            bring(tmp_path, {})
        way = caught.value.remedy.partition(";" if separator != ";" else "; or")[0]
        assert way.startswith("Set interactions.separator: ")
        # What the remedy says is YAML for the separator.
        assert yaml.safe_load(way.partition(" ")[2]) == {"interactions.separator": separator}
    bring(tmp_path, {"files": [name], **log})
    assert log_of(tmp_path) == EXPECTED


def test_words_of_labels_weights_and_decimals_are_settings(tmp_path: Path) -> None:
    rows = [f"{row};{label};{weight}" for row, label, weight in zip(
        lines("", ";"), ("train", "Valid", "TEST", "0"), ("1,5", "NA", "", "-"), strict=True
    )]  # fmt: skip
    (tmp_path / "ev.csv").write_text(text(rows, "u;i;t;l;w"))
    columns = {"user_id": "u", "item_id": "i", "event_time": "t", "label": "l", "weight": "w"}
    log: dict[str, Any] = {"separator": ";", "columns": columns}
    with pytest.raises(DataError, match=r"bad_weight 2 \(.*line 2, column 'w': '1,5', .*line 5, column 'w': '-'"):
        bring(tmp_path, log)
    imported = bring(tmp_path, {**log, "decimal": ",", "missing": ["NA", "-"]})
    rows = table(tmp_path / "raw", "interactions").sort_by("event_time").to_pylist()
    assert [(row["label"], row["weight"]) for row in rows] == [(0, 1.5), (1, None), (2, None), (0, None)]
    assert imported.split == "label"
    bring_again = {**log, "decimal": ",", "missing": ["NA", "-"], "labels": {"train": 2, "valid": 0, "test": 1, 0: 0}}
    (tmp_path / "raw").rename(tmp_path / "first")
    bring(tmp_path, bring_again)
    assert sorted(table(tmp_path / "raw", "interactions")["label"].to_pylist()) == [0, 0, 1, 2]


def test_ids_that_match_nothing_are_an_error_with_both_sides(tmp_path: Path) -> None:
    (tmp_path / "ev.csv").write_text(text([row.replace("i", "10") for row in lines()]))
    parquet(tmp_path, "f.parquet", {"item_id": ["100.0", "101.0"], "vector": [[1.0], [2.0]]})
    with pytest.raises(
        DataError, match=r"none of its 2 ids, such as '100\.0', '101\.0', .* items of the log, such as '100'"
    ) as caught:
        bring(tmp_path, {}, {})
    assert "set numeric: [item_id]" in caught.value.remedy
    assert bring(tmp_path, {"numeric": ["item_id"]}, {"numeric": ["item_id"]}).matched[
        "features.text"
    ] == pytest.approx(2 / 3)
    (tmp_path / "raw").rename(tmp_path / "first")
    parquet(tmp_path, "f.parquet", {"item_id": ["u0"], "vector": [[1.0]]})
    with pytest.raises(DataError, match="none of its 1 ids") as caught:
        bring(tmp_path, {}, {}, dataset="e")
    assert "exchange the columns user_id and item_id" in caught.value.remedy


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\n\n",
        b"u,i,t\n",
        b"\x00\xff\xfe",
        b"PAR1",
        b"\x1f\x8b broken",
        b"u,i,t\na,b\n",
        b'u,i,t\n"a',
        b"\xef\xbb\xbf",
    ],
)
@pytest.mark.parametrize("name", ["ev.csv", "ev.tsv", "ev.jsonl", "ev.parquet", "ev.csv.gz"])
def test_damaged_files_are_typed_errors(tmp_path: Path, name: str, damage: bytes) -> None:
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(CraneError) as caught:
        bring(tmp_path, {"files": [name]})
    assert caught.value.remedy and not (tmp_path / "raw").exists()


def test_parquet_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"u": broken, "i": ["x"], "t": [SECONDS]}), tmp_path / "ev.parquet")
    with pytest.raises(DataError, match=r"bad_user_id 1 .*row 1, column 'u': 'a\ufffd'"):
        bring(tmp_path, {"files": ["ev.parquet"]})
