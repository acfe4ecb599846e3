"""Read a sample of the files that a mapping names, and tell what each column is taken for; nothing is written."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from crane_core.errors import ConfigError, CraneError, DataError
from crane_core.raw.importers import mapped, modality
from crane_core.raw.importers.account import Account
from crane_core.raw.importers.cells import Cells, Values, ids
from crane_core.raw.importers.layout import Chunk, Layout, plain
from crane_core.raw.importers.mapping import MATRIX, MappedItems, MappedLog, MappedModality
from crane_core.raw.importers.matrix import load_matrix, read_id_lines
from crane_core.raw.importers.rows import read_chunks
from crane_core.raw.importers.tables import Sieve, Wanted, fitting
from crane_core.raw.overlap import check_overlap, share_found
from crane_core.schema import EVENT_TIME, EVENT_TYPE, ITEM_ID, LABEL, TITLE, USER_ID, WEIGHT

SAMPLE_ROWS = 100_000
NUM_EXAMPLES = 3
MOST_CHARACTERS = 40
KINDS = {USER_ID: "id", ITEM_ID: "id", WEIGHT: "number", LABEL: "label", EVENT_TYPE: "word", TITLE: "text"}


@dataclass
class CheckedColumn:
    """Content that a column of the raw layout would have.

    Attributes:
        name: in the raw layout.
        column: in the files.
        stored: type in the files.
        taken: what it is taken for.
        missing, bad: rows without a value, and with one that does not fit.
        low, high: smallest and largest value; None where there is no order.
        examples: first distinct values of the files.
        widths: lengths of vectors.
        words: categories.
    """

    name: str
    column: str
    stored: str
    taken: str
    missing: int = 0
    bad: int = 0
    low: Any = None
    high: Any = None
    examples: list[str] = field(default_factory=list)
    widths: set[int] = field(default_factory=set)
    words: set[str] = field(default_factory=set)

    def add(self, values: Values, cells: Cells) -> None:
        """Count some rows."""
        self.missing += int(pc.sum(pc.is_null(cells.values)).as_py() or 0) - int(cells.bad.sum())
        self.bad += int(cells.bad.sum())
        found = pc.list_flatten(cells.values) if pt.is_nested(cells.values.type) else cells.values
        if not (pt.is_string(found.type) or pt.is_boolean(found.type)) and len(found):
            bounds = pc.min_max(found).as_py()
            self.low = min((each for each in (self.low, bounds["min"]) if each is not None), default=None)
            self.high = max((each for each in (self.high, bounds["max"]) if each is not None), default=None)
        if pt.is_nested(cells.values.type):
            self._add_lists(cells.values, found)
        for value in values[: 100 if len(self.examples) < NUM_EXAMPLES else 0]:
            text = str(plain(value))
            shown = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."
            if shown not in self.examples and len(self.examples) < NUM_EXAMPLES:
                self.examples.append(shown)

    def _add_lists(self, lists: pa.Array, members: pa.Array) -> None:
        """Count lists: of numbers, which are a vector, or of words."""
        lengths = pc.list_value_length(lists).drop_null()
        if pt.is_floating(members.type):
            self.widths |= set(pc.unique(lengths).to_pylist())
            self.taken = f"vector of {' or '.join(map(str, sorted(self.widths)[:3]))} numbers"
        else:
            self.words |= set(members.to_pylist())
            self.missing += pc.sum(pc.equal(lengths, 0)).as_py() or 0
            self.taken = f"{len(self.words)} categories"


@dataclass
class CheckedSection:
    """What a section of a mapping would bring.

    Attributes:
        name: of the section.
        files: that it names.
        rows: rows of the sample.
        is_whole: whether the sample is all there is.
        columns: of the raw layout.
        set_aside: reason to rows of the sample that would not be written.
        noticed: what is odd and what would not be written, and where the first such rows are, as sentences.
        ids: items of the sample.
        users: users of the sample of a log.
    """

    name: str
    files: list[str]
    rows: int
    is_whole: bool
    columns: list[CheckedColumn]
    set_aside: dict[str, int]
    noticed: list[str]
    ids: set[str] = field(default_factory=set, repr=False)
    users: set[str] = field(default_factory=set, repr=False)

    def lines(self) -> list[str]:
        """Return a table for a person."""
        files = self.files[0] if len(self.files) == 1 else f"{self.files[0]} and {len(self.files) - 1} more"
        head = f"{self.name}: {files}, {'all' if self.is_whole else 'the first'} {self.rows} rows"
        table = [("column", "from", "stored as", "taken for", "missing", "unfit", "range", "examples")]
        for each in self.columns:
            span = "" if each.low is None else f"{_shown(each.low)} .. {_shown(each.high)}"
            counts = (str(each.missing), str(each.bad))
            table.append((each.name, each.column, each.stored, each.taken, *counts, span, ", ".join(each.examples)))
        widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        return [head, *(f"  {line}" for line in [*rows, *self.noticed])]


@dataclass
class Checked:
    """What a mapping would bring.

    Attributes:
        dataset: its name.
        sections: those that could be read.
        matched: section to the share of the items of the log's sample that its sample has.
        problems: errors that would stop the import.
    """

    dataset: str
    sections: list[CheckedSection] = field(default_factory=list)
    matched: dict[str, float] = field(default_factory=dict)
    problems: list[dict[str, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        told = asdict(self)
        for section in told["sections"]:
            del section["ids"], section["users"]
            for column in section["columns"]:
                del column["widths"], column["words"]
                column |= {name: None if column[name] is None else _shown(column[name]) for name in ("low", "high")}
        return told

    def lines(self) -> list[str]:
        """Return the report for a person."""
        lines = [line for section in self.sections for line in [*section.lines(), ""]]
        lines += [f"{name} has {share:.1%} of the items of the log" for name, share in self.matched.items()]
        for problem in self.problems:
            lines += [f"problem: {problem['found']}", f"Remedy: {problem['remedy']}"]
        return [*lines, f"{len(self.problems)} problems; nothing was written"]


def check_mapping(mapping: str | Path) -> Checked:
    """Check what an import by a mapping would bring, from the first rows of its files.

    Raises:
        ConfigError: the mapping file is not valid, or there is no room for a trial.
        DataError: it names a file that is missing or of no known format.
    """
    found = mapped.find_files(Path(mapping))
    chosen = found.mapping
    checked = Checked(chosen.dataset)
    entries: list[tuple[str, Sequence[Path], Layout]] = [("interactions", found.log, chosen.interactions)]
    entries += [("items", found.catalog, chosen.items)] if chosen.items else []
    entries += [(f"features.{name}", found.features[name], entry) for name, entry in chosen.features.items()]
    for name, files, entry in entries:
        try:
            checked.sections.append(_check_section(name, files, entry, checked.problems))
        except CraneError as error:
            checked.problems.append(error.as_dict())
    by_name = {section.name: section for section in checked.sections}
    log = by_name.pop("interactions", None)
    for name, section in by_name.items() if log else ():
        assert log is not None
        checked.matched[name] = share_found(log.ids, section.ids)
        numeric = f"set numeric: [item_id] in interactions and in {name} of the mapping."
        # Rows beyond the sample of a table may have the ids of the log.
        known = section.ids if section.is_whole else set()
        try:
            check_overlap(name, log.ids, known, log.users, numeric)
        except DataError as error:
            checked.problems.append(error.as_dict())
    if not checked.problems and all(each.is_whole and each.rows <= SAMPLE_ROWS for each in checked.sections):
        checked.problems += _tried(found)
    return checked


def _tried(found: mapped.MappedFiles) -> list[dict[str, str]]:
    """Import small files into a temporary folder, and return the error that stops that.

    Raises:
        ConfigError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            mapped.build(Path(folder), folder, found)
        except CraneError as error:
            return [error.as_dict()]
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot hold a trial of the import: {error}.",
                "Set TMPDIR to a folder on a disk with room for it.",
            ) from error
    return []


def _check_section(name: str, files: Sequence[Path], entry: Layout, problems: list[dict[str, str]]) -> CheckedSection:
    account = Account(name, entry.max_set_aside)
    section = CheckedSection(name, [str(path) for path in files], 0, True, [], {}, [])
    if files[0].suffix == MATRIX:
        assert isinstance(entry, MappedModality)
        _check_matrix(section, files, entry, account)
        return _concluded(section, account, problems)
    wanted, taken = _wanted(entry)
    sieve = modality.sieve_of(entry, account) if isinstance(entry, MappedModality) else None
    sieve = Sieve(wanted, account) if isinstance(entry, MappedItems) else sieve
    columns: dict[str, CheckedColumn] = {}
    words: Counter[str] = Counter()
    for chunk in (chunk for path in files for chunk in read_chunks(path, entry, _columns(wanted), account)):
        if section.rows >= SAMPLE_ROWS:
            section.is_whole = False
            break
        for raw, each in wanted.items():
            values = chunk.columns[each.column]
            if raw not in columns:
                columns[raw] = CheckedColumn(raw, str(each.column), _stored(chunk, each), taken.get(raw, "text"))
            columns[raw].add(values, each.convert(values))
        if sieve:
            kept = sieve.rows_of(chunk)
            words.update(modality.words_of(kept, entry) if isinstance(entry, MappedModality) else ())
        else:
            batch = fitting(chunk, wanted, account)
            section.ids |= set(filter(None, batch.column(ITEM_ID).to_pylist()))
            section.users |= set(filter(None, batch.column(USER_ID).to_pylist()))
        section.rows += len(chunk)
    section.ids |= sieve.items if sieve else set()
    section.columns = list(columns.values())
    if isinstance(entry, MappedModality):
        try:
            modality.check_most(name, words, section.rows, entry.most)
        except DataError as error:
            problems.append(error.as_dict())
    return _concluded(section, account, problems)


def _concluded(section: CheckedSection, account: Account, problems: list[dict[str, str]]) -> CheckedSection:
    """Return a section with what its account says."""
    section.set_aside = dict(account.set_aside)
    section.noticed = account.notes()
    try:
        account.check_share()
    except DataError as error:
        problems.append(error.as_dict())
    return section


def _check_matrix(
    section: CheckedSection, files: Sequence[Path], entry: MappedModality, account: Account
) -> CheckedSection:
    matrix = load_matrix(files[0])
    lines = read_id_lines(files[1], section.name, entry.encoding, len(matrix))
    column = CheckedColumn(ITEM_ID, files[1].name, "text", "id")
    column.add(lines, ids(lines, entry.missing or (), ITEM_ID in entry.numeric))
    vectors = CheckedColumn("vector", files[0].name, str(matrix.dtype), f"vector of {matrix.shape[1]} numbers")
    for _, rows in modality.matrix_rows(files, entry, account, section.ids):
        vectors.add(rows[:0], Cells(rows, np.zeros(len(rows), bool)))
        if account.rows >= SAMPLE_ROWS:
            break
    vectors.missing, vectors.bad = account.set_aside["no_vector"], account.set_aside["bad_vector"]
    section.rows, section.columns = account.rows, [column, vectors]
    section.is_whole = account.rows == len(matrix)
    return section


def _wanted(entry: Layout) -> tuple[Mapping[str, Wanted], dict[str, str]]:
    """Return the columns of a section, and what each is taken for."""
    if isinstance(entry, MappedLog):
        clock = mapped.clock_of(entry)
        return mapped.log_columns(entry, clock), {**KINDS, EVENT_TIME: f"instant ({entry.time}, {entry.zone})"}
    if isinstance(entry, MappedItems):
        return mapped.item_columns(entry), {name: mapped.item_type(entry, name) for name in entry.columns}
    assert isinstance(entry, MappedModality)
    wanted = modality.modality_columns(entry)
    kind = {"vectors": "vector", "categories": "categories", "numbers": "number"}[entry.kind]
    return wanted, {name: "id" if name == ITEM_ID else kind for name in wanted}


def _columns(wanted: Mapping[str, Wanted]) -> list[str | int]:
    return [each.column for each in wanted.values()]


def _stored(chunk: Chunk, wanted: Wanted) -> str:
    values = chunk.columns[wanted.column]
    if isinstance(values, pa.Array):
        return str(values.type)
    kinds = sorted(
        {"text" if isinstance(value, str) else type(value).__name__ for value in values if value is not None}
    )
    return " or ".join(kinds) or "nothing"


def _shown(value: Any) -> str:
    if hasattr(value, "isoformat"):
        return f"{value:%Y-%m-%d %H:%M}"
    return f"{value:g}" if isinstance(value, float) else str(value)
