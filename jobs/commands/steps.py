"""Show a person what is going on: the steps of a long command, and the lines of the jobs it runs."""

from __future__ import annotations

import re
import sys
import time

JOB_LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (?P<level>[A-Z]+) (?P<logger>\S+) (?P<message>.*)$")
WIDTH = 200


class Steps:
    """Lines on stderr, each with the seconds since the command started."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.failure = ""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def show(self, what: str, text: str) -> None:
        """One step: what it is about and what happens."""
        print(f"{self.seconds:7.1f}s  {what:<14} {text}", file=sys.stderr, flush=True)

    def job_line(self, what: str, line: str) -> None:
        """A line of a job's log; anything that is no log line (a traceback) stays in the log file."""
        match = JOB_LINE.match(line)
        if match is None:
            return
        message = match["message"]
        if match["level"] == "ERROR":
            self.failure = message
        self.show(what, message if len(message) <= WIDTH else f"{message[:WIDTH]} ...")


def split_failure(message: str) -> tuple[str, str]:
    """What was found and its remedy, out of a job's line `failed stage= error= message=... Remedy: ...`."""
    found, _, remedy = message.partition(" Remedy: ")
    return found.partition("message=")[2] or found, remedy
