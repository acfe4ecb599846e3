"""Peak memory of a job."""

from __future__ import annotations

import os
import subprocess
import sys

from jobs.usage import peak_bytes


def test_peak_memory_counts_live_children() -> None:
    before = peak_bytes()
    hog = subprocess.Popen(
        [sys.executable, "-c", "x = bytearray(300 << 20); print(1, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert hog.stdout is not None and hog.stdout.readline()
    during = peak_bytes()
    hog.communicate(b"\n")
    assert during > (300 << 20) and during >= before and os.getpid() > 0
