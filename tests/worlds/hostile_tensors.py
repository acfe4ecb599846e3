"""Safetensors files whose headers lie about their data, and how to write more of them."""

from __future__ import annotations

import json
import struct
from typing import Any

TEN_GB = 10 * 1024**3


def header(**tensors: Any) -> bytes:
    """Encode the header of a safetensors file."""
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def huge(**changes: Any) -> dict[str, Any]:
    """Describe a tensor of ten gigabytes, with some fields changed."""
    return {"dtype": "F32", "shape": [TEN_GB // 4], "data_offsets": [0, TEN_GB]} | changes


HOSTILE_TENSORS = {
    "ten gigabytes in one kilobyte": header(rows=huge()).ljust(1024, b"\0"),
    "ten gigabytes of no bytes": header(rows=huge(data_offsets=[0, 0])),
    "a shape that overflows": header(rows=huge(shape=[2**33, 2**33], data_offsets=[0, 0])),
    "a negative shape": header(rows=huge(shape=[-1, -8], data_offsets=[0, 32])) + bytes(32),
    "a header of ten gigabytes": struct.pack("<Q", TEN_GB) + b"{}",
    "no header": b"\x01",
    "nothing": b"",
    "an unknown type": header(rows=huge(dtype="PICKLE", shape=[1], data_offsets=[0, 4])) + bytes(4),
    "offsets of text": header(rows=huge(data_offsets=["0", "4"], shape=[1])) + bytes(4),
    "a tensor that is a list": header(rows=[1, 2]),
    "a header that is a list": struct.pack("<Q", 2) + b"[]",
    "a header without end": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "overlapping tensors": header(a=huge(shape=[2], data_offsets=[0, 8]), b=huge(shape=[2], data_offsets=[4, 12]))
    + bytes(12),
    "trailing bytes": header(a=huge(shape=[1], data_offsets=[0, 4])) + bytes(400),
}
