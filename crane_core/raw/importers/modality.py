"""Write the features that a mapping file describes: vectors, categories as multi-hot, numbers as they are."""

from __future__ import annotations

import ast
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from numpy.typing import NDArray

from crane_core.errors import ConfigError, DataError
from crane_core.raw.files import check_modality
from crane_core.raw.importers import cells
from crane_core.raw.importers.account import Account, one_of
from crane_core.raw.importers.cells import Cells, Converter, Values
from crane_core.raw.importers.layout import Chunk
from crane_core.raw.importers.mapping import MATRIX, MOST_CATEGORIES, MappedModality, list_files, list_tables
from crane_core.raw.importers.matrix import load_matrix, read_id_lines, wrong_id_count
from crane_core.raw.importers.rows import read_chunks
from crane_core.raw.importers.tables import Sieve, Wanted, drop_rows, first_rows
from crane_core.raw.importers.target import MOST_NUMBERS, FeatureWriter, lists_of
from crane_core.schema import ITEM_ID, VECTOR

FLOATS = pa.list_(pa.float32())
MOST_LISTED = 10_000
"""Longest text, in characters, that is read as a list of words."""


@dataclass(frozen=True)
class WrittenModality:
    """What was written of one modality.

    Attributes:
        width: of its vectors.
        items: ids that have one.
    """

    width: int
    items: set[str]


def feature_files(folder: Path, name: str, entry: MappedModality) -> list[Path]:
    """List the files of a modality: tables, or a matrix and its ids.

    Raises:
        ConfigError: a matrix has no ids.
        DataError: there is no such file, or the files are of several kinds.
    """
    check_modality(name, folder)
    section = f"features.{name}"
    files = list_files(folder, entry.files, f"{section}.files")
    if not any(path.suffix == MATRIX for path in files):
        return list_tables(folder, entry, section)
    if len(files) > 1 or entry.kind != "vectors":
        raise DataError(
            f"{section}: {', '.join(entry.files)} matches {len(files)} files, expected one {MATRIX} matrix of vectors.",
            f"Set {section}.files in the mapping to one {MATRIX} matrix, or to tables.",
        )
    if entry.ids is None:
        raise ConfigError(
            f"{section} is a matrix without ids.",
            f"Add {section}.ids: FILE to the mapping, a file with one item id a line.",
        )
    return [*files, *list_files(folder, [entry.ids], f"{section}.ids")]


def write_modality(
    target: Path, name: str, files: Sequence[Path], entry: MappedModality, account: Account
) -> WrittenModality:
    """Write one modality.

    Args:
        target: raw root.
        name: of the modality.
        files: from `feature_files`.
        entry: the modality in the mapping.
        account: counts its rows.

    Raises:
        DataError: a file does not have the described format, or no item has a vector.
    """
    if files[0].suffix == MATRIX:
        written = _write_matrix(target, name, files, entry, account)
    elif entry.kind == "categories":
        written = _write_categories(target, name, files, entry, account)
    else:
        written = _write_lists(target, name, files, entry, account)
    account.settle()
    if not written.items:
        is_matrix = files[0].suffix == MATRIX
        way = "deliver a matrix of finite numbers" if is_matrix else account.way("name in {}.columns what is not empty")
        raise DataError(
            f"features.{name}: none of {account.rows} rows of {files[0]} is an item with a vector: {account.told()}.",
            one_of([way, f"leave features.{name} out of the mapping"]),
        )
    return written


def vectors(values: Values) -> Cells:
    """Return lists of numbers of any type as lists of float32.

    Null is an item without a vector: a null or empty list, or one of which every number is null or NaN. Bad is what is
    no list of numbers, and a list in which some number is null, NaN or infinite as float32.
    """
    if isinstance(values, pa.Array):
        kind = values.type
        if pt.is_null(kind):
            return Cells(pa.nulls(len(values), FLOATS), np.zeros(len(values), bool))
        if (pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)) and _is_number(kind.value_type):
            lists = values.cast(pa.list_(kind.value_type)).cast(FLOATS, safe=False)
            return finite(lists, np.zeros(len(values), bool))
        return Cells(pa.nulls(len(values), FLOATS), values.is_valid().to_numpy(zero_copy_only=False))
    rows = [_floats(value) for value in values]
    bad = np.array([value is not None and row is None for value, row in zip(values, rows, strict=True)], dtype=bool)
    return finite(pa.array(rows, FLOATS), bad)


def finite(lists: pa.Array, bad: NDArray[np.bool_]) -> Cells:
    """Return lists of float32 whose numbers are all finite; `bad` tells values that are no list."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    members = pc.fill_null(pc.list_flatten(lists), np.nan).to_numpy()
    ends = np.cumsum(lengths)
    absent, infinite = (
        np.bincount(np.searchsorted(ends, np.flatnonzero(odd), side="right"), minlength=len(lists))
        for odd in (np.isnan(members), np.isinf(members))
    )
    there = absent < lengths
    bad = bad | (there & (absent + infinite > 0))
    return Cells(pc.if_else(pa.array(there & ~bad), lists, pa.scalar(None, FLOATS)), bad)


def _is_number(kind: pa.DataType) -> bool:
    return pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind) or pt.is_boolean(kind)


def _floats(value: Any) -> list[float | None] | None:
    if not isinstance(value, list) or any(isinstance(each, (bool, list, dict)) for each in value):
        return None
    try:
        with np.errstate(over="ignore"):
            return [None if each is None else float(np.float32(each)) for each in value]
    except (ValueError, OverflowError):
        return None


def _batches(files: Sequence[Path], entry: MappedModality, sieve: Sieve) -> Iterator[pa.RecordBatch]:
    columns = [each.column for each in sieve.wanted.values()]
    for path in files:
        for chunk in read_chunks(path, entry, columns, sieve.account):
            yield sieve.rows_of(chunk)


def sieve_of(entry: MappedModality, account: Account) -> Sieve:
    """Return what chooses the rows of a modality that are written: those with an item and a vector or words."""
    is_words = entry.kind == "categories"
    reason = "no_category" if is_words else "no_vector"
    return Sieve(modality_columns(entry), account, has_vector, reason, joins=is_words)


def modality_columns(entry: MappedModality) -> dict[str, Wanted]:
    """Return the columns of a modality, `item_id` and one or several that make up the vector, and how each is made."""
    missing = cells.MISSING if entry.missing is None else entry.missing
    convert: dict[str, Converter] = {
        "vectors": vectors,
        "categories": lambda values: _word_lists(values, entry),
        "numbers": lambda values: cells.weights(values, missing, entry.decimal, entry.thousands),
    }
    column = entry.columns["item_id"]
    assert not isinstance(column, tuple)
    wanted = {ITEM_ID: Wanted(column, lambda values: cells.ids(values, entry.missing or (), ITEM_ID in entry.numeric))}
    for index, each in enumerate(entry.vector_columns):
        name = {"vectors": VECTOR, "categories": f"category_{index}", "numbers": f"number_{index}"}[entry.kind]
        wanted[name] = Wanted(each, convert[entry.kind])
    return wanted


def _write_lists(
    target: Path, name: str, files: Sequence[Path], entry: MappedModality, account: Account
) -> WrittenModality:
    """Write vectors, or columns of numbers as vectors. An item whose vector or any number is null is left out."""
    lengths: Counter[int] = Counter()
    sieve = sieve_of(entry, account)
    with FeatureWriter(target, name) as writer:
        for batch in _batches(files, entry, sieve):
            found = batch.column(VECTOR) if entry.kind == "vectors" else _side_by_side(batch)
            lengths.update(pc.list_value_length(found).to_pylist())
            writer.write(batch.column(ITEM_ID), found)
    account.written = writer.num_rows()
    told = ", ".join(f"{count} of length {length}" for length, count in lengths.most_common(3))
    if lengths and 2 * lengths.most_common(1)[0][1] <= lengths.total():
        raise DataError(
            f"{account.name}: no length is that of most of its {account.written} vectors: {told}.",
            "Deliver vectors of one length.",
        )
    if len(lengths) > 1:
        account.notice(
            f"with vectors of different lengths: {told}; the ETL keeps the most frequent", name, account.written
        )
    return WrittenModality(lengths.most_common(1)[0][0] if lengths else 0, sieve.items)


def has_vector(batch: pa.RecordBatch) -> pa.Array:
    """Return which rows of a batch of `modality_columns` have a vector: all numbers, or at least one word."""
    columns = [batch.column(name) for name in batch.schema.names if name != ITEM_ID]
    if pt.is_list(columns[0].type) and pt.is_string(columns[0].type.value_type):
        lengths = [pc.fill_null(pc.list_value_length(column), 0).to_numpy() for column in columns]
        return pa.array(np.sum(lengths, axis=0) > 0)
    return pa.array(np.logical_and.reduce([column.is_valid().to_numpy(zero_copy_only=False) for column in columns]))


def _side_by_side(batch: pa.RecordBatch) -> pa.Array:
    """Return the columns of numbers of a batch, none of them null, as one list column."""
    columns = [batch.column(name) for name in batch.schema.names if name != ITEM_ID]
    return lists_of(np.stack([column.to_numpy(zero_copy_only=False) for column in columns], axis=1))


def _write_categories(
    target: Path, name: str, files: Sequence[Path], entry: MappedModality, account: Account
) -> WrittenModality:
    """Write one column per word, in alphabetical order, which is 1 for the items that have it in any of their rows."""
    items: dict[str, frozenset[str]] = {}
    known: dict[frozenset[str], frozenset[str]] = {}
    for batch in _batches(files, entry, sieve_of(entry, account)):
        columns = _named_words(batch, entry)
        for place, item in enumerate(batch.column(ITEM_ID).to_pylist()):
            found = frozenset(word for column in columns for word in column[place]) | items.get(item, frozenset())
            items[item] = known.setdefault(found, found)
    ids, rows = list(items), list(items.values())
    counts = Counter(word for row in rows for word in row)
    check_most(f"features.{name}", counts, len(rows), entry.most)
    places = {word: index for index, word in enumerate(sorted(counts))}
    with FeatureWriter(target, name) as writer:
        step = max(1, (1 << 22) // max(1, len(places)))
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            matrix = np.zeros((len(part), len(places)), dtype=np.float32)
            for index, row in enumerate(part):
                matrix[index, [places[word] for word in row]] = 1
            writer.write(pa.array(ids[first : first + step], pa.string()), lists_of(matrix))
    account.written = writer.num_rows()
    return WrittenModality(len(places), set(ids))


def words_of(batch: pa.RecordBatch, entry: MappedModality) -> Iterator[str]:
    """Yield the words of each row of a batch of `modality_columns`; none of other kinds than categories."""
    for column in _named_words(batch, entry) if entry.kind == "categories" else ():
        for words in column:
            yield from words


def _named_words(batch: pa.RecordBatch, entry: MappedModality) -> list[list[list[str]]]:
    """Return the words of each row, for each column; with the name of the column where there are several."""
    found = []
    for index, column in enumerate(entry.vector_columns):
        lead = f"{column}=" if len(entry.vector_columns) > 1 else ""
        rows = batch.column(f"category_{index}").to_pylist()
        found.append([[lead + word for word in words or ()] for words in rows])
    return found


def check_most(section: str, counts: Mapping[str, int], num_rows: int, most: int) -> None:
    """Refuse more categories than a modality may have.

    Raises:
        DataError: there are more than `most`.
    """
    if len(counts) <= most:
        return
    common = ", ".join(f"{word!r} ({count})" for word, count in Counter(counts).most_common(3))
    ways = [f"set {section}.most: {len(counts)} in the mapping"] if len(counts) <= MOST_CATEGORIES else []
    ways += [f"set {section}.values to what separates the words", "name a column with fewer"]
    raise DataError(
        f"{section} has {len(counts)} categories in {num_rows} rows, such as {common}; {section}.most is {most}.",
        one_of(ways),
    )


def _word_lists(values: Values, entry: MappedModality) -> Cells:
    """Return the words of each row: text between separators, or the members of a list; numbers and flags are words."""
    missing = set(cells.MISSING if entry.missing is None else entry.missing)
    if isinstance(values, pa.Array) and not pt.is_nested(values.type):
        found = cells.ids(values.cast(pa.string()) if pt.is_boolean(values.type) else values)
        spans = [slice(row, row + 1) for row in range(len(values))]
    else:
        if isinstance(values, pa.Array) and pt.is_list(values.type):
            lengths = pc.fill_null(pc.list_value_length(values), 0).to_pylist()
            found = cells.ids(values.flatten())
        else:
            rows: Sequence[Any] = values.to_pylist() if isinstance(values, pa.Array) else values
            members = [each if isinstance(each, list) else [each] for each in rows]
            lengths = list(map(len, members))
            found = cells.ids([str(each) if isinstance(each, bool) else each for row in members for each in row])
        spans = [slice(first, end) for first, end in itertools.pairwise(np.cumsum([0, *lengths]))]
    listed = [_members(text) for text in found.values.to_pylist()]
    unfit = found.bad | np.array([each is None for each in listed], dtype=bool)
    bad = np.array([unfit[span].any() for span in spans], dtype=bool)
    told = [[word for each in listed[span] for word in each or ()] for span in spans]
    words = [[word.strip() for text in row if text for word in text.split(entry.values)] for row in told]
    kept = [[word for word in row if word and word not in missing] for row in words]
    return Cells(pa.array(kept, pa.list_(pa.string())), bad)


def _members(text: str | None) -> list[str | None] | None:
    """Return the members of a list that is written as text, as `["a", "b"]` or `['a', 'b']`; other text alone.

    None stands for a list of more than words and numbers.
    """
    if text is None or len(text) > MOST_LISTED or not (text.startswith("[") and text.endswith("]")):
        return [text]
    for read in (json.loads, ast.literal_eval):
        try:
            members = read(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        is_plain = all(each is None or type(each) in (str, int, float) for each in members)
        return [None if each is None else str(each) for each in members] if is_plain else None
    return [text]


def _write_matrix(
    target: Path, name: str, files: Sequence[Path], entry: MappedModality, account: Account
) -> WrittenModality:
    """Write a matrix whose items are in a file of ids."""
    items: set[str] = set()
    with FeatureWriter(target, name) as writer:
        for ids, lists in matrix_rows(files, entry, account, items):
            writer.write(ids, lists)
    account.written = writer.num_rows()
    return WrittenModality(int(load_matrix(files[0]).shape[1]), items)


def matrix_rows(
    files: Sequence[Path], entry: MappedModality, account: Account, items: set[str]
) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Yield items and vectors of a matrix, those that are written; the others are counted.

    Args:
        files: the matrix, and the file of ids.
        entry: the modality in the mapping.
        account: counts the rows.
        items: the items so far are added.

    Raises:
        DataError: a file cannot be read, or there are not as many ids as rows.
    """
    path, ids_path = files
    matrix = load_matrix(path)
    lines = read_id_lines(ids_path, account.name, entry.encoding, len(matrix))
    if len(lines) != len(matrix):
        raise wrong_id_count(files, matrix, lines)
    found = cells.ids(lines, entry.missing or (), ITEM_ID in entry.numeric)
    step = max(1, MOST_NUMBERS // matrix.shape[1])
    for begin in range(0, len(matrix), step):
        chunk = Chunk(ids_path, {"": lines[begin : begin + step]}, range(begin + 1, len(lines) + 1)[:step])
        ids, wrong = found.values.slice(begin, step), found.bad[begin : begin + step]
        rows = lists_of(matrix[begin : begin + step])
        account.rows += len(rows)
        vector = finite(rows, np.zeros(len(rows), bool))
        there = vector.values.is_valid().to_numpy(zero_copy_only=False)
        good = there & ids.is_valid().to_numpy(zero_copy_only=False)
        first = first_rows(ids, good, items)
        reasons = {"bad_vector": vector.bad, "no_vector": ~there & ~vector.bad, "no_id": there & ~good}
        drop_rows(account, "bad_item_id", np.flatnonzero(wrong), chunk, "")
        for reason, gone in {**reasons, "repeated_id": good & ~first}.items():
            drop_rows(account, reason, np.flatnonzero(gone & ~wrong), chunk, "")
        yield ids.filter(pa.array(first)), vector.values.filter(pa.array(first))
