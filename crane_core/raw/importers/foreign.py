"""Tell files of other formats by their first bytes, before they are read as text."""

from __future__ import annotations

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
_PARQUET = b"PAR1"


def foreign_kind(path: Path) -> tuple[str, str] | None:
    """Return what a file is, and what to do, if its first bytes tell another format than text; None otherwise."""
    with path.open("rb") as file:
        start = file.read(16)
        if start.startswith(_PARQUET):
            file.seek(-4, 2)
            if file.read() == _PARQUET:
                return "a Parquet file", ""
    if path.suffix.lower() == ".npz":
        return "an archive of arrays", "Save one array with numpy.save, in a file that ends in .npy, and name that."
    return next((kind for mark, kind in _KINDS.items() if start.startswith(mark)), None)


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
