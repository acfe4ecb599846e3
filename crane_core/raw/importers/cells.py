"""Turn the values of one column into ids, text, numbers, labels or flags, and tell which values do not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from numpy.typing import NDArray

from crane_core.raw.importers.layout import JsonNumber
from crane_core.schema import TEST, TRAIN, VALIDATION

MISSING = ("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "Null", "null", "None", r"\N")
"""Words that stand for no value in a column of numbers, times, labels or flags."""
LABELS = {
    **dict.fromkeys(("0", "train", "training"), TRAIN),
    **dict.fromkeys(("1", "valid", "val", "validation", "dev"), VALIDATION),
    **dict.fromkeys(("2", "test", "testing"), TEST),
}
FLAGS = {**dict.fromkeys(("1", "true", "t", "yes", "y"), True), **dict.fromkeys(("0", "false", "f", "no", "n"), False)}
EXACT = {pa.float16(): 2**11, pa.float32(): 2**24, pa.float64(): 2**53}
"""Up to this number every whole number has a float of its own."""
UNFIT: Any = object()
"""A list that holds more than text and numbers."""
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?$"
_WHOLE = r"^\+?(-?)0*(\d+?)(?:\.0*)?$"

Values = Any
"""The values of a column: an Arrow array, or a list of text and of what JSON holds."""


@dataclass(frozen=True)
class Cells:
    """The values of a column in the type that is wanted.

    Attributes:
        values: null where there is no value, and where it does not fit.
        bad: bool [n], where a value does not fit.
    """

    values: pa.Array
    bad: NDArray[np.bool_]


Converter = Callable[[Values], Cells]


def texts(values: Values, decimal: str = ".") -> Cells:
    """Return values as text, as they stand; numbers in exact decimal text. `Cells.bad`: those that have none.

    Args:
        values: of a column.
        decimal: decimal separator that numbers of JSON get.
    """
    if isinstance(values, pa.Array):
        return _native_texts(_stored(values))
    kinds = set(map(type, values))
    if kinds <= {str, type(None)}:
        try:
            return _cells(pa.array(values, pa.string()))
        except (UnicodeEncodeError, pa.ArrowException):
            pass
    values = [None if isinstance(value, JsonNumber) and value == "NaN" else value for value in values]
    told = [_text(value, decimal) for value in values]
    bad: Any = [value is not None and text is None for value, text in zip(values, told, strict=True)]
    return Cells(pa.array(told, pa.string()), np.array(bad, dtype=bool))


def joined(values: Values) -> Cells:
    """Return values as text, and the members of a list of text or numbers as one text, joined by `|`."""
    if isinstance(values, pa.Array):
        if not pt.is_nested(values.type):
            return texts(values)
        values = values.to_pylist()
    told = [_joined(value) if isinstance(value, list) else value for value in values]
    found = texts([None if value is UNFIT else value for value in told])
    unfit: Any = [value is UNFIT for value in told]
    return Cells(found.values, found.bad | np.array(unfit, dtype=bool))


def _joined(members: list[Any]) -> Any:
    kept = [_text(each, ".") if not isinstance(each, float) else repr(each) for each in members if each is not None]
    return UNFIT if None in kept else "|".join(each for each in kept if each is not None) or None


def ids(values: Values, missing: Sequence[str] = (), numeric: bool = False) -> Cells:
    """Return values as ids: text as it stands, and whole numbers as their decimal text.

    Bad are numbers that are not whole or not exact in their type, flags, times, lists, text over several lines and
    text that is not of the encoding.

    Args:
        values: of a column.
        missing: words that are no id; the empty word never is.
        numeric: read text as whole numbers, too.
    """
    if not isinstance(values, pa.Array):
        values = [_exact(value) for value in values] if set(map(type, values)) - {str, type(None)} else values
    else:
        values = _stored(values)
        if not (pt.is_string(values.type) or pt.is_null(values.type) or pt.is_binary(values.type)):
            return _native_ids(values)
    found = texts(values)
    text = _without(found.values, missing)
    # The ETL takes spaces for no id, too.
    text = pc.if_else(pc.match_substring_regex(text, "^ +$"), pa.scalar(None, pa.string()), text)
    bad = found.bad | _mask(pc.match_substring_regex(text, r"[\r\n]"))
    if numeric:
        trimmed = pc.utf8_trim_whitespace(text)
        bad |= _mask(pc.invert(pc.match_substring_regex(trimmed, _WHOLE)))
        text = pc.replace_substring_regex(pc.replace_substring_regex(trimmed, _WHOLE, r"\1\2"), "^-0$", "0")
    return Cells(_null_where(text, bad), bad)


def numbers(
    values: Values, missing: Sequence[str] = MISSING, decimal: str = ".", thousands: str | None = None
) -> Cells:
    """Return values as float64, flags as 1 and 0. Bad is what is no finite number; NaN is no value.

    Args:
        values: of a column.
        missing: words that stand for no value.
        decimal: decimal separator of text.
        thousands: what separates groups of three digits of text.
    """
    if isinstance(values, pa.Array) and not (pt.is_string(values.type) or pt.is_binary(values.type)):
        kind = values.type
        if pt.is_boolean(kind):
            values, kind = values.cast(pa.int8()), pa.int8()
        if not (pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind) or pt.is_null(kind)):
            return Cells(pa.nulls(len(values), pa.float64()), _mask(values.is_valid()))
        found = values.cast(pa.float64(), safe=False)
        found = pc.if_else(pc.is_nan(found), pa.scalar(None, pa.float64()), found)
        bad = _mask(pc.is_inf(found))
        return Cells(_null_where(found, bad), bad)
    if not isinstance(values, pa.Array):
        values = [int(value) if isinstance(value, bool) else value for value in values]
    read = texts(values, decimal)
    text = _without(pc.utf8_trim_whitespace(read.values), missing)
    text, odd = plain_decimals(text, decimal, thousands)
    bad = read.bad | odd | _mask(pc.invert(pc.match_substring_regex(text, _NUMBER)))
    text = pc.replace_substring_regex(_null_where(text, bad), r"^\+", "")
    found = text.cast(pa.float64())
    bad = bad | _mask(pc.is_inf(found))
    return Cells(_null_where(found, bad), bad)


def plain_decimals(text: pa.Array, decimal: str, thousands: str | None) -> tuple[pa.Array, NDArray[np.bool_]]:
    """Return numbers with a decimal point and without groups of three digits, and which have a point in other use."""
    if thousands:
        grouped = rf"^\s*[+-]?\d{{1,3}}({re.escape(thousands)}\d{{3}})+({re.escape(decimal)}\d*)?\s*$"
        is_grouped = pc.match_substring_regex(text, grouped)
        text = pc.if_else(is_grouped, pc.replace_substring(text, thousands, ""), text)
    if decimal == ".":
        return text, np.zeros(len(text), dtype=bool)
    odd = _mask(pc.match_substring(text, "."))
    return pc.replace_substring(text, decimal, "."), odd


def weights(
    values: Values, missing: Sequence[str] = MISSING, decimal: str = ".", thousands: str | None = None
) -> Cells:
    """Return values as float32, as `numbers`. Bad is what is no number that float32 can hold."""
    found = numbers(values, missing, decimal, thousands)
    most = float(np.finfo(np.float32).max)
    bad = found.bad | _mask(pc.greater(pc.abs(found.values), most))
    return Cells(_null_where(found.values, bad).cast(pa.float32()), bad)


def required(convert: Converter) -> Converter:
    """Return a converter for which no value is a bad one."""

    def converted(values: Values) -> Cells:
        found = convert(values)
        return Cells(found.values, found.bad | _mask(found.values.is_null()))

    return converted


def words(values: Values, meaning: Mapping[str, Any], kind: pa.DataType, missing: Sequence[str] = MISSING) -> Cells:
    """Return the meaning of words, whatever their case; whole numbers and flags count as words.

    Args:
        values: of a column.
        meaning: word in lower case to its value.
        kind: type of the values.
        missing: words that stand for none.
    """
    if isinstance(values, pa.Array) and pt.is_boolean(values.type):
        values = values.cast(pa.string())
    if not isinstance(values, pa.Array):
        values = [str(value) if isinstance(value, bool) else value for value in values]
    read = ids(values)
    text = _without(pc.utf8_trim_whitespace(read.values), missing)
    place = pc.index_in(pc.utf8_lower(text), pa.array(list(meaning), pa.string()))
    bad = read.bad | (_mask(text.is_valid()) & _mask(place.is_null()))
    return Cells(pa.array(list(meaning.values()), kind).take(place), bad)


def _exact(value: Any) -> Any:
    """Return a value of JSON as an id: numbers as whole numbers, or as what no id can be."""
    if isinstance(value, JsonNumber):
        try:
            number = Decimal(value)
            whole = number.is_finite() and abs(number) < EXACT[pa.float64()] and number == int(number)
        except ArithmeticError:  # More digits, or a larger exponent, than a decimal number has.
            whole = False
        return str(int(number)) if whole else (None if value == "NaN" else [value])
    return [value] if isinstance(value, bool) else value


def _text(value: Any, decimal: str) -> str | None:
    if isinstance(value, JsonNumber):
        return str(value).replace(".", decimal)
    if isinstance(value, str):
        return value if value.isascii() or _is_unicode(value) else None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stored(values: pa.Array) -> pa.Array:
    """Return a column of an extension type as it is stored, but UUIDs as their text."""
    if not isinstance(values.type, pa.BaseExtensionType):
        return values
    is_uuid = isinstance(values.type, pa.UuidType)
    told = [None if value is None else str(value) for value in values.to_pylist()] if is_uuid else None
    return pa.array(told, pa.string()) if is_uuid else values.storage


def _native_texts(values: pa.Array) -> Cells:
    kind = values.type
    if pt.is_string(kind):
        try:
            values.validate(full=True)
            return _cells(values)
        except pa.ArrowInvalid:
            values = values.cast(pa.binary())
            kind = values.type
    if pt.is_binary(kind):
        told = [_decoded(value) for value in values.to_pylist()]
        found = pa.array(told, pa.string())
        return Cells(found, _mask(values.is_valid()) & _mask(found.is_null()))
    if pt.is_nested(kind) or pt.is_fixed_size_binary(kind):
        return Cells(pa.nulls(len(values), pa.string()), _mask(values.is_valid()))
    return _cells(values.cast(pa.string()))


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _native_ids(values: pa.Array) -> Cells:
    kind = values.type
    if pt.is_integer(kind):
        return _cells(values.cast(pa.string()))
    if pt.is_floating(kind):
        floats = values.cast(pa.float64())
        floats = pc.if_else(pc.is_nan(floats), pa.scalar(None, pa.float64()), floats)
        exact = pc.and_(pc.equal(pc.floor(floats), floats), pc.less(pc.abs(floats), EXACT[kind]))
        bad = _mask(pc.invert(exact))
        return Cells(_null_where(floats, bad).cast(pa.int64()).cast(pa.string()), bad)
    if pt.is_decimal(kind):
        told = [None if value is None or value != int(value) else str(int(value)) for value in values.to_pylist()]
        found = pa.array(told, pa.string())
        return Cells(found, _mask(values.is_valid()) & _mask(found.is_null()))
    return Cells(pa.nulls(len(values), pa.string()), _mask(values.is_valid()))


def _without(text: pa.Array, missing: Sequence[str]) -> pa.Array:
    gone = pc.is_in(text, pa.array(sorted({"", *missing}), pa.string()))
    return pc.if_else(gone, pa.scalar(None, pa.string()), text)


def _null_where(values: pa.Array, bad: NDArray[np.bool_]) -> pa.Array:
    return pc.if_else(pa.array(bad), pa.scalar(None, values.type), values) if bad.any() else values


def _cells(values: pa.Array) -> Cells:
    return Cells(values, np.zeros(len(values), dtype=bool))


def _mask(values: pa.Array) -> NDArray[np.bool_]:
    """Return a mask in which null is false."""
    return pc.fill_null(values, False).to_numpy(zero_copy_only=False).astype(bool)
