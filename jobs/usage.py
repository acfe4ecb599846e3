"""Seconds and peak memory of a job."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path
from typing import Any


class Usage:
    """Seconds since this was made, and the peak memory of the process."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds so far, to the millisecond."""
        return round(time.monotonic() - self._started, 3)

    def entry(self) -> dict[str, Any]:
        """`seconds` and `peak_bytes`, as the run record and manifests keep them."""
        return {"seconds": self.seconds, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Return the peak memory of this process and of its live and ended children (the Spark JVM, training ranks)."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    live = 0
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{child}/status").read_text()
                live += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
    return 1024 * (kilobytes + max(ended, live))
