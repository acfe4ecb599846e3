"""The spread of profile norms by hand."""

import logging

import numpy as np
import pytest

from crane_core.dataset.modalities import Modality, profile_spreads


def test_the_spread_of_profiles_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    # Norms 10^0 to 10^4 in hundredths: the percentiles are 10^0.2 and 10^3.8. Users without the modality do not count.
    norms = np.append(10.0 ** np.linspace(0, 4, 401), [0.0, 0.0])
    profiles = (norms[:, None] * np.array([0.6, -0.8])).astype(np.float32)
    counts = (norms > 0).astype(np.int32)

    def modality(name: str, rows: np.ndarray, counts: np.ndarray) -> Modality:
        return Modality(name, np.ones((1, 2), dtype=np.float32), np.ones(1, dtype=bool), rows, counts)

    with caplog.at_level(logging.WARNING):
        found = profile_spreads(
            [
                modality("wide", profiles, counts),
                modality("narrow", np.ones((9, 2), dtype=np.float32), np.ones(9, dtype=np.int32)),
                modality("nobody", profiles, 0 * counts),
            ]
        )
    assert found == pytest.approx({"wide": 3.6, "narrow": 0.0, "nobody": 0.0}, abs=1e-4)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("profiles_spread modality=wide orders_of_magnitude=3.6")
