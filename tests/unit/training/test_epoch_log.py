"""The log line of a long epoch."""

import logging
from types import SimpleNamespace

import pytest

from crane_core.training import epoch_log
from crane_core.training.epoch_log import EpochLog


def test_a_line_tells_the_rate_the_loss_the_memory_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = iter([0.0, 3.0, 10.0])
    monkeypatch.setattr(epoch_log, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(epoch_log, "resident_bytes", lambda: 1_500_000_000)
    log = EpochLog(2, 5, 300)
    with caplog.at_level(logging.INFO):
        for step in (1, 2):
            log.count(step, 64, 1.5)
    # 2 x 64 rows in 10 seconds; 180 of 300 are left.
    assert caplog.messages == ["train epoch=2 step=2 total=5 loss=0.7500 rate=13/s memory=1.50GB epoch_left=14s"]
