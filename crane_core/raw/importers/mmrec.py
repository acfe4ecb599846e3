"""Import a folder in the layout of the MMRec toolbox.

`*.inter` is tab-separated, with the columns userID, itemID and x_label (0 train, 1 validation, 2 test), and optionally
rating. `{modality}_feat.npy` holds one row per item; the row number is the itemID. `items.tsv` or `items.csv` with the
columns itemID and `name` or `title` is optional. The format has no timestamps, so the rows of each label get one
nominal day, and the label is kept for `etl.split=label`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from crane_core.errors import DataError
from crane_core.raw.files import check_modality
from crane_core.raw.importers import cells
from crane_core.raw.importers.account import Account
from crane_core.raw.importers.cells import Cells, Values
from crane_core.raw.importers.layout import Layout
from crane_core.raw.importers.matrix import load_matrix
from crane_core.raw.importers.modality import finite
from crane_core.raw.importers.rows import read_chunks
from crane_core.raw.importers.tables import Wanted, digest_of, fitting
from crane_core.raw.importers.target import (
    MOST_NUMBERS,
    FeatureWriter,
    Imported,
    lists_of,
    write_interactions,
    write_items,
    write_raw,
)
from crane_core.raw.overlap import share_found
from crane_core.schema import EVENT_TIME, ITEM_ID, LABEL, TEST, TRAIN, USER_ID, VALIDATION, WEIGHT

FORMAT = "mmrec-2"
FEATURE_SUFFIX = "_feat.npy"
FIRST_DAY = date(2000, 1, 1)
LABELS = (TRAIN, VALIDATION, TEST)
MOST_ITEMS_PER_ROW = 1000
"""Without features the largest id gives the number of items. More items than this per row are taken for a wrong id."""
TITLE_COLUMNS = ("title", "name")
_LABEL_WORDS = {str(label): label for label in LABELS}


def _whole(values: Values) -> Cells:
    """Return ids as int64; bad is what is no whole number from 0."""
    found = cells.ids(values, numeric=True)
    fits = pc.fill_null(pc.match_substring_regex(found.values, r"^\d{1,18}$"), False)
    numbers = pc.if_else(fits, found.values, pa.scalar(None, pa.string())).cast(pa.int64())
    return Cells(numbers, ~fits.to_numpy(zero_copy_only=False))


LOG_COLUMNS = {
    "userID": Wanted("userID", _whole),
    "itemID": Wanted("itemID", _whole),
    "x_label": Wanted("x_label", cells.required(lambda values: cells.words(values, _LABEL_WORDS, pa.int8()))),
    "rating": Wanted("rating", cells.weights),
}


def import_mmrec(folder: str | Path, raw: str | Path) -> Imported:
    """Import an MMRec folder into `raw`; a second import of the same folder changes nothing.

    A row of features of which every number is NaN is an item without features. Rows with some NaN or infinity are named
    and imported unchanged: the feature stage quarantines them.

    Raises:
        DataError: there is not exactly one `*.inter`; a column is missing; a value is not an id or label; a feature
            file is not a matrix of numbers with one row per item, or has no finite row; `raw` holds another dataset.
    """
    folder = Path(folder)
    log, catalog, features = _files(folder)
    files = {path.name: digest_of(path) for path in [log, *([catalog] if catalog else []), *features]}
    source = {"dataset": log.stem, "format": FORMAT, "files": files}

    def build(target: Path) -> Imported:
        found = read_mmrec(folder)
        table, titles, num_items = found.log, found.titles, found.num_items
        ids = [str(item) for item in range(num_items)]
        modalities = {}
        items = set(map(str, pc.unique(table["itemID"]).to_pylist()))
        matched = {"items": share_found(items, set(map(str, titles)))} if titles else {}
        for name, matrix in found.matrices.items():
            account = Account(f"features.{name}", settings=False)
            known = _write_matrix(target, name, matrix, account)
            found.accounts.append(account)
            modalities[name] = matrix.shape[1]
            matched[account.name] = share_found(items, known)
        found.accounts[0].written = _write_log(target, table)
        found.accounts[0].settle()
        write_items(target, ids, [titles.get(item) for item in range(num_items)])
        return Imported(
            dataset=log.stem,
            raw=str(Path(raw).absolute()),
            num_users=pc.count_distinct(table["userID"]).as_py(),
            num_items=num_items,
            num_interactions=table.num_rows,
            modalities=modalities,
            split="label",
            start=FIRST_DAY,
            end=FIRST_DAY + timedelta(days=len(LABELS)),
            time_zone=None,
            counts={account.name: account.as_dict() for account in found.accounts},
            matched=matched,
            notes=[note for account in found.accounts for note in account.notes()],
        )

    return write_raw(Path(raw), source, build)


@dataclass(frozen=True)
class MmrecFolder:
    """The data of a folder in MMRec layout.

    Attributes:
        log: table with `userID`, `itemID`, `x_label` and, if delivered, `rating`.
        num_items: size of the catalog; items are numbered from 0.
        titles: item to title, if there is a catalog file.
        matrices: modality to its matrix of numbers [num_items, dim], memory-mapped.
        accounts: what the log and the catalog held.
    """

    log: pa.Table
    num_items: int
    titles: dict[int, str | None]
    matrices: dict[str, NDArray]
    accounts: list[Account]


def read_mmrec(folder: Path) -> MmrecFolder:
    """Read and check a folder.

    Raises:
        DataError: as for `import_mmrec`.
    """
    log, catalog, features = _files(folder)
    table, account = _read_log(log)
    titles, counted = _read_titles(catalog) if catalog else ({}, None)
    num_items = 1 + max(pc.max(table["itemID"]).as_py(), *titles, 0)
    matrices = {path.name.removesuffix(FEATURE_SUFFIX): _read_matrix(path, num_items) for path in features}
    if not matrices and num_items > MOST_ITEMS_PER_ROW * (table.num_rows + len(titles)):
        raise DataError(
            f"{log} ({table.num_rows} rows) has item ids up to {num_items - 1}.",
            "Ids are row numbers from 0: correct the largest id, or renumber the items.",
        )
    return MmrecFolder(table, num_items, titles, matrices, [account, *([counted] if counted else [])])


def _files(folder: Path) -> tuple[Path, Path | None, list[Path]]:
    """Find the log, the catalog and the feature files of a folder."""
    logs = sorted(folder.glob("*.inter"))
    if len(logs) != 1:
        raise DataError(
            f"{folder} holds {len(logs)} *.inter files ({', '.join(path.name for path in logs) or 'none'}, 0 rows "
            "read), expected exactly one.",
            "Point at a folder in MMRec layout: one *.inter file and {modality}_feat.npy files.",
        )
    catalog = next((path for path in (folder / "items.tsv", folder / "items.csv") if path.is_file()), None)
    features = sorted(path for path in folder.glob(f"*{FEATURE_SUFFIX}") if path.is_file())
    for path in features:
        check_modality(path.name.removesuffix(FEATURE_SUFFIX), path)
    return logs[0], catalog, features


def _read_log(path: Path) -> tuple[pa.Table, Account]:
    account = Account("log", settings=False)
    table = _read_delimited(path, LOG_COLUMNS, account, ("rating",))
    if not account.set_aside and table.num_rows == 0:
        raise DataError(
            f"{path} has 0 rows.", "Write one interaction a line: userID, itemID and x_label, separated by tabs."
        )
    account.written = table.num_rows
    _settle(account, "Ids are whole numbers from 0, labels are 0, 1 or 2: correct or remove these rows.")
    return (table if pc.count(table["rating"]).as_py() else table.drop_columns(["rating"])), account


def _read_titles(path: Path) -> tuple[dict[int, str | None], Account]:
    account = Account("catalog", settings=False)
    columns = {"itemID": Wanted("itemID", _whole), **{name: Wanted(name, cells.texts) for name in TITLE_COLUMNS}}
    table = _read_delimited(path, columns, account, TITLE_COLUMNS)
    account.written = table.num_rows
    _settle(account, "Write itemID as a whole number from 0, and text in UTF-8.")
    ids = table["itemID"]
    if pc.count_distinct(ids).as_py() != len(ids):
        raise DataError(
            f"{path} ({table.num_rows} rows): itemID must be a whole number from 0, each once.",
            "Correct or remove the rows with repeated ids.",
        )
    titles = pc.coalesce(*(table[name] for name in TITLE_COLUMNS)).to_pylist()
    return dict(zip(ids.to_pylist(), [text or None for text in titles], strict=True)), account


def _settle(account: Account, remedy: str) -> None:
    """Settle an account; rows that do not fit have a remedy of this format."""
    try:
        account.settle()
    except DataError as error:
        if not account.set_aside:
            raise
        raise DataError(error.found, remedy) from error


def _read_delimited(path: Path, columns: Mapping[str, Wanted], account: Account, optional: Sequence[str]) -> pa.Table:
    layout = Layout(files=(path.name,), format="csv" if path.suffix == ".csv" else "tsv")
    names = [each.column for each in columns.values()]
    batches = [fitting(chunk, columns, account) for chunk in read_chunks(path, layout, names, account, optional)]
    empty = pa.record_batch({name: each.convert([]).values for name, each in columns.items()})
    return pa.Table.from_batches([*batches, empty])


def _read_matrix(path: Path, num_items: int) -> NDArray:
    matrix = load_matrix(path)
    if matrix.shape[0] != num_items:
        raise DataError(
            f"{path} has {matrix.shape[0]} rows, but the items count from 0 to {num_items - 1}, {num_items} in all.",
            "The row number is the itemID: deliver one row per item, or list items without interactions in items.tsv.",
        )
    return matrix


def _write_matrix(target: Path, name: str, matrix: NDArray, account: Account) -> set[str]:
    """Write the rows of a matrix that are not all NaN, and return the items whose rows are finite.

    Raises:
        DataError: there is none.
    """
    items: set[str] = set()
    step = max(1, MOST_NUMBERS // matrix.shape[1])
    with FeatureWriter(target, name) as writer:
        for begin in range(0, len(matrix), step):
            rows = lists_of(matrix[begin : begin + step])
            ids = pa.array(range(begin, begin + len(rows))).cast(pa.string())
            found = finite(rows, np.zeros(len(rows), bool))
            is_finite = found.values.is_valid()
            there = pc.or_(is_finite, pa.array(found.bad))
            account.rows += len(rows)
            for row in np.flatnonzero(found.bad):
                account.notice("with NaN or infinity, which the ETL will set aside", f"item {begin + int(row)}")
            for row in np.flatnonzero(~there.to_numpy(zero_copy_only=False)):
                account.drop("no_vector", f"item {begin + int(row)}")
            items.update(ids.filter(is_finite).to_pylist())
            writer.write(ids.filter(there), rows.filter(there))
    account.written = writer.num_rows()
    account.settle()
    if not items:
        raise DataError(
            f"{name}{FEATURE_SUFFIX}: none of {account.rows} rows is a vector of finite numbers.",
            f"Deliver finite numbers in {name}{FEATURE_SUFFIX}, or remove the file.",
        )
    return items


def _write_log(target: Path, table: pa.Table) -> int:
    written = 0
    for label in LABELS:
        rows = table.filter(pc.equal(table["x_label"], label))
        if rows.num_rows == 0:
            continue
        day = FIRST_DAY + timedelta(days=label)
        columns = {
            USER_ID: rows["userID"].cast(pa.string()),
            ITEM_ID: rows["itemID"].cast(pa.string()),
            EVENT_TIME: pa.repeat(
                pa.scalar(datetime.combine(day, time(), UTC), pa.timestamp("us", tz="UTC")), rows.num_rows
            ),
            LABEL: rows["x_label"],
        }
        if "rating" in rows.column_names:
            columns[WEIGHT] = rows["rating"]
        written += write_interactions(target, day, pa.table(columns))
    return written
