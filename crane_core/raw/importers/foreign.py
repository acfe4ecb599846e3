"""Tell files of other formats by their first bytes, before they are read as text."""

from __future__ import annotations

import gzip
import shlex
import zlib
from collections.abc import Callable
from pathlib import Path

from crane_core.errors import DataError
from crane_core.raw.importers.account import one_of

_UNPACK = "Unpack it, or pack it with gzip, and name that file."
_TABLE = "Save it as CSV (UTF-8) or Parquet, and name that file."
_PICTURE = (
    "Leave it out of the mapping; crane encode RAW --modality NAME --model MODEL --pictures FOLDER makes features of "
    "the pictures of a folder."
)
_KINDS: dict[bytes, tuple[str, str]] = {
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "Unpack it, or save the sheet as CSV (UTF-8)."),
    b"\xd0\xcf\x11\xe0": ("an Excel workbook", "Save the sheet as CSV (UTF-8), and name that file."),
    b"BZh91AY&SY": ("packed with bzip2", _UNPACK),
    b"\xfd7zXZ\x00": ("packed with xz", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("packed with zstd", _UNPACK),
    b"SQLite format 3\x00": ("an SQLite database", _TABLE),
    b"\x89HDF\r\n": ("an HDF5 file", _TABLE),
    b"ARROW1\x00\x00": ("an Arrow file", _TABLE),
    b"\x93NUMPY": ("a .npy matrix", "Name it alone in a section of features, as a file that ends in .npy."),
    b"\xff\xd8\xff": ("a picture", _PICTURE),
    b"\x89PNG\r\n": ("a picture", _PICTURE),
}
_PAGE = ("a web page, not the file itself", "Download the file again: this is what a server answered instead.")
_TEXTS: dict[bytes, tuple[str, str]] = {
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
    b"<?xml": ("an XML file", _TABLE),
    b"version https://git-lfs": ("a pointer of Git LFS", "Fetch the file itself with git lfs pull."),
}
"""Beginnings of files of text, in lower case."""
_PARQUET = b"PAR1"
GZIP = b"\x1f\x8b"


def foreign_kind(path: Path) -> tuple[str, str] | None:
    """Return what a file is, and what to do, if its first bytes tell another format than text; None otherwise.

    Of a file that is packed with gzip the first bytes within it count.
    """
    with path.open("rb") as file:
        start = file.read(32)
        is_parquet = start.startswith(_PARQUET) and file.seek(-4, 2) >= 0 and file.read() == _PARQUET
    if is_parquet:
        return "a Parquet file", ""
    if path.suffix.lower() == ".npz":
        return "an archive of arrays", "Save one array with numpy.save, in a file that ends in .npy, and name that."
    if not start.startswith(GZIP):
        return _kind_of(start)
    try:
        with gzip.open(path, "rb") as packed:
            start = packed.read(32)
    except (OSError, EOFError, zlib.error):
        return None
    if start.startswith(GZIP):
        return "packed with gzip twice", unpacking(path, path.name)
    found = ("a Parquet file", "") if start.startswith(_PARQUET) else _kind_of(start)
    return (f"{found[0]}, packed with gzip", f"{unpacking(path)} {found[1]}".rstrip()) if found else None


def unpacking(path: Path, name: str | None = None) -> str:
    """Return how to unpack a file; by default its new name has no ending of a packed one."""
    new = path.with_name(f"unpacked-{name or path.name.removesuffix('.gz')}")
    return (
        f"Unpack it, and take the new file in its place: gunzip < {shlex.quote(str(path))} > {shlex.quote(str(new))}."
    )


def _kind_of(start: bytes) -> tuple[str, str] | None:
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    kinds = [kind for mark, kind in _KINDS.items() if start.startswith(mark)]
    return next(iter(kinds + [kind for mark, kind in _TEXTS.items() if text.startswith(mark)]), None)


def check_unpacked(path: Path) -> None:
    """Refuse a Parquet file or a matrix that is packed with gzip.

    Raises:
        DataError: it is.
        OSError: it cannot be read.
    """
    if is_packed(path):
        raise DataError(
            f"{path} ({path.stat().st_size} bytes) is packed with gzip, which only text files may be.",
            unpacking(path),
        )


def is_packed(path: Path) -> bool:
    """Return whether a file is packed with gzip."""
    with path.open("rb") as file:
        return file.read(2) == GZIP


def check_text(path: Path, way: Callable[[str], str]) -> None:
    """Refuse a file that is no text.

    Args:
        path: the file.
        way: of an account, which puts a remedy into words.

    Raises:
        DataError: it is of another format.
        OSError: it cannot be read.
    """
    found = foreign_kind(path)
    if found:
        what, remedy = found
        ways = [remedy.removesuffix(".") or way("set {}.format: parquet")]
        raise DataError(f"{path} ({path.stat().st_size} bytes) is {what}.", one_of(ways))
