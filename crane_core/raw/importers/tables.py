"""Convert chunks of rows to batches of the raw layout, set aside what does not fit, and write logs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from crane_core.raw.importers.account import Account, one_of
from crane_core.raw.importers.cells import MISSING, Converter
from crane_core.raw.importers.instants import INSTANT, ISO, Clock, plain_numbers
from crane_core.raw.importers.layout import Chunk
from crane_core.schema import EVENT_TIME, INTERACTIONS, ITEM_ID, LABEL, USER_ID, WEIGHT
from crane_core.storage.artifacts import sha256_file

DAY = DAY_PREFIX.removesuffix("=")
MOST_DAYS = 40_000
IDS = (USER_ID, ITEM_ID)
NOTICED = {
    USER_ID: "which the ETL will set aside",
    ITEM_ID: "which the ETL will set aside",
    WEIGHT: "which count once",
    LABEL: "which the ETL will set aside where etl.split is label",
}
"""Columns whose missing values are named, and what becomes of such rows."""


@dataclass(frozen=True)
class Wanted:
    """A column of the raw layout.

    Attributes:
        column: of the files.
        convert: makes its values.
    """

    column: str | int
    convert: Converter


def fitting(chunk: Chunk, wanted: Mapping[str, Wanted], account: Account) -> pa.RecordBatch:
    """Return the rows of a chunk whose values all fit; the others are set aside for their first bad value.

    Args:
        chunk: rows as they were read.
        wanted: column of the raw layout to where it comes from.
        account: counts the rows.
    """
    converted = {name: each.convert(chunk.columns[each.column]) for name, each in wanted.items()}
    good = np.ones(len(chunk), dtype=bool)
    for name, cells in converted.items():
        wrong = np.flatnonzero(cells.bad & good)
        for row in wrong[:3]:
            account.drop(f"bad_{name}", chunk.place(int(row), wanted[name].column))
        if len(wrong) > 3:
            account.drop(f"bad_{name}", "", len(wrong) - 3)
        good &= ~cells.bad
    batch = pa.record_batch({name: cells.values for name, cells in converted.items()})
    rows = np.flatnonzero(good)
    for name in (name for name in NOTICED if name in wanted):
        _notice(batch.column(name), good, chunk, name, wanted[name].column, account)
    return batch if len(rows) == len(chunk) else batch.take(pa.array(rows))


def _notice(
    values: pa.Array, good: NDArray[np.bool_], chunk: Chunk, name: str, column: str | int, account: Account
) -> None:
    """Name values that are missing, and ids that look as if another program had changed them."""
    # Features of no item are not written: `modality.py` counts them.
    is_written = not account.name.startswith("features.")
    oddities = {f"without {name}, {NOTICED[name]}": pc.is_null(values)} if is_written else {}
    if name in IDS:
        article = "an" if name == ITEM_ID else "a"
        oddities |= {
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
    for what, found in oddities.items():
        rows = np.flatnonzero(pc.fill_null(found, False).to_numpy(zero_copy_only=False) & good)
        if len(rows):
            account.notice(what, chunk.place(int(rows[0]), column), len(rows))


def check_clock(chunk: Chunk, column: str | int, clock: Clock, account: Account) -> None:
    """Stop where the numbers of a column are times in another unit than the clock has.

    Raises:
        DataError: most of them lie before `first_year` or in the future.
    """
    found = plain_numbers(chunk.columns[column])
    if 2 * len(found) <= len(chunk) or (clock.fits(found)) or "%" in clock.time:
        return
    unit = clock.unit_that_fits(found)
    ways = [account.way(f"set {{}}.time: {unit}")]
    if not unit:
        ways = [account.way("set {}.time to a format such as '%Y%m%d' if they are dates")]
        ways += [account.way("set {}.first_year to the first year of the data")] if clock.time != ISO else []
    fits = f"as {unit} they are times of {clock.first_year} to today" if unit else "no unit fits"
    raise DataError(
        f"{chunk.path}: the {len(found)} numbers of {chunk.unit}s {chunk.lines[0]} to {chunk.lines[-1]} are no times "
        f"of the format {clock.time}; {fits} ({chunk.place(0, column)}).",
        one_of(ways),
    )


@dataclass
class LogCounts:
    """Counts of a log, taken while its batches are written.

    Attributes:
        clock: tells times that can be right.
        account: notices the others.
        num_rows: rows.
        users, items: distinct ids, without empty ones.
        last: the last time that can be right, microseconds since 1970; None without any.
        last_of_all: the last time.
    """

    clock: Clock
    account: Account
    num_rows: int = 0
    users: set[str] = field(default_factory=set)
    items: set[str] = field(default_factory=set)
    last: int | None = None
    last_of_all: int | None = None

    def counted(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the batches unchanged, columns of `schema.INTERACTIONS`, and count them."""
        for batch in batches:
            self.num_rows += batch.num_rows
            self.users.update(filter(None, pc.unique(batch.column(USER_ID)).to_pylist()))
            self.items.update(filter(None, pc.unique(batch.column(ITEM_ID)).to_pylist()))
            micros = batch.column(EVENT_TIME).drop_null().cast(pa.int64()).to_numpy()
            early, late = micros < self.clock.first, micros > self.clock.last
            for what, found in ((f"before {self.clock.first_year}", early), ("in the future", late)):
                if found.any():
                    instant = pa.scalar(int(micros[found][0]), INSTANT).as_py()
                    self.account.notice(f"dated {what}", f"{instant:%Y-%m-%d %H:%M} UTC", int(found.sum()))
            missing = batch.num_rows - len(micros)
            if missing:
                self.account.notice("without event_time, which the ETL will set aside", "no time", missing)
            right = micros[~early & ~late]
            self.last = _later(self.last, right)
            self.last_of_all = _later(self.last_of_all, micros)
            yield batch

    def last_day(self) -> date:
        """Return the day of the last event in the zone of the clock.

        Raises:
            DataError: there is no event with a time.
        """
        last = self.last if self.last is not None else self.last_of_all
        if last is None:
            raise DataError(
                f"{self.account.name}: {self.num_rows} rows and none with a time.",
                "Let event_time name the column of the times, and deliver at least one row with a time.",
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
