"""Cost of RCA: the power law, the errors of the forms, and measurements that are taken once."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from crane_core.config import Phi
from crane_core.experiments.cost import Measurements, SameWeights, catalog_sizes, fit_power_law, measure_growth
from crane_core.experiments.data import Dataset
from crane_core.experiments.report import render
from crane_core.experiments.trials import Trials
from tests.worlds.experiments import RECIPE, study


class TestCost:
    @pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
    def test_a_known_power_law(self, exponent: float) -> None:
        sizes = [1000, 2000, 4000, 8000]
        law = fit_power_law(sizes, [3e-6 * size**exponent for size in sizes])
        assert law is not None
        assert law.exponent == pytest.approx(exponent) and law.constant == pytest.approx(3e-6)
        assert law.r_squared == pytest.approx(1)

    def test_noise_shows_in_the_fit_and_too_little_is_none(self) -> None:
        generator = np.random.default_rng(0)
        sizes = np.geomspace(1000, 64000, 7)
        law = fit_power_law(sizes, sizes**1.5 * np.exp(0.2 * generator.normal(size=7)))
        assert law is not None and law.exponent == pytest.approx(1.5, abs=0.15) and 0.9 < law.r_squared < 1
        assert fit_power_law([1, 2, 4], [1.0, 0.0, 2.0]) is None

    def test_sizes_reach_beyond_the_catalog(self) -> None:
        assert catalog_sizes(7050) == [1024, 2048, 4096, 8192, 16384, 32768]
        assert catalog_sizes(10) == [1024, 2048, 4096, 8192, 16384]

    def test_linear_takes_less_than_softmax(self) -> None:
        linear, softmax = (measure_growth(phi, 3000, 2, RECIPE)["seconds"] for phi in ("linear", "softmax"))
        assert linear < softmax

    def test_exact_forms_err_by_rounding_alone(self, dataset: Dataset) -> None:
        weights = SameWeights(dataset, RECIPE)
        for phi in ("softmax", "tanh", "linear"):
            found = weights.measure(phi)
            assert found["against"] == phi and found["error"] < 1e-4 and found["rows"] == 72

    def test_a_form_that_forgets_shows_its_error(self, dataset: Dataset, monkeypatch) -> None:
        weights = SameWeights(dataset, RECIPE)
        monkeypatch.setattr("crane_core.experiments.cost.EXACT", ("softmax",))
        found = weights.measure("linear")
        assert found["against"] == "softmax" and found["error"] > 0.01


class TestMeasurements:
    @pytest.mark.slow
    def test_forms_and_growth_are_measured_once(self, dataset: Dataset, tmp_path: Path, trainings, monkeypatch) -> None:
        sizes = [64, 128, 256]
        monkeypatch.setattr("crane_core.experiments.study.catalog_sizes", lambda _: sizes)
        monkeypatch.setattr("crane_core.experiments.cost.os.getloadavg", lambda: (7.5, 1.0, 1.0))
        monkeypatch.setattr("crane_core.experiments.cost.os.cpu_count", lambda: 2)
        first = study(dataset, tmp_path).run(["phi", "cost"], 0)
        again = study(dataset, tmp_path).run(["phi", "cost"], 0)
        assert first == again and first["missing"] == []
        growth, forms = first["experiments"]["cost"], first["experiments"]["phi"]["forms"]
        for phi in get_args(Phi):
            assert [point["items"] for point in growth["points"][phi]] == sizes
            assert growth["laws"][phi]["seconds"]["exponent"] == pytest.approx(
                fit_power_law(sizes, [point["seconds"] for point in growth["points"][phi]]).exponent
            )
        assert growth["answer"].startswith("Time grows for softmax as items^")
        assert [form["phi"] for form in forms] == list(get_args(Phi))
        page = render(first | {"seconds": 1.0})
        assert growth["answer"] in page and "Exponent of time" in page and "softmax in float64" in page
        assert page.count("load 7.5 on 2 cores") == 2

    @pytest.mark.parametrize("damaged", [b"", b"{", b"[1]", b"{}", b"\xff"])
    def test_a_damaged_measurement_is_named_and_taken_again(self, tmp_path: Path, caplog, damaged: bytes) -> None:
        measurements = Measurements(Trials(tmp_path))
        first = measurements.take(lambda: {"seconds": 1.0}, "x")
        (path,) = tmp_path.glob("measurements/*.json")
        path.write_bytes(damaged)
        assert measurements.find("x") is None and f"damaged measurement={path}" in caplog.text
        assert measurements.take(lambda: {"seconds": 2.0}, "x")["seconds"] == 2.0
        assert measurements.find("x")["cores"] == first["cores"]
