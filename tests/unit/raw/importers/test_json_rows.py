"""JSON files are one array of objects or an object a line, and each object is counted."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from crane_core.errors import DataError
from crane_core.raw.importers import json_rows
from crane_core.raw.importers.account import Account
from crane_core.raw.importers.layout import Layout
from crane_core.raw.importers.rows import read_chunks

ROWS = [{"u": f"a,]}}{n}", "i": [n, {"x": '"'}], "t": n / 2} for n in range(40)]


def read(path: Path, columns: list[Any], account: Account | None = None) -> list[tuple[int, list[Any]]]:
    """Number and values of each object."""
    found = []
    for chunk in read_chunks(path, Layout(files=("*",)), columns, account or Account("interactions")):
        values = zip(*chunk.columns.values(), strict=True)
        found += [(line, list(row)) for line, row in zip(chunk.lines, values, strict=True)]
    return found


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("mark", ["", "\ufeff", "\n  \n"])
def test_an_array_gives_the_same_rows_as_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, block: int, mark: str
) -> None:
    monkeypatch.setattr(json_rows, "BLOCK", block)
    monkeypatch.setattr(json_rows, "CHUNK_ROWS", 16)
    (tmp_path / "a.json").write_text(mark + json.dumps(ROWS, indent=indent) + "\n\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    (tmp_path / "c.json").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    account = Account("interactions")
    found = read(tmp_path / "a.json", ["u", "i", "t"], account)
    assert found == [(n + 1, [row["u"], row["i"], str(row["t"])]) for n, row in enumerate(ROWS)]
    assert (account.rows, account.lines, account.text_rows) == (40, 0, 0)
    assert read(tmp_path / "b.jsonl", ["u", "i", "t"]) == read(tmp_path / "c.json", ["u", "i", "t"]) == found


@pytest.mark.parametrize(
    ("content", "expected", "remedy"),
    [
        ("", "is empty: 0 objects", "Deliver"),
        ("[ ]", "is empty: 0 objects", "Deliver"),
        ('[{"u": 1}', "after 0 objects: a comma or ] is missing", "complete"),
        ('[{"u": 1}, {"u"', "after 1 objects", "complete"),
        ('[{"u": 1}, ]', "after 1 objects: Expecting value", "complete"),
        ('[{"u": 1} {"u": 2}]', "after 0 objects: a comma or ] is missing", "complete"),
        ('[{"u": 1}]\n[{"u": 2}]', r"after 1 objects: more follows after the array: '\[\{\"u\": 2", "complete"),
        ('[["a", 1], ["b", 2]]', r"the first member is no object: \"\['a', 1\]\"", "@csv"),
        ('[{"u": 1, "u": 2}]', "after 0 objects: an object names a field twice", "complete"),
        ("[" * 100_000, "an array that cannot be read after 0 objects", "complete"),
        ('{"data": [{"u": 1}]}', r"none of 1 objects has u; they have data, data\.u", r"jq -c '\.data\[\]' FILE"),
        ('{"u": 1},\n{"u": 2}', "line 1 is no JSON object", "sed 's/,"),
        ('{"user": {"u": 1}, "w": 2}', r"they have user, user\.u, w", "fields that they have"),
    ],
)
def test_what_is_no_array_of_objects_is_an_error(tmp_path: Path, content: str, expected: str, remedy: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=expected) as caught:
        read(tmp_path / "a.json", ["u"])
    assert remedy.replace("\\", "") in caught.value.remedy


def test_members_that_are_no_objects_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"u": 1}, null, 5, {"u": 2}]')
    account = Account("interactions", 0.5)
    assert read(tmp_path / "a.json", ["u"], account) == [(1, [1]), (4, [2])]
    account.written = 2
    account.settle()
    assert account.set_aside == {"not_json": 2}
    assert account.examples["not_json"][0] == f"{tmp_path / 'a.json'} object 2: 'None, not an object'"


def test_a_member_that_never_ends_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "BLOCK", 16)
    monkeypatch.setattr(json_rows, "MOST_CHARACTERS", 100)
    (tmp_path / "a.json").write_text('[{"u": "' + "x" * 10_000)
    with pytest.raises(DataError, match="cannot be read after 0 objects: Unterminated string"):
        read(tmp_path / "a.json", ["u"])


def test_fields_within_fields_are_named_with_dots(tmp_path: Path) -> None:
    rows = [{"user": {"id": 7}, "tags": [{"n": "x"}, {"n": "y"}], "a.b": 1}, {"user": None, "tags": [], "a.b": 2}]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert read(tmp_path / "a.jsonl", ["user.id", "tags.n", "a.b"]) == [(1, [7, ["x", "y"], 1]), (2, [None, [], 2])]
    with pytest.raises(DataError, match=r"none of 2 objects has user\.name; they have user, user\.id, tags, tags\.n"):
        read(tmp_path / "a.jsonl", ["user.name"])
    with pytest.raises(DataError, match=r"none of 2 objects has tags\.x"):
        read(tmp_path / "a.jsonl", ["tags.x"])


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is absent")
@pytest.mark.parametrize(
    "text", ['["a", "x"]\n["b", "y"]\n', '[["a", "x"], ["b", "y"]]', '[\n ["a", "x"],\n ["b", "y"]]']
)
def test_the_command_for_lists_makes_a_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    layout = Layout(files=("a.jsonl",), header=False)
    with pytest.raises(DataError, match="no object") as caught:
        list(read_chunks(tmp_path / "a.jsonl", layout, ["u"], Account("interactions")))
    query = re.findall("jq -r '(.*?)'", caught.value.remedy)[0]
    with (tmp_path / "a.csv").open("wb") as file:
        subprocess.run(["jq", "-r", query, str(tmp_path / "a.jsonl")], stdout=file, check=True)
    (chunk,) = read_chunks(tmp_path / "a.csv", layout, [1, 2], Account("interactions"))
    assert chunk.columns == {1: ["a", "b"], 2: ["x", "y"]}


def test_a_field_that_is_named_twice_is_to_be_named_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"u": 1, "u": 2}\n')
    with pytest.raises(DataError, match="names a field twice") as caught:
        read(tmp_path / "a.jsonl", ["u"])
    assert "jq" not in caught.value.remedy
