"""Import CSV, TSV, JSON or Parquet files whose columns a mapping file names.

dataset: shop
interactions:
  files: [events/*.csv.gz]
  columns: {user_id: customer, item_id: sku, event_time: at, weight: quantity, event_type: kind}
  time: iso                      # or s, ms, us, ns: a number since 1970; or a format such as '%d.%m.%Y %H:%M'
  zone: Europe/Berlin            # of times without one; its midnights cut the days
items:
  files: [products.csv]
  columns: {item_id: sku, title: name, category: department, in_stock: available}
features:
  text: {files: [text.parquet], columns: {item_id: sku, vector: embedding}}
  image: {files: [image.npy], ids: image_ids.txt}
  genres: {files: [products.csv], kind: categories, columns: {item_id: sku, vector: genres}}
  size: {files: [products.csv], kind: numbers, columns: {item_id: sku, vector: [height, width]}}

Every setting of a section, with its default: `crane_core/raw/importers/README.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crane_core.errors import DataError
from crane_core.raw.files import ITEMS_FOLDER
from crane_core.raw.importers import cells
from crane_core.raw.importers.account import Account, one_of
from crane_core.raw.importers.cells import Cells, Values
from crane_core.raw.importers.instants import Clock, instants
from crane_core.raw.importers.mapping import MappedItems, MappedLog, Mapping, file_names, list_tables, read_mapping
from crane_core.raw.importers.modality import feature_files, write_modality
from crane_core.raw.importers.rows import read_chunks
from crane_core.raw.importers.tables import (
    LogCounts,
    Sieve,
    Wanted,
    digest_of,
    fitting,
    write_log,
)
from crane_core.raw.importers.target import Imported, write_raw
from crane_core.raw.overlap import check_overlap, examples, number_twins, share_found
from crane_core.schema import EVENT_TIME, EVENT_TYPE, ITEM_ID, LABEL, TITLE, USER_ID, WEIGHT

FORMAT = "mapped-3"
YEARS_AHEAD = 100
"""Times of `USUAL_TYPES` are taken for right up to so many years from now."""
USUAL_TYPES = {"available_from": "time", "available_until": "time", "in_stock": "flag"}
TYPES = {
    "id": pa.string(),
    "text": pa.string(),
    "number": pa.float64(),
    "time": pa.timestamp("us", "UTC"),
    "flag": pa.bool_(),
}


@dataclass(frozen=True)
class MappedFiles:
    """A mapping file and the files that it names.

    Attributes:
        folder: of the mapping file.
        mapping: what it says.
        log, catalog: files of interactions and items.
        features: modality to its files.
    """

    folder: Path
    mapping: Mapping
    log: list[Path]
    catalog: list[Path]
    features: dict[str, list[Path]]

    def all(self) -> list[Path]:
        """Return every file."""
        return [*self.log, *self.catalog, *(path for files in self.features.values() for path in files)]


def find_files(path: Path) -> MappedFiles:
    """Read a mapping file and find the files that it names.

    Raises:
        ConfigError: the mapping file is not valid.
        DataError: a file is missing, or of no known format.
    """
    chosen = read_mapping(path)
    folder = path.parent
    return MappedFiles(
        folder,
        chosen,
        list_tables(folder, chosen.interactions, "interactions"),
        list_tables(folder, chosen.items, "items") if chosen.items else [],
        {name: feature_files(folder, name, entry) for name, entry in chosen.features.items()},
    )


def import_mapped(mapping: str | Path, raw: str | Path) -> Imported:
    """Import the files that a mapping file describes into `raw`; a second import of the same files changes nothing.

    Raises:
        ConfigError: the mapping file is not valid.
        DataError: a file is missing or does not have the described format; ids of the log match none of the catalog or
            of a modality; `raw` holds another dataset.
    """
    found = find_files(Path(mapping))
    chosen = found.mapping
    names = file_names(found.folder, found.all())
    source = {
        "dataset": chosen.dataset,
        "format": FORMAT,
        "mapping": chosen.model_dump(mode="json"),
        "files": {name: digest_of(path) for path, name in sorted(names.items())},
    }

    return write_raw(Path(raw), source, lambda target: build(target, str(Path(raw).absolute()), found))


def build(target: Path, raw: str, found: MappedFiles) -> Imported:
    """Write the raw layout into `target` and return the facts of it; `raw` is where it will lie."""
    chosen = found.mapping
    log = Account("interactions", chosen.interactions.max_set_aside)
    clock = clock_of(chosen.interactions)
    counts = LogCounts(clock, log)
    log.written = write_log(target, counts.counted(read_log(found.log, chosen.interactions, clock, log)), clock.zone)
    log.settle()
    first, end = counts.window()
    accounts = [log]
    items = set(counts.items)
    matched: dict[str, float] = {}
    if chosen.items:
        accounts.append(Account("items", chosen.items.max_set_aside))
        listed = write_catalog(target, found.catalog, chosen.items, accounts[-1])
        matched["items"] = compare(accounts[-1], counts, listed)
        items |= listed
    widths = {}
    for name, entry in chosen.features.items():
        accounts.append(Account(f"features.{name}", entry.max_set_aside))
        written = write_modality(target, name, found.features[name], entry, accounts[-1])
        matched[f"features.{name}"] = compare(accounts[-1], counts, written.items)
        widths[name] = written.width
    return Imported(
        dataset=chosen.dataset,
        raw=raw,
        num_users=len(counts.users),
        num_items=len(items),
        num_interactions=log.written,
        modalities=widths,
        split="label" if LABEL in chosen.interactions.columns else "temporal",
        start=first,
        end=end,
        time_zone=clock.zone,
        counts={account.name: account.as_dict() for account in accounts},
        matched=matched,
        notes=[note for account in accounts for note in account.notes()],
    )


def compare(account: Account, counts: LogCounts, found: set[str]) -> float:
    """Return the share of the items of the log that a section has, and notice those that only agree as numbers.

    Raises:
        DataError: it has none of them.
    """
    numeric = f"set numeric: [item_id] in interactions and in {account.name} of the mapping."
    check_overlap(account.name, counts.items, found, counts.users, numeric)
    twins = number_twins(counts.items, found)
    if twins:
        told = f"{examples(twins)}; {numeric}"
        account.notice("missing for items of the log whose number it has in another form", told, len(twins))
    return share_found(counts.items, found)


def read_log(files: Sequence[Path], entry: MappedLog, clock: Clock, account: Account) -> Iterator[pa.RecordBatch]:
    """Yield batches of interactions with the columns of the raw layout.

    Raises:
        DataError: a file does not have the described format.
    """
    wanted = log_columns(entry, clock)
    for path in files:
        for chunk in read_chunks(path, entry, list(entry.columns.values()), account):
            yield fitting(chunk, wanted, account)


def clock_of(entry: MappedLog) -> Clock:
    """Return how the times of a log are to be read."""
    return Clock(entry.time, entry.zone, entry.first_year, datetime.now(UTC), entry.decimal, entry.thousands)


def item_clock(entry: MappedItems, name: str) -> Clock:
    """Return how the times of a column of the catalog are to be read. An item may be available until a far day."""
    now = datetime.now(UTC)
    now = now.replace(year=now.year + YEARS_AHEAD, day=1) if name in USUAL_TYPES else now
    return Clock(entry.time, entry.zone, entry.first_year, now, entry.decimal, entry.thousands)


def log_columns(entry: MappedLog, clock: Clock) -> dict[str, Wanted]:
    """Return the columns of a log in the raw layout, and how each is made."""
    missing = cells.MISSING if entry.missing is None else entry.missing
    no_id = entry.missing or ()
    convert: dict[str, Callable[[Values], Cells]] = {
        USER_ID: lambda values: cells.ids(values, no_id, USER_ID in entry.numeric),
        ITEM_ID: lambda values: cells.ids(values, no_id, ITEM_ID in entry.numeric),
        EVENT_TIME: lambda values: instants(values, clock, missing),
        WEIGHT: lambda values: cells.weights(values, missing, entry.decimal, entry.thousands),
        LABEL: lambda values: cells.words(values, entry.label_words, pa.int8(), missing),
        EVENT_TYPE: lambda values: cells.ids(values, missing),
    }
    clocks = {EVENT_TIME: clock}
    return {name: Wanted(column, convert[name], clocks.get(name)) for name, column in entry.columns.items()}


def item_columns(entry: MappedItems) -> dict[str, Wanted]:
    """Return the columns of a catalog in the raw layout, and how each is made."""
    missing = cells.MISSING if entry.missing is None else entry.missing
    convert: dict[str, Callable[[Values], Cells]] = {
        "id": lambda values: cells.ids(values, entry.missing or (), ITEM_ID in entry.numeric),
        "text": cells.joined,
        "number": lambda values: cells.numbers(values, missing, entry.decimal, entry.thousands),
        "flag": lambda values: cells.words(values, cells.FLAGS, pa.bool_(), missing),
    }
    wanted = {}
    for name, column in entry.columns.items():
        kind = item_type(entry, name)
        clock = item_clock(entry, name)
        read = partial(instants, clock=clock, missing=missing)
        wanted[name] = Wanted(column, read, clock) if kind == "time" else Wanted(column, convert[kind])
    return wanted


def item_type(entry: MappedItems, name: str) -> str:
    """Return the type of a column of the catalog."""
    return "id" if name == ITEM_ID else entry.types.get(name, USUAL_TYPES.get(name, "text"))


def write_catalog(target: Path, files: Sequence[Path], entry: MappedItems, account: Account) -> set[str]:
    """Write the catalog, the first row of each item, and return its items.

    Raises:
        DataError: a file does not have the described format, or no row has an item.
    """
    (target / ITEMS_FOLDER).mkdir()
    kinds = {
        name: TYPES.get(item_type(entry, name), pa.string()) for name in {**dict.fromkeys(entry.columns), TITLE: None}
    }
    schema = pa.schema([(name, kinds[name]) for name in (ITEM_ID, TITLE, *sorted(set(kinds) - {ITEM_ID, TITLE}))])
    sieve = Sieve(item_columns(entry), account)
    path = target / ITEMS_FOLDER / "part-0.parquet"
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for file in files:
            for chunk in read_chunks(file, entry, list(entry.columns.values()), account):
                batch = sieve.rows_of(chunk)
                columns = [
                    batch.column(each.name) if each.name in entry.columns else pa.nulls(batch.num_rows, each.type)
                    for each in schema
                ]
                writer.write_batch(pa.record_batch(columns, schema=schema))
    account.written = pq.read_metadata(path).num_rows
    account.settle()
    if not sieve.items:
        raise DataError(
            f"items: none of {account.rows} rows has an item_id.",
            one_of([account.way("name in {}.columns the column of the items"), "leave items out of the mapping"]),
        )
    return sieve.items
