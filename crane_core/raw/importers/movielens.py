"""Import MovieLens 100K from the RecBole wheel, with its real timestamps and one partition per day."""

from __future__ import annotations

import hashlib
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from crane_core.errors import DataError
from crane_core.raw.importers.target import Imported, write_features, write_interactions, write_items, write_raw
from crane_core.schema import EVENT_TIME, ITEM_ID, USER_ID, WEIGHT

FORMAT = "movielens-1"
DATASET = "ml-100k"
WHEEL_FOLDER = "recbole/dataset_example/ml-100k"
FILES = ("ml-100k.inter", "ml-100k.item")
LOG_COLUMNS = {
    "user_id:token": pa.string(),
    "item_id:token": pa.string(),
    "rating:float": pa.float32(),
    "timestamp:float": pa.float64(),
}
CATALOG_COLUMNS = {
    "item_id:token": pa.string(),
    "movie_title:token_seq": pa.string(),
    "release_year:token": pa.string(),
    "class:token_seq": pa.string(),
}
REMEDY = (
    "Give the wheel recbole-1.2.1-py3-none-any.whl (pip download --no-deps recbole==1.2.1), "
    "or a folder with ml-100k.inter and ml-100k.item."
)
TEXT_DIM = 64
TEXT_SEED = 0


def import_movielens(source: str | Path, raw: str | Path) -> Imported:
    """Import MovieLens 100K into `raw`; a second import of the same source changes nothing.

    It has two modalities: `text`, TF-IDF of title, genres and year reduced by a seeded truncated SVD, and `genres`, one
    column per genre.

    Args:
        source: the wheel `recbole-1.2.1-*.whl`, read as a zip, or a folder with ml-100k.inter and ml-100k.item.
        raw: the raw folder to write.

    Raises:
        DataError: a file or column is missing or unreadable; `raw` holds another dataset.
    """
    source = Path(source)
    files = _read_files(source)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}

    def build(target: Path) -> Imported:
        log = _read(source, FILES[0], files, LOG_COLUMNS)
        catalog = _read(source, FILES[1], files, CATALOG_COLUMNS)
        events = pa.table(
            {
                USER_ID: log["user_id:token"],
                ITEM_ID: log["item_id:token"],
                EVENT_TIME: pc.cast(log["timestamp:float"], pa.int64(), safe=False).cast(pa.timestamp("s", "UTC")),
                WEIGHT: log["rating:float"],
            }
        ).sort_by([(EVENT_TIME, "ascending"), (USER_ID, "ascending"), (ITEM_ID, "ascending")])
        days = events[EVENT_TIME].cast(pa.timestamp("s")).cast(pa.date32())
        for day in pc.unique(days).to_pylist():
            write_interactions(target, day, events.filter(pc.equal(days, day)))

        ids = catalog["item_id:token"].to_pylist()
        names, years, genres = (catalog[i].to_pylist() for i in range(1, 4))
        titles = [_title(name, year) for name, year in zip(names, years, strict=True)]
        write_items(target, ids, titles)
        texts = [" ".join(filter(None, row)) for row in zip(names, genres, years, strict=True)]
        modalities = {"text": text_vectors(texts), "genres": genre_vectors(genres)}
        for name, rows in modalities.items():
            write_features(target, name, ids, rows)

        last = pc.max(days).as_py()
        return Imported(
            dataset=DATASET,
            raw=str(Path(raw).absolute()),
            num_users=pc.count_distinct(events[USER_ID]).as_py(),
            num_items=len(ids),
            num_interactions=events.num_rows,
            modalities={name: rows.shape[1] for name, rows in modalities.items()},
            split="temporal",
            start=last,
            end=last + timedelta(days=1),
        )

    return write_raw(Path(raw), {"dataset": DATASET, "format": FORMAT, "files": digests}, build)


def text_vectors(texts: list[str]) -> NDArray[np.float32]:
    """Compute TF-IDF of words and word pairs, reduced by a seeded truncated SVD.

    Returns:
        float32 [len(texts), min(64, terms - 1)].
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    terms = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2).fit_transform(texts)
    dim = min(TEXT_DIM, terms.shape[1] - 1)
    return TruncatedSVD(dim, n_iter=7, random_state=TEXT_SEED).fit_transform(terms).astype(np.float32)


def genre_vectors(genres: list[str | None]) -> NDArray[np.float32]:
    """Make one column per genre, in alphabetical order, which is 1 for the items of the genre.

    Returns:
        float32 [len(genres), distinct genres].
    """
    names = sorted({genre for row in genres for genre in (row or "").split()})
    column = {name: index for index, name in enumerate(names)}
    rows = np.zeros((len(genres), len(names)), dtype=np.float32)
    for index, row in enumerate(genres):
        for genre in (row or "").split():
            rows[index, column[genre]] = 1
    return rows


def _title(name: str | None, year: str | None) -> str | None:
    if not name:
        return None
    return f"{name} ({year})" if year else name


def _read_files(source: Path) -> dict[str, bytes]:
    try:
        if source.is_dir():
            return {name: (source / name).read_bytes() for name in FILES}
        with zipfile.ZipFile(source) as wheel:
            return {name: wheel.read(f"{WHEEL_FOLDER}/{name}") for name in FILES}
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{source} (row count unknown) does not hold {' and '.join(FILES)}: {error}.",
            REMEDY,
        ) from error


def _read(source: Path, name: str, files: dict[str, bytes], columns: dict[str, pa.DataType]) -> pa.Table:
    rows = max(0, files[name].count(b"\n") - 1)
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(files[name]),
            parse_options=pa.csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=pa.csv.ConvertOptions(column_types=columns, strings_can_be_null=True, null_values=[""]),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{source}: {name} ({rows} rows) cannot be read: {error}.", REMEDY) from error
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise DataError(
            f"{source}: {name} ({rows} rows) has no column {', '.join(missing)}; "
            f"it has {', '.join(table.column_names)}.",
            REMEDY,
        )
    needed = [column for column in columns if "_id:" in column or columns[column] != pa.string()]
    for column in needed:
        if table.num_rows == 0 or table[column].null_count:
            raise DataError(
                f"{source}: {name} ({table.num_rows} rows) has {table[column].null_count} rows without {column}.",
                REMEDY,
            )
    return table.select(list(columns))
