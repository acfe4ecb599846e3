"""How the files of a section are written, and the rows that are read from them."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from crane_core.raw.importers.account import place
from crane_core.raw.importers.foreign import is_packed
from crane_core.section import Section

CHUNK_ROWS = 65_536
SUFFIXES: dict[str, Literal["csv", "tsv", "json", "jsonl", "parquet"]] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
NO_QUOTE = "none"
_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


class Layout(Section):
    """Files of rows, and how they are written."""

    files: tuple[str, ...] = Field((), min_length=1)
    """Patterns, relative to the mapping file or absolute."""
    format: Literal["csv", "tsv", "json", "jsonl", "parquet"] | None = None
    """Format of the files; by default told by their names. `json` and `jsonl` are one array of objects, or an object a
    line."""
    separator: str | None = Field(None, min_length=1)
    """What separates values: by default a comma in CSV and a tab in TSV. It may be longer, as `::`, without quotes."""
    quote: str | None = None
    """The quote around values, or `none` where quotes are ordinary characters: by default `"` in CSV, `none` in TSV."""
    escape: str | None = Field(None, min_length=1, max_length=1)
    """Character before a quote inside quotes, such as a backslash; by default such a quote is doubled. It also stands
    before itself and, outside quotes, before a separator; before any other character it is an ordinary one."""
    multiline: bool = False
    """Take quoted values over several lines for text even where most of these lines look like rows. By default that
    is taken for a stray quote, and the import stops."""
    header: bool = True
    """Whether the first line names the columns. Without it a column is its position: `{user_id: 1, item_id: 2}`."""
    encoding: str = "utf-8"
    """Encoding of text files, such as `latin-1`, `cp1252` or `utf-16-le`; a byte order mark tells UTF-8, 16 and 32."""
    missing: tuple[str, ...] | None = None
    """Words that stand for no value, in every column. By default NA, null and the like, but not in ids and text."""
    decimal: Literal[".", ","] = "."
    """The decimal separator of numbers."""
    thousands: Literal[",", ".", " ", "'", "_"] | None = None
    """What separates groups of three digits, as in `1,234.5`; by default such a number does not fit."""
    numeric: tuple[Literal["user_id", "item_id"], ...] = ()
    """Ids that are whole numbers, so that 7, 007 and 7.0 are the same one. By default text is taken as it stands."""
    max_set_aside: float = Field(0.0, ge=0, le=1)
    """Share of the rows that may be left out, with a reason, because a value does not fit."""

    @field_validator("encoding")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            "".encode(name)
        except (LookupError, ValueError) as error:
            raise ValueError("not an encoding that Python knows, such as utf-8, latin-1 or cp1252") from error
        return name

    @field_validator("quote")
    @classmethod
    def _one_character(cls, quote: str | None) -> str | None:
        if quote is not None and quote != NO_QUOTE and len(quote) != 1:
            raise ValueError("one character or none")
        return quote

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        marks = [mark for mark in (self.separator, self.given_quote, self.escape) if mark]
        if len(set(marks)) != len(marks) or set("\r\n") & set("".join(marks)):
            raise ValueError("separator, quote and escape must differ and be no line breaks")
        if self.thousands == self.decimal:
            raise ValueError("decimal and thousands must differ")
        if (self.given_quote or self.escape) and len(self.separator or ",") > 1:
            raise ValueError(f"a separator of several characters goes with quote: {NO_QUOTE} and without escape")
        return self

    @property
    def given_quote(self) -> str | None:
        """The quote that the layout names, None where quotes are ordinary characters."""
        return None if self.quote == NO_QUOTE else self.quote

    def quote_of(self, kind: str) -> str | None:
        """Return the quote of files of a format, None where quotes are ordinary characters."""
        if self.quote:
            return self.given_quote
        return '"' if kind == "csv" and len(self.separator or ",") == 1 and self.separator != '"' else None


class JsonNumber(str):
    """A number of a JSON file with a point or an exponent, as it is written."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file.

    Attributes:
        path: the file.
        columns: column of the file to its values: an Arrow array, or a list of text and of what JSON holds.
        lines: line of each row; in a Parquet file or an array of JSON its number, from 1.
        unit: `line`, `row` or `object`.
    """

    path: Path
    columns: Mapping[str | int, pa.Array | list[Any]]
    lines: Sequence[int]
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int, column: str | int) -> str:
        """Return where a value is, and the value."""
        return place(self.path, self.lines[row], str(column), plain(self.columns[column][row]), self.unit)


def plain(value: Any) -> Any:
    """Return a value of a column as Python shows it, whatever it is."""
    try:
        return value.as_py() if isinstance(value, pa.Scalar) else value
    except UnicodeDecodeError:
        is_text = isinstance(value, pa.StringScalar)
        return value.as_buffer().to_pybytes().decode(errors="replace") if is_text else "text that is not UTF-8"
    except (ValueError, OverflowError):
        return f"{value.type} outside the years 1 to 9999"


def file_format(path: Path) -> str | None:
    """Return the format that the name of a file tells, without the suffix of a compression; None for others."""
    return SUFFIXES.get(Path(path.name.removesuffix(".gz")).suffix.lower())


@contextmanager
def open_text(path: Path, encoding: str, newline: str | None) -> Iterator[IO[str]]:
    """Open a text file, unpacked where it is packed with gzip.

    A byte order mark tells the encoding, whatever is declared. Bytes that are none of the encoding become lone
    surrogates, so that the value which holds them is found.
    """
    packed = is_packed(path)
    with gzip.open(path, "rb") if packed else path.open("rb") as file:
        start = file.read(4)
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), encoding)
    opened = gzip.open if packed else open
    with opened(path, "rt", encoding=encoding, errors="surrogateescape", newline=newline) as text:
        yield text
