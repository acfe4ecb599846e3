"""The account of an import adds up, or stops it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from crane_core.errors import DataError
from crane_core.raw.importers.account import FEATURE_HINTS, ITEM_HINTS, LOG_HINTS, Account, one_of, place
from crane_core.raw.importers.layout import Layout
from crane_core.raw.importers.mapping import MappedItems, MappedLog, MappedModality


@pytest.mark.parametrize("change", [{"written": 8}, {"rows": 11}, {"lines": 13}, {"blank": 0}])
def test_counts_that_do_not_add_up_stop_the_import(change: dict[str, int]) -> None:
    counts = {"lines": 12, "headers": 1, "blank": 1, "rows": 10, "text_rows": 10, "written": 9}
    account = Account("interactions", 0.5, **counts)
    account.drop("bad_weight", "a.csv line 3")
    account.settle()
    broken = Account("interactions", 0.5, **{**counts, **change})
    broken.drop("bad_weight", "a.csv line 3")
    with pytest.raises(DataError, match="The import would lose rows, so it has stopped"):
        broken.settle()


def test_too_many_rows_that_do_not_fit_name_the_settings_that_help() -> None:
    account = Account("interactions", 0.1, rows=10, written=7)
    for line in (3, 4, 5):
        account.drop("bad_weight", place(Path("a.csv"), line, "w", "x" * 99))
    with pytest.raises(
        DataError, match=r"3 of 10 rows do not fit: bad_weight 3 \(a\.csv line 3, column 'w': 'xxx"
    ) as caught:
        account.settle()
    assert "interactions.missing" in caught.value.remedy and "max_set_aside: 0.3 " in caught.value.remedy
    account.max_set_aside = 0.3
    account.settle()
    assert account.as_dict() == {"rows": 10, "written": 7, "set_aside": {"bad_weight": 3}}
    assert account.notes()[0].startswith("interactions: 3 rows set aside, bad_weight (a.csv line 3")


@pytest.mark.parametrize(
    ("reason", "value", "setting"),
    [
        ("bad_user_id", "Zo\udceb", "set items.encoding to that of the file"),
        ("bad_user_id", "['a', 'b']", "a list needs a row for each member"),
        ("bad_event_time", "soon", "items.time"),
        ("bad_price", "dear", "items.types"),
        ("bad_number_1", "1,500", "items.thousands"),
        ("bad_category_0", "{}", "as in user.id"),
        ("wrong_fields", "4 values", "set items.separator"),
    ],
)
def test_each_reason_has_a_remedy_of_its_own(reason: str, value: str, setting: str) -> None:
    account = Account("items", rows=2, written=1)
    account.drop(reason, place(Path("a.csv"), 2, "c", value))
    with pytest.raises(DataError) as caught:
        account.settle()
    assert setting in caught.value.remedy
    assert ("encoding" in caught.value.remedy) == ("\udceb" in value)


@pytest.mark.parametrize(
    ("name", "model", "hints"),
    [
        ("interactions", MappedLog, LOG_HINTS),
        ("items", MappedItems, ITEM_HINTS),
        ("features.x", MappedModality, FEATURE_HINTS),
    ],
)
def test_remedies_name_settings_that_the_section_has(name: str, model: type[Layout], hints: dict[str, str]) -> None:
    for reason in [*hints, "bad_event_type", "bad_title", "bad_price", "not_json"]:
        account = Account(name, rows=2, written=1)
        account.drop(reason, "a.csv line 2")
        with pytest.raises(DataError) as caught:
            account.settle()
        named = re.findall(rf"{re.escape(name)}\.(\w+)", caught.value.remedy)
        assert named and set(named) <= set(model.model_fields)


@pytest.mark.parametrize(("name", "is_optional"), [("interactions", False), ("items", True), ("features.x", True)])
def test_no_row_at_all_is_an_error(name: str, is_optional: bool) -> None:
    with pytest.raises(DataError, match=rf"{name}: the files hold 0 rows") as caught:
        Account(name, lines=1, headers=1).settle()
    assert (f"leave {name} out of the mapping" in caught.value.remedy) is is_optional
    assert caught.value.remedy.startswith("Deliver them again with rows")


def test_rows_with_nothing_to_write_do_not_count_as_unfit() -> None:
    account = Account("features.text", 0.0, rows=10, written=1)
    account.drop("no_vector", "", 9)
    account.settle()
    assert account.notes() == ["features.text: 9 rows set aside, no_vector"]


def test_formats_without_settings_lead_to_a_mapping() -> None:
    assert Account("log").way("set {}.time: ms") == "set log.time: ms"
    assert Account("log", settings=False).way("set {}.time: ms") == (
        "import it with crane import mapped, and set interactions.time: ms in its mapping"
    )
    assert Account("metadata", settings=False).way("set {}.files").endswith("set items.files in its mapping")
    assert Account("log", settings=False).way("correct the rows") == "correct the rows"
    assert one_of(["close it", "set b: c"]) == "Close it; or set b: c."
