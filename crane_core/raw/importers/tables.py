"""Convert chunks of rows to batches of the raw layout, set aside what does not fit, and write logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crane_core.errors import DataError
from crane_core.raw.files import DAY_PREFIX, INTERACTIONS_FOLDER
from crane_core.raw.importers.account import MOST_EXAMPLES, Account, one_of
from crane_core.raw.importers.cells import MISSING, Converter
from crane_core.raw.importers.instants import INSTANT, Clock
from crane_core.raw.importers.layout import Chunk
from crane_core.raw.importers.years import check_clock, odd_years
from crane_core.schema import EVENT_TIME, INTERACTIONS, ITEM_ID, LABEL, USER_ID, WEIGHT
from crane_core.storage.artifacts import sha256_file

DAY = DAY_PREFIX.removesuffix("=")
MOST_DAYS = 40_000
IDS = (USER_ID, ITEM_ID)
NOTICED = {
    USER_ID: "which the ETL will set aside",
    ITEM_ID: "which the ETL will set aside",
    EVENT_TIME: "which the ETL will set aside",
    WEIGHT: "which count once",
    "rating": "which count once",
    LABEL: "which the ETL will set aside where etl.split is label",
}
"""Columns whose missing values are named, and what becomes of such rows."""


@dataclass(frozen=True)
class Wanted:
    """A column of the raw layout.

    Attributes:
        column: of the files.
        convert: makes its values.
        clock: of a column of times; its years are looked at.
    """

    column: str | int
    convert: Converter
    clock: Clock | None = None


def fitting(chunk: Chunk, wanted: Mapping[str, Wanted], account: Account) -> pa.RecordBatch:
    """Return the rows of a chunk whose values all fit; as `fitting_rows`."""
    return fitting_rows(chunk, wanted, account)[0]


def fitting_rows(
    chunk: Chunk, wanted: Mapping[str, Wanted], account: Account
) -> tuple[pa.RecordBatch, NDArray[np.int64]]:
    """Return the rows of a chunk whose values all fit, and their places in it.

    The others are set aside for their first bad value.

    Args:
        chunk: rows as they were read.
        wanted: column of the raw layout to where it comes from.
        account: counts the rows.

    Raises:
        DataError: the numbers of a column of times are of another unit.
    """
    for each in wanted.values():
        if each.clock:
            check_clock(chunk, each.column, each.clock, account)
    converted = {name: each.convert(chunk.columns[each.column]) for name, each in wanted.items()}
    good = np.ones(len(chunk), dtype=bool)
    for name, cells in converted.items():
        drop_rows(account, f"bad_{name}", np.flatnonzero(cells.bad & good), chunk, wanted[name].column)
        good &= ~cells.bad
    batch = pa.record_batch({name: cells.values for name, cells in converted.items()})
    rows = np.flatnonzero(good)
    for name, each in wanted.items():
        for what, found in _oddities(batch.column(name), name, each, account).items():
            odd = np.flatnonzero(pc.fill_null(found, False).to_numpy(zero_copy_only=False) & good)
            if len(odd):
                account.notice(what, chunk.place(int(odd[0]), each.column), len(odd))
    return (batch if len(rows) == len(chunk) else batch.take(pa.array(rows))), rows


def drop_rows(account: Account, reason: str, rows: NDArray[np.int64], chunk: Chunk, column: str | int) -> None:
    """Count rows of a chunk that are not written, and name the first ones by a column."""
    for row in rows[:MOST_EXAMPLES]:
        account.drop(reason, chunk.place(int(row), column))
    if len(rows) > MOST_EXAMPLES:
        account.drop(reason, "", len(rows) - MOST_EXAMPLES)


@dataclass
class Sieve:
    """Chooses the rows of a catalog or of features that are written: the first one of each item.

    Attributes:
        wanted: column of the raw layout to where it comes from.
        account: counts the rows that are not written.
        has_content: tells which rows of features have a vector or words; None in a catalog, whose rows without an
            item are written.
        reason: of rows without content.
        joins: whether later rows of an item are counted as joined and kept.
        items: items of the rows so far.
    """

    wanted: Mapping[str, Wanted]
    account: Account
    has_content: Callable[[pa.RecordBatch], pa.Array] | None = None
    reason: str = ""
    joins: bool = False
    items: set[str] = field(default_factory=set)

    def rows_of(self, chunk: Chunk) -> pa.RecordBatch:
        """Return the rows of a chunk that are written.

        Raises:
            DataError: as for `fitting_rows`.
        """
        batch, rows = fitting_rows(chunk, self.wanted, self.account)
        ids = batch.column(ITEM_ID)
        good = np.ones(len(rows), dtype=bool)
        column = self.wanted[ITEM_ID].column
        if self.has_content:
            there = self.has_content(batch).to_numpy(zero_copy_only=False)
            good = there & ids.is_valid().to_numpy(zero_copy_only=False)
            drop_rows(self.account, self.reason, rows[~there], chunk, column)
            drop_rows(self.account, "no_id", rows[there & ~good], chunk, column)
        first = first_rows(ids, good, self.items)
        drop_rows(self.account, "joined_id" if self.joins else "repeated_id", rows[good & ~first], chunk, column)
        return batch.filter(pa.array(good if self.joins else first))


def first_rows(ids: pa.Array, good: NDArray[np.bool_], seen: set[str]) -> NDArray[np.bool_]:
    """Return which of the good rows are the first of their item, or have no item.

    Args:
        ids: item of each row, or null.
        good: bool [rows].
        seen: items of rows before; the new ones are added.
    """
    first = good.copy()
    for row, item in enumerate(ids.to_pylist()):
        if good[row] and item is not None:
            first[row] = item not in seen
            seen.add(item)
    return first


def _oddities(values: pa.Array, name: str, wanted: Wanted, account: Account) -> dict[str, pa.Array]:
    """Return which values are missing, have years that no shop has, or are ids that another program has changed."""
    # Features of no item are not written: `modality.py` counts them.
    is_written = not account.name.startswith("features.")
    found = {f"without {name}, {NOTICED[name]}": pc.is_null(values)} if is_written and name in NOTICED else {}
    if wanted.clock:
        told = "dated" if name == EVENT_TIME else f"with {name}"
        found |= {f"{told} {what}": rows for what, rows in odd_years(values, wanted.clock).items()}
    if name == WEIGHT and is_written:
        found["with a negative weight, which the ETL will set aside"] = pc.less(values, 0)
    if name in IDS:
        article = "an" if name == ITEM_ID else "a"
        found |= {
            f"with {article} {name} that ends in .0; for whole numbers {account.way(f'set {{}}.numeric: [{name}]')}": (
                pc.match_substring_regex(values, r"^-?\d+\.0+$")
            ),
            f"with {article} {name} in scientific notation, which a spreadsheet has rounded": pc.match_substring_regex(
                values, r"^-?\d(\.\d+)?[eE]\+?\d+$"
            ),
            f"with spaces around the {name}": pc.match_substring_regex(values, r"^\s|\s$"),
            f"with a word for no value as {name}; if it is none {account.way('name it in {}.missing')}": pc.is_in(
                values, pa.array(MISSING[1:])
            ),
        }
    return found


@dataclass
class LogCounts:
    """Counts of a log, taken while its batches are written.

    Attributes:
        clock: tells times that can be right.
        account: of the log.
        num_rows: rows.
        num_usable: rows with a user, an item and a time.
        without: column to rows without it.
        users, items: distinct ids, without empty ones.
        last: the last time that can be right, microseconds since 1970; None without any.
        last_of_all: the last time.
    """

    clock: Clock
    account: Account
    num_rows: int = 0
    num_usable: int = 0
    without: Counter[str] = field(default_factory=Counter)
    users: set[str] = field(default_factory=set)
    items: set[str] = field(default_factory=set)
    last: int | None = None
    last_of_all: int | None = None

    def counted(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the batches unchanged, columns of `schema.INTERACTIONS`, and count them."""
        for batch in batches:
            self.num_rows += batch.num_rows
            known = {name: batch.column(name).is_valid() for name in (USER_ID, ITEM_ID, EVENT_TIME)}
            self.without.update({name: batch.num_rows - rows.true_count for name, rows in known.items()})
            self.num_usable += pc.and_(pc.and_(known[USER_ID], known[ITEM_ID]), known[EVENT_TIME]).true_count
            self.users.update(filter(None, pc.unique(batch.column(USER_ID)).to_pylist()))
            self.items.update(filter(None, pc.unique(batch.column(ITEM_ID)).to_pylist()))
            micros = batch.column(EVENT_TIME).drop_null().cast(pa.int64()).to_numpy()
            right = micros[(micros >= self.clock.first) & (micros <= self.clock.last)]
            self.last = _later(self.last, right)
            self.last_of_all = _later(self.last_of_all, micros)
            yield batch

    def last_day(self) -> date:
        """Return the day of the last event in the zone of the clock.

        Raises:
            DataError: no row has a user, an item and a time.
        """
        last = self.last if self.last is not None else self.last_of_all
        if last is None or not self.num_usable:
            if self.account.rows == self.account.set_aside.total():
                raise DataError(
                    f"{self.account.name}: all {self.account.rows} rows are set aside: {self.account.told()}.",
                    self.account.way_out(),
                )
            gone = [f"{count} without {name}" for name, count in self.without.items() if count]
            gone += [f"set aside: {self.account.told()}"] if self.account.set_aside else []
            raise DataError(
                f"{self.account.name}: none of {self.account.rows} rows has a user, an item and a time "
                f"({'; '.join(gone)}).",
                one_of(
                    [
                        self.account.way("name in {}.columns the columns of the users, the items and the times"),
                        "deliver rows that have all three",
                    ]
                ),
            )
        return pa.scalar(int(last), INSTANT).as_py().astimezone(ZoneInfo(self.clock.zone)).date()

    def window(self) -> tuple[date, date]:
        """Return the day of the last event and the day after it."""
        last = self.last_day()
        return last, last + timedelta(days=1)


def _later(last: int | None, micros: NDArray[np.int64]) -> int | None:
    times = [*([] if last is None else [last]), *([int(micros.max())] if len(micros) else [])]
    return max(times, default=None)


def write_log(target: Path, batches: Iterator[pa.RecordBatch], zone: str = "UTC") -> int:
    """Write interactions in bounded memory, each into the partition of the day of its event.

    A row without a time goes to 1970-01-01, so that the ETL counts it as dropped.

    Args:
        target: raw root.
        batches: columns of `schema.INTERACTIONS`.
        zone: its midnights cut the days.

    Returns:
        The number of rows that the written files hold.
    """
    loose = pa.schema([pa.field(name, INTERACTIONS.field(name).type) for name in INTERACTIONS.names])
    parted = loose.append(pa.field(DAY, pa.string()))

    def with_day() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            instants = batch.column(EVENT_TIME).cast(INSTANT)
            day = pc.strftime(instants.cast(pa.timestamp("us", zone)), format="%Y-%m-%d")
            columns = [
                batch.column(field.name) if field.name in batch.schema.names else pa.nulls(batch.num_rows, field.type)
                for field in loose
            ]
            yield pa.record_batch([*columns, pc.fill_null(day, "1970-01-01")], schema=parted)

    failed: list[Exception] = []

    def until_failure() -> Iterator[pa.RecordBatch]:
        # An exception inside write_dataset leaves its threads running, and at exit they abort the process.
        try:
            yield from with_day()
        except Exception as error:
            failed.append(error)

    folder = target / INTERACTIONS_FOLDER
    ds.write_dataset(
        until_failure(),
        folder,
        schema=parted,
        format="parquet",
        partitioning=ds.partitioning(pa.schema([(DAY, pa.string())]), flavor="hive"),
        max_partitions=MOST_DAYS,
        max_open_files=512,
        basename_template="part-{i}.parquet",
        file_options=ds.ParquetFileFormat().make_write_options(compression="zstd"),
    )
    if failed:
        raise failed[0]
    return sum(pq.read_metadata(path).num_rows for path in sorted(folder.rglob("*.parquet")))


def digest_of(path: Path) -> str:
    """Return the checksum of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return sha256_file(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.", f"Let the user who imports read {path}.") from error
