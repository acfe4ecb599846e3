"""Ids of the log beside those of another table: what none of them has in common is said with examples."""

from __future__ import annotations

import pytest

from crane_core.errors import DataError
from crane_core.raw.overlap import as_number, check_overlap, number_twins, share_found


@pytest.mark.parametrize(
    ("items", "found", "expected"),
    [
        ({"100", "7"}, {"100.0"}, "They agree as numbers: do so"),
        ({"007"}, {"7"}, "They agree as numbers: do so"),
        ({" a"}, {"a "}, "without the spaces"),
        ({"B1"}, {"b1"}, "in lower case"),
        ({"x"}, {"u1"}, "exchange the columns"),
        ({"x"}, {"y"}, "Name the column of the same ids"),
    ],
)
def test_ids_without_a_match_are_refused_with_what_helps(items: set[str], found: set[str], expected: str) -> None:
    with pytest.raises(DataError, match="features/text: none of its") as caught:
        check_overlap("features/text", items, found, {"u1"}, "do so")
    assert expected in caught.value.remedy
    assert all(repr(each) in caught.value.found for each in (min(items), min(found)))


@pytest.mark.parametrize(("items", "found"), [({"a", "b"}, {"b"}), (set(), {"a"}), ({"a"}, set())])
def test_one_match_or_an_empty_side_is_enough(items: set[str], found: set[str]) -> None:
    check_overlap("items", items, found, set(), "")


def test_numbers_in_another_form_are_found() -> None:
    assert [as_number(text) for text in ("100.0", "007", "+7", "-0.0", "1.5", "a7", "0")] == [
        "100", "7", "7", "0", "1.5", "a7", "0"
    ]  # fmt: skip
    assert number_twins({"100.0", "7", "x"}, {"100", "7"}) == ["100.0"]
    assert (share_found({"a", "b"}, {"b"}), share_found(set(), {"b"})) == (0.5, 1.0)
