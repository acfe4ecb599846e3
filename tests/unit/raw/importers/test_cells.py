"""Values of a column become ids, numbers, labels and flags, or do not fit."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from crane_core.raw.importers import cells
from crane_core.raw.importers.cells import Cells
from crane_core.raw.importers.layout import JsonNumber


def told(found: Cells) -> list[Any]:
    """Each value, and `...` for one that does not fit."""
    return [... if bad else value for value, bad in zip(found.values.to_pylist(), found.bad, strict=True)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a", "", None, "NA", " b "], ["a", None, None, "NA", " b "]),
        (["a\nb", "c\rd", "\udcff"], [..., ..., ...]),
        ([7, 2**70, True, [1], {"a": 1}], ["7", str(2**70), ..., ..., ...]),
        ([JsonNumber("100.0"), JsonNumber("1e3"), JsonNumber("-0.0")], ["100", "1000", "0"]),
        ([JsonNumber("1.5"), JsonNumber("9007199254740994.0"), JsonNumber("1e400")], [..., ..., ...]),
        ([JsonNumber("1e9999999"), JsonNumber("1e99999999999999999999")], [..., ...]),
        ([JsonNumber("NaN"), JsonNumber("Infinity")], [None, ...]),
        (pa.array([2**63 - 1, None]), [str(2**63 - 1), None]),
        (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
        (pa.array([4006381333930.0, 2.0**53 - 1, 2.0**53, 0.5]), ["4006381333930", str(2**53 - 1), ..., ...]),
        (pa.array([float("nan"), float("inf")]), [None, ...]),
        (pa.array([2.0**24 - 1, 2.0**24 + 1], pa.float32()), [str(2**24 - 1), ...]),
        (pa.array([True]), [...]),
        (pa.array([0], pa.timestamp("us")), [...]),
        (pa.array([b"a", b"\xff"]), ["a", ...]),
        (pa.nulls(2), [None, None]),
        (pa.array([b"\xff" * 16, None], pa.uuid()), ["ffffffff-ffff-ffff-ffff-ffffffffffff", None]),
        (pa.array(["a"], pa.json_()), ["a"]),
    ],
)
def test_an_id_is_an_id(values: Any, expected: list[Any]) -> None:
    assert told(cells.ids(values)) == expected


def test_numeric_ids_are_their_shortest_form() -> None:
    values = ["007", "7.0", "+7", "-7", "-0.0", "000", "1.5", "x", ""]
    assert told(cells.ids(values, numeric=True)) == ["7", "7", "7", "-7", "0", "0", ..., ..., None]
    assert told(cells.ids(["-", "a"], missing=["-"])) == [None, "a"]


@pytest.mark.parametrize(
    ("values", "decimal", "expected"),
    [
        (["1", "-1.5", "+2", ".5", "1e3", " 7 "], ".", [1, -1.5, 2, 0.5, 1000, 7]),
        (["", "NA", "null", r"\N", "NaN", None], ".", [None] * 6),
        (["1,5", "1_000", "0x1", "inf", "1e999", "one"], ".", [...] * 6),
        (["1,5", "1.500", "2"], ",", [1.5, ..., 2]),
        ([JsonNumber("1.5"), 2, JsonNumber("NaN"), True, JsonNumber("Infinity")], ",", [1.5, 2, None, 1, ...]),
        (pa.array([1.5, float("nan"), float("inf"), None]), ".", [1.5, None, ..., None]),
        (pa.array([True, False, None]), ".", [1, 0, None]),
    ],
)
def test_numbers_are_finite_or_missing(values: Any, decimal: str, expected: list[Any]) -> None:
    assert told(cells.numbers(values, decimal=decimal)) == expected


@pytest.mark.parametrize(
    ("thousands", "decimal", "values", "expected"),
    [
        (
            ",",
            ".",
            ["1,234.5", "-1,234,567", "7", "1,23", "12,34,567", "1234,567"],
            [1234.5, -1234567, 7, ..., ..., ...],
        ),
        (".", ",", ["1.234,5", "1.234", "1,5", "1.2"], [1234.5, 1234, 1.5, ...]),
        (" ", ".", ["1 234", "1  234"], [1234, ...]),
        (None, ".", ["1,234", "1,234.5"], [..., ...]),
    ],
)
def test_groups_of_three_digits_are_a_setting(
    thousands: str | None, decimal: str, values: list[str], expected: list[Any]
) -> None:
    assert told(cells.numbers(values, decimal=decimal, thousands=thousands)) == expected


def test_lists_of_words_are_one_text() -> None:
    values: list[Any] = [["a", 1, JsonNumber("2.5"), None], [], None, "b", [["c"]], {"d": 1}, [True]]
    assert told(cells.joined(values)) == ["a|1|2.5", None, None, "b", ..., ..., ...]
    assert told(cells.joined(pa.array([["a", "b"], None, []]))) == ["a|b", None, None]
    assert told(cells.joined(pa.array([[1.5]]))) == ["1.5"]
    assert told(cells.joined(pa.array([{"a": 1}, None]))) == [..., None]


def test_weights_fit_their_type() -> None:
    assert told(cells.weights(["1.5", "1e39", "-1e39", "3.4e38"])) == [1.5, ..., ..., pytest.approx(3.4e38)]


@pytest.mark.parametrize(
    "values",
    [["train", "VALID", " Test ", "0", "", "?"], [JsonNumber("0.0"), 1, "2", JsonNumber("0.0"), None, 7]],
)
def test_labels_are_words_or_numbers(values: list[Any]) -> None:
    assert told(cells.words(values, cells.LABELS, pa.int8())) == [0, 1, 2, 0, None, ...]


def test_flags_are_words_too() -> None:
    for values in (["yes", "0", "", "maybe"], [True, False, None, "maybe"]):
        assert told(cells.words(values, cells.FLAGS, pa.bool_())) == [True, False, None, ...]
    assert told(cells.words(pa.array([True, None]), cells.FLAGS, pa.bool_())) == [True, None]


def test_a_value_can_be_required() -> None:
    assert told(cells.required(cells.ids)(["a", "", None])) == ["a", ..., ...]


def test_an_id_of_spaces_is_none_and_any_other_stays_as_it_stands() -> None:
    texts = ["  ", " a ", "\u00a0", ""]
    found = [cells.ids(values).values.to_pylist() for values in (texts, pa.array(texts))]
    assert found[0] == found[1] == [None, " a ", "\u00a0", None]
