"""Import a category of Amazon Reviews 2023: reviews and metadata as JSON lines, plain or gzipped.

A review is an interaction of its user with the product family (`parent_asin`) at its time, weighted by its rating.
Titles, feature lists, descriptions and categories become the modality `text`; without a word there is no modality. The
fields `average_rating` and `rating_number` are not used: they summarise all years, so they contain later reviews.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from crane_core.errors import DataError
from crane_core.raw.importers import cells
from crane_core.raw.importers.account import Account
from crane_core.raw.importers.cells import Cells, Values
from crane_core.raw.importers.instants import Clock, instants
from crane_core.raw.importers.layout import Layout
from crane_core.raw.importers.movielens import text_vectors, write_words
from crane_core.raw.importers.rows import read_chunks
from crane_core.raw.importers.tables import LogCounts, Wanted, digest_of, fitting, write_log
from crane_core.raw.importers.target import Imported, write_items, write_raw
from crane_core.raw.overlap import check_items_meet, share_found
from crane_core.schema import EVENT_TIME, ITEM_ID, TITLE, USER_ID, WEIGHT

FORMAT = "amazon-2023-3"
TEXTS = ("categories", "features", "description")
SAME_CATEGORY = (
    "Give as metadata meta_CATEGORY.jsonl or .jsonl.gz of the category of the reviews, with parent_asin in each object."
)
MOST_ODD = 0.01
"""Share of the metadata that may be left out because an object does not fit."""
MOST_TEXT = 4000
"""Characters of the text of an item that are used."""
LINES = Layout(files=("*.jsonl",), format="jsonl")


def import_amazon(reviews: str | Path, raw: str | Path, metadata: str | Path | None = None) -> Imported:
    """Import a category into `raw`; a second import of the same files changes nothing.

    Args:
        reviews: `{category}.jsonl` or `{category}.jsonl.gz`.
        raw: the raw folder to write.
        metadata: `meta_{category}.jsonl[.gz]`; by default the one beside the reviews.

    Raises:
        DataError: a file is missing, is not JSON lines or lacks a field; a value does not fit; `raw` holds another
            dataset.
    """
    reviews = Path(reviews)
    metadata = Path(metadata) if metadata else reviews.parent / f"meta_{reviews.name}"
    for path in (reviews, metadata):
        if not path.is_file():
            raise DataError(
                f"There is no file {path}, 0 rows.",
                "Give CATEGORY.jsonl or .jsonl.gz, the reviews, with meta_CATEGORY.jsonl or .jsonl.gz beside it.",
            )
    name = reviews.name.partition(".")[0]
    source = {"dataset": name, "format": FORMAT, "files": {path.name: digest_of(path) for path in (reviews, metadata)}}

    def build(target: Path) -> Imported:
        log = Account("reviews", settings=False)
        counts = LogCounts(Clock("ms", now=datetime.now(UTC)), log)
        log.written = write_log(target, counts.counted(_read_log(reviews, counts.clock, log)))
        log.settle()
        first, end = counts.window()
        products = Account("metadata", MOST_ODD, settings=False)
        titles, texts = _read_products(metadata, products)
        ids = list(titles)
        check_items_meet("metadata", counts.items, ids, counts.users, SAME_CATEGORY)
        write_items(target, ids, list(titles.values()))
        vectors = text_vectors(texts)
        notes: list[str] = []
        matched = {"items": share_found(counts.items, set(ids))}
        if vectors is None or not vectors.any():
            notes.append("metadata: too few words in titles, features and descriptions: no modality text")
        else:
            known = write_words(target, "text", ids, vectors, notes)
            matched["features.text"] = share_found(counts.items, known)
        return Imported(
            dataset=name,
            raw=str(Path(raw).absolute()),
            num_users=len(counts.users),
            num_items=len(ids),
            num_interactions=log.written,
            modalities={"text": vectors.shape[1]} if vectors is not None and vectors.any() else {},
            split="temporal",
            start=first,
            end=end,
            counts={account.name: account.as_dict() for account in (log, products)},
            matched=matched,
            notes=[*notes, *log.notes(), *products.notes()],
        )

    return write_raw(Path(raw), source, build)


def _read_log(reviews: Path, clock: Clock, account: Account) -> Iterator[pa.RecordBatch]:
    """Yield the reviews as interactions."""
    wanted = {
        USER_ID: Wanted("user_id", cells.ids),
        ITEM_ID: Wanted("parent_asin", cells.ids),
        EVENT_TIME: Wanted("timestamp", lambda values: instants(values, clock), clock),
        WEIGHT: Wanted("rating", cells.weights),
    }
    for chunk in read_chunks(reviews, LINES, [each.column for each in wanted.values()], account):
        yield fitting(chunk, wanted, account)


def _read_products(metadata: Path, account: Account) -> tuple[dict[str, str | None], list[str]]:
    """Read the first record of each item: item to title, and the texts in the same order."""
    wanted = {ITEM_ID: Wanted("parent_asin", cells.ids), TITLE: Wanted("title", _joined)}
    wanted |= {name: Wanted(name, _joined) for name in TEXTS}
    titles: dict[str, str | None] = {}
    texts: list[str] = []
    columns = [each.column for each in wanted.values()]
    for chunk in read_chunks(metadata, LINES, columns, account, optional=("title", *TEXTS)):
        for row in fitting(chunk, wanted, account).to_pylist():
            item = row[ITEM_ID]
            if not item or item in titles:
                account.drop("no_id" if not item else "repeated_id", str(item))
                continue
            titles[item] = row[TITLE]
            texts.append(" ".join(filter(None, [row[TITLE], *(row[name] for name in TEXTS)]))[:MOST_TEXT])
    account.written = len(titles)
    account.settle()
    if not titles:
        raise DataError(
            f"{metadata}: none of {account.rows} objects names an item: {account.told()}.",
            SAME_CATEGORY,
        )
    return titles, texts


def _joined(values: Values) -> Cells:
    """Return text as it stands, and lists of text as one text."""
    told = [_words(value) for value in values]
    bad = np.array([value is not None and text is None for value, text in zip(values, told, strict=True)], dtype=bool)
    found = cells.texts([text or None for text in told])
    return Cells(found.values, found.bad | bad)


def _words(value: Any) -> str | None:
    if isinstance(value, list):
        return " ".join(filter(None, (_words(each) for each in value)))
    return str(value) if isinstance(value, (str, int, float)) else None
