"""Progress of a long command on stderr: its steps and the log lines of its jobs."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import sys
import time
from pathlib import Path

from crane_core.errors import CraneError, UnexpectedError, error_from

JOB_LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (?P<level>[A-Z]+) (?P<logger>\S+) (?P<message>.*)$")
WIDTH = 200


class Steps:
    """Lines on stderr, each with the seconds since the command started."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def show(self, what: str, text: str) -> None:
        """Print one step: its subject and what happens."""
        print(f"{self.seconds:7.1f}s  {what:<14} {text}", file=sys.stderr, flush=True)

    def job_line(self, what: str, line: str) -> None:
        """Print a line of a job's log; other lines, such as a traceback, stay in the log file."""
        match = JOB_LINE.match(line)
        if match is None:
            return
        message = match["message"]
        self.show(what, message if len(message) <= WIDTH else f"{message[:WIDTH]} ...")


def failure_in(line: str) -> CraneError | None:
    """Return the error in the JSON line that a failed job prints last; None for any other line."""
    with contextlib.suppress(ValueError):
        data = json.loads(line)
        return error_from(data) if isinstance(data, dict) else None
    return None


def ended(what: str, error: CraneError, log: Path) -> CraneError:
    """Return an error with what it has ended; the remedy of an unexpected one also names the log file."""
    again = copy.copy(error)
    again.found = f"{what}: {error.found}"
    if isinstance(error, UnexpectedError):
        again.remedy = f"{error.remedy} The log is {log}."
    return again
