"""Find the delivered files: daily partitions of the log, the catalog and the features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from zoneinfo import ZoneInfo

from crane_core.config import Etl, RunConfig, Window
from crane_core.errors import ConfigError, DataError
from crane_core.raw.location import Location

INTERACTIONS_FOLDER = "interactions"
ITEMS_FOLDER = "items"
FEATURES_FOLDER = "features"
DAY_PREFIX = "dt="
MATRIX = ".npy"
SOURCE_FILE = "source.json"
"""File beside the three folders in which an importer says what it has imported."""


@dataclass(frozen=True)
class RawFile:
    """A file of raw data.

    Attributes:
        path: location of the file.
        name: POSIX path relative to the raw root.
        size: bytes.
        mtime_ns: time of the last change, ns.
        day: arrival day, None outside `interactions`.
    """

    path: Location
    name: str
    size: int
    mtime_ns: int
    day: date | None = None

    @property
    def identity(self) -> list[str | int]:
        """Name, size and time of the last change: they differ if the file was replaced."""
        return [self.name, self.size, self.mtime_ns]


def raw_root(config: RunConfig, store_uri: str) -> Location:
    """Find the folder of the raw data, on a local disk that all Spark workers see or in an S3 bucket.

    Raises:
        ConfigError: the location is neither.
        DataError: there is no such folder.
    """
    root = Location.at(config.runtime.raw or f"{store_uri}/raw")
    if not root.is_dir():
        raise DataError(
            f"There is no raw data at {root}, 0 rows.",
            "Import a dataset with crane import FORMAT SOURCE RAW, or give --set runtime.raw=FOLDER or s3://bucket/prefix.",
        )
    return root


def list_interactions(root: Location | Path, window: Window, etl: Etl) -> list[RawFile]:
    """List the files of the daily partitions that a run reads: the days that overlap `[end - etl.history_days, end)`.

    Raises:
        DataError: a folder is not a daily partition, or there is no partition on these days.
    """
    root = Location.at(root)
    folder = root / INTERACTIONS_FOLDER
    first = etl.first_instant(window)
    files: list[RawFile] = []
    days = []
    for entry in folder.children():
        day = _day(entry)
        days.append(day)
        begin, end = day_bounds(day, etl.time_zone)
        if begin < window.end and (first is None or end > first):
            files += _files(root, entry, day)
    if not files:
        found = f"{len(days)} daily partitions, {min(days)} to {max(days)}" if days else "no daily partition"
        raise DataError(
            f"{folder} has nothing to read before {window.end:%Y-%m-%d %H:%M} UTC (0 rows): it holds {found}"
            + (f" and etl.history_days is {etl.history_days}." if first is not None else "."),
            "Move the window to days that have data, or deliver the missing partitions dt=YYYY-MM-DD.",
        )
    return files


def list_items(root: Location | Path) -> list[RawFile]:
    """List the files of the catalog; none if there is no catalog."""
    root = Location.at(root)
    return _files(root, root / ITEMS_FOLDER)


def check_zone(root: Location, etl: Etl) -> None:
    """Refuse imported data whose days are cut at the midnights of another zone than those of the run.

    An event in the evening would lie in a partition that had arrived before it happened.

    Raises:
        ConfigError: `etl.time_zone` is not the zone of the import.
        DataError: what the importer has left beside the data cannot be read.
    """
    record = root / SOURCE_FILE
    try:
        with root.filesystem.open_input_file(str(record.path)) as file:
            # Importers before this field cut the days in UTC.
            zone = json.loads(file.read())["imported"].get("time_zone", "UTC")
    except FileNotFoundError:
        return
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{record} (row count unknown) cannot be read: {error}.",
            "Import the data again into another folder, or remove this file if the data did not come of crane import.",
        ) from error
    if zone is not None and zone != etl.time_zone:
        raise ConfigError(
            f"{root} was imported with days of the zone {zone}; etl.time_zone is {etl.time_zone}.",
            f"Give --set etl.time_zone={zone}; or, if the times of the source are numbers or carry a zone of their "
            f"own, import it into another folder with interactions.zone: {etl.time_zone} in the mapping.",
        )


def check_modality(name: str, path: Location | Path) -> None:
    """Refuse a name of a modality that is no name of a folder, that is hidden, or that other files have.

    Raises:
        DataError: the name is not of letters, digits, spaces and `_.-`, begins with one of them, is longer than 100
            characters, is `quarantine`, or ends in `.counts`.
    """
    plain = name.replace(" ", "").replace("_", "").replace(".", "").replace("-", "").isalnum()
    if not plain or not name[0].isalnum() or len(name) > 100 or name == "quarantine" or name.endswith(".counts"):
        raise DataError(
            f"{path}: {name!r} cannot name a modality, 0 rows read.",
            "Rename it: a letter or digit, then letters, digits, spaces and _.-, up to 100 characters; but not "
            "'quarantine', and not ending in '.counts'.",
        )


def list_features(root: Location | Path, modalities: Sequence[str]) -> dict[str, list[RawFile]]:
    """List the files of each modality, by name.

    Args:
        root: raw root.
        modalities: the modalities to use; all that are found if empty.

    Raises:
        ConfigError: a modality to use is missing.
        DataError: there is no modality, or a modality has no file.
    """
    root = Location.at(root)
    folder = root / FEATURES_FOLDER
    found = {entry.name: entry for entry in folder.children() if not entry.info.is_file}
    if not found:
        raise DataError(
            f"{folder} holds no modality, 0 rows of item features.",
            "Deliver features/{modality}/*.parquet with the columns item_id and vector; CRANE needs at least one.",
        )
    for name in found:
        check_modality(name, folder / name)
    unknown = sorted(set(modalities) - set(found))
    if unknown:
        raise ConfigError(
            f"features.modalities asks for {', '.join(unknown)}; {folder} holds {', '.join(found)}.",
            f"Set features.modalities to some of {', '.join(found)}, or leave it empty to use all.",
        )
    listed = {name: _files(root, found[name]) for name in sorted(modalities or found)}
    for name, files in listed.items():
        if not files:
            raise DataError(
                f"{folder / name} holds no file, 0 rows.", "Deliver its Parquet files, or remove the folder."
            )
    return listed


def arrives_within(file: RawFile, window: Window, time_zone: str) -> bool:
    """Tell whether the arrival day of the file overlaps the window."""
    assert file.day is not None
    begin, end = day_bounds(file.day, time_zone)
    return begin < window.end and end > window.start


def day_bounds(day: date, time_zone: str) -> tuple[datetime, datetime]:
    """Return the first instant of a day and of the next day in a time zone, as UTC."""
    next_day = date.fromordinal(min(day.toordinal() + 1, date.max.toordinal()))
    return _midnight(day, ZoneInfo(time_zone)), _midnight(next_day, ZoneInfo(time_zone))


def _midnight(day: date, zone: ZoneInfo) -> datetime:
    """Return the first instant of a day, as UTC; the first or the last instant there is where it lies outside."""
    try:
        return datetime.combine(day, time(), zone).astimezone(UTC)
    except OverflowError:
        return (datetime.min if day.year == 1 else datetime.max).replace(tzinfo=UTC)


def _files(root: Location, folder: Location, day: date | None = None) -> list[RawFile]:
    return [
        RawFile(entry, entry.path.relative_to(root.path).as_posix(), entry.info.size, entry.info.mtime_ns or 0, day)
        for entry in folder.files()
    ]


def _day(entry: Location) -> date:
    try:
        day = date.fromisoformat(entry.name.removeprefix(DAY_PREFIX))
        if entry.info.is_file or entry.name != f"{DAY_PREFIX}{day.isoformat()}":
            raise ValueError(entry.name)
        return day
    except ValueError as error:
        size = f"{entry.info.size} bytes" if entry.info.is_file else "a folder"
        raise DataError(
            f"{entry} ({size}, row count unknown) is no daily partition.",
            "Move it into a folder dt=YYYY-MM-DD, the day it arrived.",
        ) from error
