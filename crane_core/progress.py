"""Progress of long work: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")

LOG_SECONDS = 5.0


def track(items: Iterable[Item], total: int, event: str, logger: logging.Logger) -> Iterator[Item]:
    """Yield the items and show how far the work is.

    Args:
        items: to iterate over.
        total: their number.
        event: name of the work in bar and log.
        logger: gets `event done= total= rate= left=` lines when stderr is no terminal.
    """
    if sys.stderr.isatty():
        columns = (TextColumn(event), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, *times, console=Console(stderr=True), transient=True) as bar:
            yield from bar.track(items, total=total)
        return
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= LOG_SECONDS:
            last = now
            rate = done / (now - started)
            logger.info("%s done=%d total=%d rate=%.1f/s left=%.0fs", event, done, total, rate, (total - done) / rate)


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes; 0 where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
