"""Compare the ids of the log with those of the catalog or of the features."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Set

from crane_core.errors import DataError

NUM_EXAMPLES = 3
_WHOLE = re.compile(r"\+?(-?)0*(\d+?)(?:\.0*)?")


def share_found(wanted: Set[str], found: Set[str]) -> float:
    """Return the share of the wanted ids that are found; 1 where none is wanted."""
    return len(wanted & found) / len(wanted) if wanted else 1.0


def check_overlap(what: str, items: Set[str], found: Set[str], users: Set[str], numeric: str) -> None:
    """Refuse ids of which none is an item of the log.

    Args:
        what: the table of the ids, as the person knows it.
        items, users: ids of the log.
        found: ids of the table.
        numeric: what to do where the ids agree as numbers.

    Raises:
        DataError: no id of the log is in the table, although both have ids.
    """
    if not items or not found or not items.isdisjoint(found):
        return
    remedy = "Name the column of the same ids in both, or deliver the table for the items of the log."
    for same, way in (
        (as_number, f"They agree as numbers: {numeric}"),
        (str.strip, "They agree without the spaces around them: remove the spaces from both."),
        (str.casefold, "They agree in lower case: write the ids of both in one case."),
    ):
        if not _each(same, items).isdisjoint(_each(same, found)):
            remedy = way
            break
    else:
        if not users.isdisjoint(found):
            remedy = "Its ids are users of the log: exchange the columns user_id and item_id."
    raise DataError(
        f"{what}: none of its {len(found)} ids, such as {examples(found)}, is among the {len(items)} items of the log, "
        f"such as {examples(items)}.",
        remedy,
    )


def number_twins(items: Set[str], found: Set[str]) -> list[str]:
    """Return ids of the log that are not found, although the same number is, as `100.0` where `100` is found."""
    known = _each(as_number, found)
    return sorted(item for item in items - found if as_number(item) in known)


def as_number(text: str) -> str:
    """Return a whole number in its shortest decimal form, any other text as it is."""
    found = _WHOLE.fullmatch(text)
    return found[1] + found[2] if found else text


def examples(ids: Iterable[str]) -> str:
    """Return the first ids in order."""
    return ", ".join(map(repr, sorted(ids)[:NUM_EXAMPLES]))


def _each(form: Callable[[str], str], ids: Set[str]) -> set[str]:
    return {form(each) for each in ids}
