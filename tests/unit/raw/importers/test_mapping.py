"""Mapping files are read whole, or refused with what they may hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from crane_core.errors import ConfigError, DataError
from crane_core.raw.importers.mapping import file_names, list_files, read_mapping

SOUND = """
dataset: d
interactions:
  files: [a.csv]
  columns: {user_id: u, item_id: 2, event_time: t}
items: {files: [b.csv], columns: {item_id: i, price: p}, types: {price: number}}
features:
  genres: {files: [b.csv], kind: categories, columns: {item_id: i, vector: [g, 3]}}
"""


def test_a_mapping_may_name_columns_and_positions(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(SOUND)
    mapping = read_mapping(tmp_path / "m.yaml")
    assert mapping.interactions.columns == {"user_id": "u", "item_id": 2, "event_time": "t"}
    assert mapping.features["genres"].vector_columns == ("g", 3)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("files: [a.csv]", "files: []", r"interactions\.files"),
        ("user_id: u", "user_id: yes", r"interactions\.columns\.user_id"),
        ("user_id: u", "user_id: 0", r"interactions\.columns\.user_id"),
        ("user_id: u, ", "", "must name user_id"),
        ("user_id: u, ", "user_id: 2, ", "must be three columns"),
        ("user_id: u", "user_id: u, user_id: v", "line 5: user_id is given twice"),
        ("dataset: d", "dataset: d\n when: 2026-99-99", "cannot be read"),
        ("dataset: d", "dataset: [", "cannot be read"),
        ("dataset: d", "dataset: d\n[a]: b", "cannot be read"),
        ("  files: [a.csv]", "  files: [a.csv]\n  time: '%H:%M'", "no format with a whole date"),
        ("  files: [a.csv]", "  files: [a.csv]\n  time: soon", "none of iso, s, ms, us, ns"),
        ("  files: [a.csv]", "  files: [a.csv]\n  time: '%Y-%m-%d %Y'", "no format with a whole date"),
        ("  files: [a.csv]", "  files: [a.csv]\n  time: '%Y-%m-%d %H:%M:%S %Z'", "forgets it"),
        ("item_id: i, price", "price", "items.columns must name item_id"),
        ("types: {price", "types: {item_id: number, price", "item_id can only be text"),
        ("  files: [a.csv]", "  files: [a.csv]\n  zone: Factory", "not a time zone"),
        ("  files: [a.csv]", "  files: [a.csv]\n  escape: x\n  separator: '::'", "without escape"),
        ("types: {price", "types: {cost", "items.types names cost"),
        ("item_id: i, price", "'../x': q, item_id: i, price", "is no name of letters"),
        ("kind: categories", "kind: vectors", "several columns can only be"),
        ("vector: [g, 3]", "vector: []", "columns must name item_id and vector"),
    ],
)
def test_wrong_mappings_are_refused(tmp_path: Path, before: str, after: str, expected: str) -> None:
    assert before in SOUND
    (tmp_path / "m.yaml").write_text(SOUND.replace(before, after, 1))
    with pytest.raises(ConfigError, match=expected) as caught:
        read_mapping(tmp_path / "m.yaml")
    assert str(tmp_path / "m.yaml") in caught.value.found and caught.value.remedy


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"- a\n- b\n", b"{" * 5000, b"a: &a [*a]"])
def test_files_that_are_no_mapping_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.yaml").write_bytes(data)
    with pytest.raises(ConfigError):
        read_mapping(tmp_path / "m.yaml")


def test_patterns_find_files_below_and_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.csv", "in/b.csv", "c [1].csv", "d.xls"):
        (tmp_path / name).touch()
    found = list_files(tmp_path / "in", ["*.csv", "../*.csv", str(tmp_path / "c [1].csv")], "interactions.files")
    assert sorted(file_names(tmp_path / "in", found).values()) == ["../a.csv", "../c [1].csv", "b.csv"]
    with pytest.raises(DataError, match="of no known format") as caught:
        list_files(tmp_path, ["d.xls"], "interactions.files", (".csv",))
    assert "Set interactions.format" in caught.value.remedy


def test_settings_that_do_not_go_together_name_the_section(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(SOUND.replace("types: {price", "types: {item_id: number, price", 1))
    with pytest.raises(ConfigError, match=r"another name in items\.columns") as caught:
        read_mapping(tmp_path / "m.yaml")
    assert caught.value.remedy.startswith("Change items in the mapping")
