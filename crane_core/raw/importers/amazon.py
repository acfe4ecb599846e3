"""Import a category of Amazon Reviews 2023: reviews and metadata as JSON lines, plain or gzipped.

A review is an interaction of its user with the product family (`parent_asin`) at its time, weighted by its rating.
Titles, feature lists, descriptions and categories become the modality `text`. The fields `average_rating` and
`rating_number` are not used: they summarise all years, so they contain later reviews.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pyarrow as pa

from crane_core.errors import DataError
from crane_core.raw.importers.movielens import text_vectors
from crane_core.raw.importers.tables import LogCounts, read_batches, write_log
from crane_core.raw.importers.target import Imported, write_features, write_items, write_raw
from crane_core.schema import EVENT_TIME, ITEM_ID, USER_ID, WEIGHT
from crane_core.storage.artifacts import sha256_file

FORMAT = "amazon-2023-1"
REVIEW = {"user_id": pa.string(), "parent_asin": pa.string(), "timestamp": pa.int64(), "rating": pa.float32()}
PRODUCT = {
    "parent_asin": pa.string(),
    "title": pa.string(),
    "features": pa.list_(pa.string()),
    "description": pa.list_(pa.string()),
    "categories": pa.list_(pa.string()),
}
MOST_TEXT = 4000
"""Characters of the text of an item that are used."""


def import_amazon(reviews: str | Path, raw: str | Path, metadata: str | Path | None = None) -> Imported:
    """Import a category into `raw`; a second import of the same files changes nothing.

    Args:
        reviews: `{category}.jsonl` or `{category}.jsonl.gz`.
        raw: the raw folder to write.
        metadata: `meta_{category}.jsonl[.gz]`; by default the one beside the reviews.

    Raises:
        DataError: a file is missing, is not JSON lines or lacks a field; `raw` holds another dataset.
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
    source = {"dataset": name, "format": FORMAT, "files": {p.name: sha256_file(p) for p in (reviews, metadata)}}

    def build(target: Path) -> Imported:
        counts = LogCounts()
        write_log(target, counts.counted(_read_log(reviews)))
        if counts.last is None:
            raise DataError(
                f"{reviews} has {counts.num_rows} rows and no review with a time.",
                "Deliver reviews with the field timestamp, milliseconds since 1970.",
            )
        titles, texts = _read_products(metadata)
        ids = list(titles)
        write_items(target, ids, list(titles.values()))
        vectors = text_vectors(texts)
        write_features(target, "text", ids, vectors)
        last = counts.last.date()
        return Imported(
            dataset=name,
            raw=str(Path(raw).absolute()),
            num_users=len(counts.users),
            num_items=len(ids),
            num_interactions=counts.num_rows,
            modalities={"text": vectors.shape[1]},
            split="temporal",
            start=last,
            end=last + timedelta(days=1),
        )

    return write_raw(Path(raw), source, build)


def _read_log(reviews: Path) -> Iterator[pa.RecordBatch]:
    """Yield the reviews as interactions."""
    for batch in read_batches(reviews, REVIEW, list(REVIEW)):
        yield pa.record_batch(
            {
                USER_ID: batch.column("user_id"),
                ITEM_ID: batch.column("parent_asin"),
                EVENT_TIME: batch.column("timestamp").cast(pa.timestamp("ms", "UTC")).cast(_MICROS),
                WEIGHT: batch.column("rating"),
            }
        )


def _read_products(metadata: Path) -> tuple[dict[str, str | None], list[str]]:
    """Read the first record of each item: item to title, and the texts in the same order."""
    titles: dict[str, str | None] = {}
    texts: list[str] = []
    for batch in read_batches(metadata, PRODUCT, ["parent_asin"]):
        for row in batch.to_pylist():
            item = row["parent_asin"]
            if item and item not in titles:
                titles[item] = row["title"]
                parts = [row["title"], *(row["categories"] or ()), *(row["features"] or ())]
                texts.append(" ".join(filter(None, [*parts, *(row["description"] or ())]))[:MOST_TEXT])
    return titles, texts


_MICROS = pa.timestamp("us", "UTC")
