"""Import a folder in the layout of the MMRec toolbox.

`*.inter` is tab-separated, with the columns userID, itemID and x_label (0 train, 1 validation, 2 test), and optionally
rating. `{modality}_feat.npy` holds one row per item; the row number is the itemID. `items.tsv` or `items.csv` with the
columns itemID and `name` or `title` is optional. The format has no timestamps, so the rows of each label get one
nominal day, and the label is kept for `etl.split=label`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from crane_core.errors import DataError
from crane_core.raw.files import check_modality
from crane_core.raw.importers.target import Imported, write_features, write_interactions, write_items, write_raw
from crane_core.schema import EVENT_TIME, ITEM_ID, LABEL, USER_ID, WEIGHT
from crane_core.storage.artifacts import sha256_file

FORMAT = "mmrec-1"
FEATURE_SUFFIX = "_feat.npy"
FIRST_DAY = date(2000, 1, 1)
LABELS = (0, 1, 2)
MOST_ITEMS_PER_ROW = 1000
"""Without features the largest id gives the number of items. More items than this per row are taken for a wrong id."""
TITLE_COLUMNS = ("title", "name")


def import_mmrec(folder: str | Path, raw: str | Path) -> Imported:
    """Import an MMRec folder into `raw`; a second import of the same folder changes nothing.

    Features with NaN or infinity are imported unchanged: the feature stage counts and quarantines them.

    Raises:
        DataError: there is not exactly one `*.inter`; a column is missing; a value is not an id or label; a feature
            file is not a matrix of numbers with one row per item; `raw` holds another dataset.
    """
    folder = Path(folder)
    log, catalog, features = _files(folder)
    files = {path.name: sha256_file(path) for path in [log, *([catalog] if catalog else []), *features]}
    source = {"dataset": log.stem, "format": FORMAT, "files": files}

    def build(target: Path) -> Imported:
        found = read_mmrec(folder)
        table, titles, num_items = found.log, found.titles, found.num_items
        ids = [str(item) for item in range(num_items)]
        modalities = {}
        for name, matrix in found.matrices.items():
            write_features(target, name, ids, matrix)
            modalities[name] = matrix.shape[1]
        _write_log(target, table)
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
    """

    log: pa.Table
    num_items: int
    titles: dict[int, str | None]
    matrices: dict[str, NDArray]


def read_mmrec(folder: Path) -> MmrecFolder:
    """Read and check a folder.

    Raises:
        DataError: as for `import_mmrec`.
    """
    log, catalog, features = _files(folder)
    table = _read_log(log)
    titles = _read_titles(catalog) if catalog else {}
    num_items = 1 + max(pc.max(table["itemID"]).as_py(), *titles, 0)
    matrices = {path.name.removesuffix(FEATURE_SUFFIX): _read_matrix(path, num_items) for path in features}
    if not matrices and num_items > MOST_ITEMS_PER_ROW * (table.num_rows + len(titles)):
        raise DataError(
            f"{log} ({table.num_rows} rows) has item ids up to {num_items - 1}.",
            "Ids are row numbers from 0: correct the largest id, or renumber the items.",
        )
    return MmrecFolder(table, num_items, titles, matrices)


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


def _read_log(path: Path) -> pa.Table:
    columns = {"userID": pa.int64(), "itemID": pa.int64(), "rating": pa.float32(), "x_label": pa.int8()}
    table = _read_delimited(path, columns, "\t")
    for name in ("userID", "itemID", "x_label"):
        if name not in table.column_names:
            raise DataError(
                f"{path} ({table.num_rows} rows) has no column {name!r}; it has {', '.join(table.column_names)}.",
                "Write a tab-separated file with the columns userID, itemID and x_label.",
            )
    if table.num_rows == 0:
        raise DataError(
            f"{path} has 0 rows.", "Write one interaction a line: userID, itemID and x_label, separated by tabs."
        )
    bad = {
        "userID": pc.less(table["userID"], 0),
        "itemID": pc.less(table["itemID"], 0),
        "x_label": pc.invert(pc.is_in(table["x_label"], pa.array(LABELS, pa.int8()))),
    }
    for name, wrong in bad.items():
        count = pc.sum(pc.fill_null(wrong, True)).as_py()
        if count:
            line = 2 + pc.index(pc.fill_null(wrong, True), True).as_py()
            raise DataError(
                f"{path} ({table.num_rows} rows): {count} rows have no valid {name}, the first on line {line}.",
                "Ids are whole numbers from 0, labels are 0, 1 or 2: correct or remove these rows.",
            )
    return table


def _read_titles(path: Path) -> dict[int, str | None]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    table = _read_delimited(path, {"itemID": pa.int64()}, delimiter)
    if "itemID" not in table.column_names:
        raise DataError(
            f"{path} ({table.num_rows} rows) has no column 'itemID'; it has {', '.join(table.column_names)}.",
            "Name the column of the item ids itemID.",
        )
    ids = table["itemID"]
    if ids.null_count or (table.num_rows and pc.min(ids).as_py() < 0) or pc.count_distinct(ids).as_py() != len(ids):
        raise DataError(
            f"{path} ({table.num_rows} rows): itemID must be a whole number from 0, each once.",
            "Correct or remove the rows with missing or repeated ids.",
        )
    title = next((name for name in TITLE_COLUMNS if name in table.column_names), None)
    try:
        titles = table[title].cast(pa.string()).to_pylist() if title else [None] * table.num_rows
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path} ({table.num_rows} rows): the column {title!r} is not UTF-8 text.",
            "Save the file again, encoded as UTF-8.",
        ) from error
    return dict(zip(ids.to_pylist(), [text or None for text in titles], strict=True))


def _read_delimited(path: Path, types: dict[str, pa.DataType], delimiter: str) -> pa.Table:
    quote = '"' if delimiter == "," else False
    try:
        table = pa.csv.read_csv(
            path,
            parse_options=pa.csv.ParseOptions(delimiter=delimiter, quote_char=quote),
            convert_options=pa.csv.ConvertOptions(column_types=types),
        )
    except pa.ArrowException as error:
        with path.open("rb") as handle:
            rows = max(0, sum(1 for _ in handle) - 1)
        raise DataError(
            f"{path} ({rows} rows) cannot be read: {error}.",
            "Correct the lines that the message names; ids and labels are whole numbers.",
        ) from error
    if len(set(table.column_names)) != len(table.column_names):
        raise DataError(
            f"{path} ({table.num_rows} rows) names a column twice: {', '.join(table.column_names)}.",
            "Give every column of the first line a name of its own.",
        )
    return table


def _read_matrix(path: Path, num_items: int) -> NDArray:
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} ({path.stat().st_size} bytes, row count unknown) is no complete .npy array: {error}.",
            "Save it again with numpy.save as a floating point matrix.",
        ) from error
    if not isinstance(matrix, np.ndarray):
        raise DataError(
            f"{path} ({path.stat().st_size} bytes, row count unknown) is an archive of arrays, not one array.",
            "Save one array with numpy.save.",
        )
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiu" or matrix.shape[1] == 0:
        raise DataError(
            f"{path} has shape {list(matrix.shape)} and type {matrix.dtype}, expected a numeric [items, dim] matrix.",
            "Save a matrix of numbers with numpy.save, one row per item.",
        )
    if matrix.shape[0] != num_items:
        raise DataError(
            f"{path} has {matrix.shape[0]} rows, but the items count from 0 to {num_items - 1}, {num_items} in all.",
            "The row number is the itemID: deliver one row per item, or list items without interactions in items.tsv.",
        )
    return matrix


def _write_log(target: Path, table: pa.Table) -> None:
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
        write_interactions(target, day, pa.table(columns))
