"""Load pictures of items, in bounded memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats that Pillow may open, whatever the suffix of a file: for PostScript it would start a program."""
PIXELS = 32_000_000
"""Pixels of the pictures in memory: no further picture is read once there are as many."""


def take_pictures(items: Iterator[tuple[str, Any]], most: int) -> list[tuple[str, Any]]:
    """Take the next pictures, at most as many as memory may hold at once."""
    some: list[tuple[str, Any]] = []
    pixels = 0
    # The size of the next picture is not known before it is read; Pillow limits what it can add.
    while len(some) < most and pixels < PIXELS and (item := next(items, None)) is not None:
        some.append(item)
        pixels += item[1].width * item[1].height
    return some


def load_picture(folder: Path, names: Iterable[str]) -> tuple[Image.Image | None, str]:
    """Load the first picture that exists among some names in a folder, in RGB, or return None and the reason."""
    try:
        path = next((path for name in names if (path := folder / name).is_file()), None)
    except OSError:  # The path is too long for the file system.
        path = None
    if path is None:
        return None, "no_picture"
    if not path.resolve().is_relative_to(folder.resolve()):
        return None, "outside_folder"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=PICTURE_FORMATS) as image:
                return image.convert("RGB"), ""
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None, "broken_picture"
