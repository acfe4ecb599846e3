"""Import MovieLens 100K from the RecBole wheel, with its real timestamps and one partition per day."""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from crane_core.errors import DataError
from crane_core.raw.importers import cells
from crane_core.raw.importers.account import Account
from crane_core.raw.importers.cells import required
from crane_core.raw.importers.instants import Clock, instants
from crane_core.raw.importers.layout import Layout
from crane_core.raw.importers.rows import read_chunks
from crane_core.raw.importers.tables import Wanted, fitting
from crane_core.raw.importers.target import Imported, write_features, write_interactions, write_items, write_raw
from crane_core.raw.overlap import check_items_meet, examples, share_found
from crane_core.schema import EVENT_TIME, ITEM_ID, USER_ID, WEIGHT

FORMAT = "movielens-2"
DATASET = "ml-100k"
WHEEL_FOLDER = "recbole/dataset_example/ml-100k"
FILES = ("ml-100k.inter", "ml-100k.item")
TABLE = Layout(files=FILES, format="tsv")
CATALOG_COLUMNS = {
    ITEM_ID: Wanted("item_id:token", required(cells.ids)),
    "name": Wanted("movie_title:token_seq", cells.texts),
    "year": Wanted("release_year:token", cells.texts),
    "genres": Wanted("class:token_seq", cells.texts),
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
        accounts = [Account(name, settings=False) for name in FILES]
        log = _read(source, FILES[0], files[FILES[0]], _log_columns(), accounts[0])
        catalog = _read(source, FILES[1], files[FILES[1]], CATALOG_COLUMNS, accounts[1])
        events = log.sort_by([(EVENT_TIME, "ascending"), (USER_ID, "ascending"), (ITEM_ID, "ascending")])
        days = events[EVENT_TIME].cast(pa.timestamp("s"), safe=False).cast(pa.date32(), safe=False)
        for day in pc.unique(days).to_pylist():
            accounts[0].written += write_interactions(target, day, events.filter(pc.equal(days, day)))

        ids = catalog[ITEM_ID].to_pylist()
        _check_items(source, log, ids)
        names, years, genres = (catalog[name].to_pylist() for name in ("name", "year", "genres"))
        titles = [_title(name, year) for name, year in zip(names, years, strict=True)]
        accounts[1].written = write_items(target, ids, titles)
        for account in accounts:
            _remedied(account.settle)
        texts = [" ".join(filter(None, row)) for row in zip(names, genres, years, strict=True)]
        found = {"text": text_vectors(texts), "genres": genre_vectors(genres)}
        modalities = {name: rows for name, rows in found.items() if rows is not None and rows.any()}
        items = set(pc.unique(log[ITEM_ID]).to_pylist())
        matched = {"items": share_found(items, set(ids))}
        notes = [note for account in accounts for note in account.notes()]
        for name, rows in modalities.items():
            known = write_words(target, name, ids, rows, notes)
            matched[f"features.{name}"] = share_found(items, known)

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
            counts={account.name: account.as_dict() for account in accounts},
            matched=matched,
            notes=notes,
        )

    return write_raw(Path(raw), {"dataset": DATASET, "format": FORMAT, "files": digests}, build)


def _check_items(source: Path, log: pa.Table, ids: list[str]) -> None:
    """Refuse a catalog that has an item twice, or none of the log.

    Raises:
        DataError: it does.
    """
    twice = sorted(item for item, count in Counter(ids).items() if count > 1)
    if twice:
        raise DataError(f"{source}: {FILES[1]} has {len(twice)} items twice, such as {examples(twice)}.", REMEDY)
    items, users = (set(pc.unique(log[name]).to_pylist()) for name in (ITEM_ID, USER_ID))
    check_items_meet(f"{source}: {FILES[1]}", items, ids, users, REMEDY)


def _log_columns() -> dict[str, Wanted]:
    clock = Clock("s", now=datetime.now(UTC))
    return {
        USER_ID: Wanted("user_id:token", required(cells.ids)),
        ITEM_ID: Wanted("item_id:token", required(cells.ids)),
        EVENT_TIME: Wanted("timestamp:float", required(lambda values: instants(values, clock)), clock),
        WEIGHT: Wanted("rating:float", required(cells.weights)),
    }


def text_vectors(texts: list[str]) -> NDArray[np.float32] | None:
    """Compute TF-IDF of words and word pairs, reduced by a seeded truncated SVD.

    Returns:
        float32 [len(texts), min(64, terms - 1)]; None where fewer than two terms are in two texts.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        terms = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2).fit_transform(texts)
    except ValueError:
        # Its way to say that no term is left.
        return None
    if terms.shape[1] < 2:
        return None
    dim = min(TEXT_DIM, terms.shape[1] - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Of equal texts it divides by their variance.
        return TruncatedSVD(dim, n_iter=7, random_state=TEXT_SEED).fit_transform(terms).astype(np.float32)


def write_words(target: Path, name: str, ids: list[str], rows: NDArray[np.float32], notes: list[str]) -> set[str]:
    """Write a modality that was made of words, without the items that have none, and return its items.

    Args:
        target: raw root.
        name: of the modality.
        ids: item of each row.
        rows: [len(ids), dim], zeros where an item has no word.
        notes: a sentence about items without words is added.
    """
    there = np.flatnonzero(rows.any(axis=1))
    known = [ids[row] for row in there]
    write_features(target, name, known, rows[there])
    if len(known) < len(ids):
        gone = len(ids) - len(known)
        notes.append(f"{name}: {gone} of {len(ids)} items without a word that another item has, too")
    return set(known)


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
    except (OSError, KeyError, EOFError, RuntimeError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            f"{source} (row count unknown) does not hold {' and '.join(FILES)}: {error}.",
            REMEDY,
        ) from error


def _read(source: Path, name: str, data: bytes, columns: Mapping[str, Wanted], account: Account) -> pa.Table:
    """Read one of the two files; every row must have a value in every column that is not text.

    Raises:
        DataError: a column is missing, a value does not fit, or there is no row.
    """

    def read() -> list[pa.RecordBatch]:
        batches = []
        with tempfile.TemporaryDirectory() as folder:
            path = (source if source.is_dir() else Path(folder)) / name
            if not source.is_dir():
                path.write_bytes(data)
            for chunk in read_chunks(path, TABLE, [each.column for each in columns.values()], account):
                batches.append(fitting(chunk, columns, account))
        return batches

    batches = _remedied(read)
    if not sum(batch.num_rows for batch in batches) and not account.set_aside:
        raise DataError(f"{source}: {name} has 0 rows.", REMEDY)
    _remedied(account.check_share)
    return pa.Table.from_batches(batches) if batches else pa.table({column: pa.nulls(0) for column in columns})


def _remedied(work: Callable[[], Any]) -> Any:
    """Do some work; an error of it gets the remedy of this format."""
    try:
        return work()
    except DataError as error:
        raise DataError(error.found, REMEDY) from error
