"""Compare the ids of the log with those of the catalog and of the features, before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set

import pyarrow as pa
import pyarrow.compute as pc

from crane_core.config import Features
from crane_core.errors import DataError
from crane_core.raw.checks import Footer, check_features, read_ids
from crane_core.raw.files import FEATURES_FOLDER, ITEMS_FOLDER, list_features
from crane_core.raw.location import Location
from crane_core.schema import ITEM_ID, USER_ID

NUM_EXAMPLES = 3
MOST_ROWS = 1_000_000
"""Rows of the log, its newest, whose ids are compared; and ids of a table that are looked at for their form."""
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


def check_items_meet(what: str, items: Set[str], found: Iterable[str], users: Set[str], remedy: str) -> None:
    """Refuse ids of which none is an item of the log, where the format leaves no choice of columns.

    Args:
        what, items, users: as for `check_overlap`.
        found: ids of the table.
        remedy: what to do.

    Raises:
        DataError: no id of the log is in the table, although both have ids.
    """
    try:
        check_overlap(what, items, set(found), users, remedy)
    except DataError as error:
        raise DataError(error.found, remedy) from error


def number_twins(items: Set[str], found: Set[str]) -> list[str]:
    """Return ids of the log that are not found, although the same number is, as `100.0` where `100` is found."""
    known = _each(as_number, found)
    return sorted(item for item in items - found if as_number(item) in known)


def as_number(text: str) -> str:
    """Return a whole number in its shortest decimal form, any other text as it is."""
    found = _WHOLE.fullmatch(text)
    return (found[1] if found[2] != "0" else "") + found[2] if found else text


def examples(ids: Iterable[str]) -> str:
    """Return the first ids in order."""
    return ", ".join(map(repr, sorted(ids)[:NUM_EXAMPLES]))


def _each(form: Callable[[str], str], ids: Set[str]) -> set[str]:
    return {form(each) for each in ids}


def check_delivered(root: Location, log: Sequence[Footer], catalog: Sequence[Footer], features: Features) -> None:
    """Refuse a catalog, or features that are delivered already, without any item of the log.

    Args:
        root: raw root.
        log: footers of interaction files, in the order of their days.
        catalog: footers of the catalog.
        features: which modalities are used.

    Raises:
        DataError: the newest rows of the log and a table have no item in common, or features cannot be read.
    """
    tables = {str(root / ITEMS_FOLDER): catalog}
    if (root / FEATURES_FOLDER).children():
        for name, files in list_features(root, features.modalities).items():
            tables[str(root / FEATURES_FOLDER / name)] = check_features(files, features.binary)
    newest = list(reversed(log))
    items: set[str] = set().union(*_ids(newest, ITEM_ID))
    wanted = pa.array(sorted(items), pa.string())
    for what, footers in tables.items():
        found: set[str] = set()
        for ids in (ids for footer in footers for ids in read_ids(footer)):
            if pc.any(pc.is_in(wanted, ids)).as_py():
                break
            found |= set(ids[:MOST_ROWS].drop_null().to_pylist()) if len(found) < MOST_ROWS else set()
        else:
            users: set[str] = set().union(*_ids(newest, USER_ID))
            check_overlap(what, items, found, users, "write each of them as the same text, such as 100.")


def _ids(footers: Iterable[Footer], column: str) -> Iterator[set[str]]:
    """Yield the ids of the first rows of some files."""
    rows = 0
    for footer in footers:
        for ids in read_ids(footer, column):
            yield set(pc.unique(ids).drop_null().to_pylist())
            rows += len(ids)
            if rows >= MOST_ROWS:
                return
