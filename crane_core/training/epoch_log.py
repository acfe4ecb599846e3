"""Log how an epoch goes, every few seconds."""

from __future__ import annotations

import logging
import time

from crane_core.progress import LOG_SECONDS, resident_bytes

logger = logging.getLogger(__name__)


class EpochLog:
    """Counts the interactions of an epoch and logs a line every few seconds.

    Args:
        epoch: its number.
        num_steps, num_rows: steps and interactions of the whole epoch.
    """

    def __init__(self, epoch: int, num_steps: int, num_rows: int) -> None:
        self._epoch = epoch
        self._num_steps = num_steps
        self._num_rows = num_rows
        self._logged, self._rows = time.monotonic(), 0

    def count(self, step: int, num_rows: int, loss: float) -> None:
        """Count a step; log rows per second, mean loss, resident memory and seconds left where it is time.

        Args:
            step: steps done in this epoch.
            num_rows: interactions of this step.
            loss: summed over the steps done.
        """
        now = time.monotonic()
        self._rows += num_rows
        if now - self._logged < LOG_SECONDS:
            return
        rate = self._rows / (now - self._logged)
        self._logged, self._rows = now, 0
        logger.info(
            "train epoch=%d step=%d total=%d loss=%.4f rate=%.0f/s memory=%.2fGB epoch_left=%.0fs",
            self._epoch,
            step,
            self._num_steps,
            loss / step,
            rate,
            resident_bytes() / 1e9,
            self._num_rows * (1 - step / self._num_steps) / rate,
        )
