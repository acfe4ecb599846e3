"""Records of delimited text keep every character, and a stray quote does not swallow rows without a word."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crane_core.errors import DataError
from crane_core.raw.importers.account import Account
from crane_core.raw.importers.layout import Layout
from crane_core.raw.importers.records import Dialect, lines_like_rows, quoted_records
from crane_core.raw.importers.rows import read_chunks


def escaped(text: str, quote: str | None = '"', separator: str = ",") -> list[list[str]]:
    dialect = Dialect(separator, quote, "\\")
    found = quoted_records(Path("x.csv"), io.StringIO(text, newline=""), dialect, 1, Account("interactions"))
    return [row for _, _, row in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r'"a\b",c\d,\N', [["a\\b", "c\\d", "\\N"]]),
        (r'"say \"hi\"","say ""hi""",x', [['say "hi"', 'say "hi"', "x"]]),
        (r'"a\\",b\\c,"\\\"d"', [["a\\", "b\\c", '\\"d']]),
        (r'a\,b,"a\,b",c', [["a,b", "a\\,b", "c"]]),
        ("a\\\nb,c\\", [["a\\"], ["b", "c\\"]]),
        ('"a\\\nb",c', [["a\\\nb", "c"]]),
        (r'a\,"b,c"d,"e"', [['a,"b', 'c"d', "e"]]),
    ],
)
def test_an_escape_stays_where_it_has_nothing_to_escape(text: str, expected: list[list[str]]) -> None:
    assert escaped(text) == expected


def test_an_escape_works_without_quotes_too() -> None:
    assert escaped('a\\\tb\t"c\tC:\\x\\\\', None, "\t") == [["a\tb", '"c', "C:\\x\\"]]


def test_a_quote_as_escape_is_a_doubled_quote(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('u,i\n"a""b",c\n')
    layout = Layout(files=("a.csv",), escape='"')
    (chunk,) = read_chunks(tmp_path / "a.csv", layout, ["u", "i"], Account("interactions"))
    assert chunk.columns == {"u": ['a"b'], "i": ["c"]}


@given(st.lists(st.lists(st.text(st.sampled_from('ab\\",\n'), max_size=5), min_size=2, max_size=2), min_size=1))
def test_what_a_writer_with_escapes_has_written_comes_back(table: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, escapechar="\\", doublequote=False, quoting=csv.QUOTE_ALL).writerows(table)
    assert escaped(text.getvalue()) == table


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (["1", "a", "x\n2,b,y\n3,c,z"], 2),
        (["1,a,x\r\n2", "b", "y"], 1),
        (["1", "a,x\n2,b", "y"], 1),
        (["1", "a", "good\nvery good, yes"], 0),
        (["1", "a", "one\ntwo\nthree, four, five"], 1),
        (["1", "a", "x"], 0),
    ],
)
def test_lines_of_a_value_are_compared_with_rows(row: list[str], expected: int) -> None:
    assert lines_like_rows(row, ",", 3, 3) == expected


ROWS = [f"u{n},i{n},{n}" for n in range(20)]


def read(folder: Path, rows: list[str], **settings: object) -> Account:
    (folder / "ev.csv").write_text("\n".join(["u,i,q", *rows]) + "\n")
    account = Account("interactions", 0.5)
    layout = Layout.model_validate({"files": ["ev.csv"], **settings})
    account.written = sum(len(chunk) for chunk in read_chunks(folder / "ev.csv", layout, ["u", "i"], account))
    account.settle()
    return account


@pytest.mark.parametrize(("column", "begin", "end"), [(2, 3, 9), (0, 3, 4), (1, 0, 19)])
def test_a_pair_of_stray_quotes_stops_with_what_it_swallowed(tmp_path: Path, column: int, begin: int, end: int) -> None:
    table = [row.split(",") for row in ROWS]
    table[begin][column] = '"' + table[begin][column]
    table[end][column] += '"'
    rows = [",".join(row) for row in table]
    with pytest.raises(DataError, match=rf"{end - begin} of {end - begin} lines within quotes .*{begin + 2} to") as e:
        read(tmp_path, rows)
    assert "interactions.quote: none" in e.value.remedy and "interactions.multiline: true" in e.value.remedy
    assert read(tmp_path, rows, quote="none").rows == 20
    meant = read(tmp_path, rows, multiline=True)
    assert (meant.rows, meant.continued, meant.lines) == (20 - end + begin, end - begin, 21)


def test_swallowed_rows_are_told_beside_text_over_lines_too(tmp_path: Path) -> None:
    rows = [row.replace(f",{n}", f',"{n}\nyes, no"') if n > 10 else row for n, row in enumerate(ROWS)]
    assert read(tmp_path, rows).continued == 9
    rows[3], rows[6] = 'u3,i3,"3', 'u6,i6,6"'
    with pytest.raises(DataError, match=r"3 of 12 lines within quotes look like rows .*lines 5 to 8\)"):
        read(tmp_path, rows)
    rows = [*ROWS]
    rows[11:13] = ['u11,i11,"11', 'u12,i12,12"']
    rows[15:16] = ['u15,i15,"good\nbetter\nbest"']
    account = read(tmp_path, rows)
    assert (account.like_rows, account.continued) == (1, 3)
    assert "1 of which look like rows of the file" in account.notes()[0] and "lines 13 to 14" in account.notes()[0]


def test_lines_that_a_quote_joins_to_a_row_that_does_not_fit_count_as_rows(tmp_path: Path) -> None:
    rows = [*ROWS]
    rows[3], rows[9] = '"' + rows[3], rows[9] + '"'
    account = read(tmp_path, rows)
    assert (account.rows, account.written, dict(account.set_aside)) == (20, 13, {"wrong_fields": 7})
    assert "line 5: '1 values over lines 5 to 11, expected 3'" in account.told()
