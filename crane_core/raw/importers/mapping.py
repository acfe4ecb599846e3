"""A mapping file: which columns of which files are the log, the catalog and the features, and how they are written."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from crane_core.allowed import remedy_of
from crane_core.config import known_zone
from crane_core.errors import ConfigError, DataError
from crane_core.raw.importers.cells import LABELS
from crane_core.raw.importers.foreign import foreign_kind
from crane_core.raw.importers.instants import ISO, PER_SECOND
from crane_core.raw.importers.layout import SUFFIXES, Layout
from crane_core.schema import EVENT_TIME, ITEM_ID, TITLE, USER_ID, VECTOR
from crane_core.section import Section

MATRIX = ".npy"
MOST_CATEGORIES = 100_000
SETTINGS = "crane_core/raw/importers/README.md"


def _readable(time: str) -> str:
    """Return a format of times if it is one; raise a ValueError otherwise."""
    if time == ISO or time in PER_SECOND:
        return time
    now = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
    try:
        same = "%" in time and datetime.strptime(now.strftime(time), time).date() == now.date()
    except (ValueError, re.error):  # A directive that comes twice makes a pattern of a name that comes twice.
        same = False
    if "%Z" in time:
        raise ValueError("a format with %Z, which reads the name of a zone and forgets it; take iso, or %z and offsets")
    if not same:
        raise ValueError("none of iso, s, ms, us, ns and no format with a whole date, such as %d.%m.%Y %H:%M")
    return time


Column = Annotated[int, Field(strict=True, ge=1)] | Annotated[str, Field(strict=True, min_length=1)]
"""A column by its position from 1, or by its name."""
Time = Annotated[str, AfterValidator(_readable)]
Zone = Annotated[str, AfterValidator(known_zone)]


class MappedLog(Layout):
    """The interactions of a mapping file."""

    columns: dict[Literal["user_id", "item_id", "event_time", "weight", "label", "event_type"], Column]
    """Column of the raw layout to column of the files; the first three are required."""
    time: Time = ISO
    """Format of the times: `iso`, a number of `s`, `ms`, `us` or `ns` since 1970, or a format such as `%d.%m.%Y %H:%M`.
    Columns of timestamps and dates in Parquet files are taken for what they are."""
    zone: Zone = "UTC"
    """Time zone of times without one, and zone whose midnights cut the daily partitions."""
    first_year: int = Field(1990, ge=1, le=9999)
    """Times before this year, and in the future, are counted and named; numbers most of which are such are refused."""
    labels: dict[str, Literal[0, 1, 2]] = Field({})
    """Words of the column `label` to 0 train, 1 validation, 2 test; by default train, valid, test and the like."""

    @field_validator("columns")
    @classmethod
    def _has_all(cls, columns: dict[str, Any]) -> dict[str, Any]:
        missing = sorted({USER_ID, ITEM_ID, EVENT_TIME} - set(columns))
        if missing:
            raise ValueError(f"interactions.columns must name {', '.join(missing)}")
        if len({columns[name] for name in (USER_ID, ITEM_ID, EVENT_TIME)}) < 3:
            raise ValueError("user_id, item_id and event_time must be three columns")
        return columns

    @field_validator("labels", mode="before")
    @classmethod
    def _words(cls, labels: Any) -> Any:
        # YAML reads the word 0 as a number and yes as a flag.
        return {str(word): label for word, label in labels.items()} if isinstance(labels, dict) else labels

    @property
    def label_words(self) -> dict[str, int]:
        """Words of labels in lower case to labels."""
        return {word.lower(): label for word, label in self.labels.items()} or LABELS


class MappedItems(Layout):
    """The catalog of a mapping file."""

    columns: dict[str, Column]
    """Column of the raw layout to column of the files. `item_id` is required, `title` is known, any other is kept."""
    types: dict[str, Literal["text", "number", "time", "flag"]] = Field({})
    """Type of further columns: text by default, but times for `available_from` and `available_until` and a flag for
    `in_stock`."""
    time: Time = ISO
    """Format of the times, as in `interactions`."""
    zone: Zone = "UTC"
    """Time zone of times without one."""
    first_year: int = Field(1990, ge=1, le=9999)
    """Times before this year, and in the future, are counted and named, as in `interactions`."""

    @model_validator(mode="after")
    def _usable(self) -> MappedItems:
        if ITEM_ID not in self.columns:
            raise ValueError("items.columns must name item_id")
        unknown = sorted(set(self.types) - set(self.columns))
        if unknown:
            raise ValueError(f"items.types names {', '.join(unknown)}, which items.columns does not have")
        fixed = sorted({ITEM_ID, TITLE} & {name for name, kind in self.types.items() if kind != "text"})
        if fixed:
            raise ValueError(
                f"items.types: {' and '.join(fixed)} can only be text; take it out, or give the column another name "
                "in items.columns"
            )
        wrong = [name for name in self.columns if not name.isidentifier()]
        if wrong:
            raise ValueError(f"items.columns: {wrong[0]!r} is no name of letters, digits and _")
        return self


class MappedModality(Layout):
    """The features of one modality in a mapping file."""

    kind: Literal["vectors", "categories", "numbers"] = "vectors"
    """`vectors`: lists of numbers in Parquet files or JSON lines, or one `.npy` matrix. `categories`: a column of words
    becomes one column per word, 1 for the items that have it. `numbers`: columns of numbers are a vector."""
    columns: dict[Literal["item_id", "vector"], Column | tuple[Column, ...]] = Field(
        {"item_id": ITEM_ID, "vector": VECTOR}
    )
    """Column of the raw layout to column of the files; `vector` may be a list of columns of categories or numbers."""
    ids: str | None = None
    """File with the item of each row of the matrix, one per line."""
    values: str = Field("|", min_length=1)
    """What separates the words of a categorical column, as in `Crime|Drama`."""
    most: int = Field(1000, ge=1, le=MOST_CATEGORIES)
    """Most categories; the import stops where there are more."""

    @model_validator(mode="after")
    def _usable(self) -> MappedModality:
        if set(self.columns) != {ITEM_ID, VECTOR} or not self.vector_columns:
            raise ValueError("columns must name item_id and vector")
        if isinstance(self.columns["item_id"], tuple) or (self.kind == "vectors" and len(self.vector_columns) > 1):
            raise ValueError("several columns can only be the vector of kind: categories or kind: numbers")
        return self

    @property
    def vector_columns(self) -> tuple[str | int, ...]:
        """The columns that make up the vector."""
        found = self.columns["vector"]
        return found if isinstance(found, tuple) else (found,)


class Mapping(Section):
    """A mapping file."""

    dataset: str = Field(min_length=1)
    """Name of the dataset."""
    interactions: MappedLog
    items: MappedItems | None = None
    features: dict[str, MappedModality] = Field({})


def read_mapping(path: Path) -> Mapping:
    """Read and check a mapping file.

    Raises:
        ConfigError: it cannot be read, or a field is unknown, missing or not valid.
    """
    try:
        found = _Loader(path.read_text(encoding="utf-8-sig")).get_single_data()
        if not isinstance(found, dict):
            raise ValueError(f"it holds {'nothing' if found is None else type(found).__name__}, not settings")
        return Mapping.model_validate(found)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(
            f"The mapping {path}: {problems}.",
            f"{_remedy(error)} What each setting may hold: {SETTINGS}.",
        ) from error
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"The mapping {path} cannot be read ({error}).",
            "Give a file in YAML with at least dataset, interactions.files and interactions.columns.",
        ) from error


def _remedy(error: ValidationError) -> str:
    """Return what the first wrong setting may be; of settings that do not go together, the section to change."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    is_section = place in ("interactions", "items") or (len(first["loc"]) == 2 and first["loc"][0] == "features")
    if first["type"] == "value_error" and is_section:
        return f"Change {place} in the mapping so that its settings go together."
    return remedy_of(error, Mapping, "{field}: VALUE in the mapping")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {', '.join(twice)} is given twice")
        return super().construct_mapping(node, deep)


def list_files(folder: Path, patterns: Sequence[str], setting: str, suffixes: Sequence[str] = ()) -> list[Path]:
    """List the files that match any of the patterns, by name.

    Args:
        folder: of the mapping file, to which patterns are relative.
        patterns: with `*`, `?`, `[...]` and `**`.
        setting: that holds the patterns, for messages.
        suffixes: that the files may have; any where it is empty.

    Raises:
        DataError: a pattern matches no file, or a file has an unknown format.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        matches = _matches(folder, pattern)
        if not matches:
            raise _no_file(folder, pattern, setting)
        # Two patterns may name a file by two ways; its rows are read once.
        found |= {os.path.realpath(path): path for path in sorted(matches)}
    for path in found.values():
        if suffixes and not any(path.name.lower().endswith(each) for each in suffixes):
            raise _no_format(path, setting, suffixes)
    return sorted(found.values())


def _no_file(folder: Path, pattern: str, setting: str) -> DataError:
    """Return the error of a pattern that matches no file."""
    try:
        is_folder = bool(pattern) and (folder / pattern).is_dir()
    except (OSError, ValueError):
        is_folder = False
    if is_folder:
        inside = f"{pattern.rstrip('/')}/*"
        return DataError(
            f"{folder / pattern} is a folder, not a file.",
            f"Name its files in {setting} of the mapping, for example {inside}.csv or {inside}.parquet.",
        )
    return DataError(
        f"{folder} has no file {pattern!r}, 0 rows.",
        f"Name in {setting} of the mapping files that are there, for example *.csv, relative to the mapping or "
        "absolute.",
    )


def _no_format(path: Path, setting: str, suffixes: Sequence[str]) -> DataError:
    """Return the error of a file whose name tells no format."""
    try:
        what, remedy = foreign_kind(path) or ("of no known format", "")
    except OSError as error:
        return DataError(f"{path} cannot be read: {error}.", f"Let the user who imports read {path}.")
    return DataError(
        f"{path} ({path.stat().st_size} bytes) is {what}.",
        remedy
        or f"Set {setting.removesuffix('.files')}.format in the mapping to csv, tsv, json or parquet, or deliver files "
        f"that end in {', '.join(suffixes)}.",
    )


def list_tables(folder: Path, layout: Layout, section: str) -> list[Path]:
    """List the files of a section that holds tables; as `list_files`."""
    known = [*SUFFIXES, *(f"{suffix}.gz" for suffix in SUFFIXES)]
    return list_files(folder, layout.files, f"{section}.files", () if layout.format else known)


def _matches(folder: Path, pattern: str) -> set[Path]:
    try:
        absolute = Path(pattern).is_absolute()
        base = Path(Path(pattern).anchor) if absolute else folder
        relative = os.path.relpath(pattern, base) if absolute else pattern
        # A name may hold characters that a pattern has a use for.
        plain = base / relative
        return {plain} if pattern and plain.is_file() else {path for path in base.glob(relative) if path.is_file()}
    except (ValueError, IndexError, NotImplementedError, OSError, RecursionError):
        return set()


def file_names(folder: Path, files: Sequence[Path]) -> dict[Path, str]:
    """Return the name of each file as seen from a folder."""
    return {path: Path(os.path.relpath(path, folder)).as_posix() for path in files}
