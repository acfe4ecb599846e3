"""Warn of unit tests that are not marked slow and are not cheap: `make check` runs all of those."""

from __future__ import annotations

import resource
import warnings
from collections.abc import Generator

import pytest

FAST_SECONDS = 6.0
"""Processor seconds of a test and its child processes, twice what the longest fast test takes on an idle machine."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Warn of a test that is not marked slow and takes more processor time than `FAST_SECONDS`."""
    before = _processor_seconds()
    result = yield
    used = _processor_seconds() - before
    if used > FAST_SECONDS and item.get_closest_marker("slow") is None:
        message = f"{item.name} took {used:.1f} s of processor time: make it cheaper, or mark it slow"
        warnings.warn(pytest.PytestWarning(message), stacklevel=1)
    return result


def _processor_seconds() -> float:
    own, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
