"""The device of a job: what is set on CUDA, and the warning about what no GPU has run yet."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crane_core.config import Runtime
from crane_core.errors import ConfigError
from jobs.commands import doctor
from jobs.ml import device

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch claim a CUDA device; nothing is computed on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("a_gpu")
def test_cuda_gives_the_same_bits_in_every_run_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert device.use_device(Runtime(device="cuda")) == torch.device("cuda", 0)
    assert torch.are_deterministic_algorithms_enabled()
    # The values that torch accepts for products under deterministic algorithms.
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    assert [record.getMessage() for record in caplog.records if device.UNPROVEN in record.getMessage()]


@pytest.mark.usefixtures("a_gpu")
def test_a_setting_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    device.use_device(Runtime(device="cuda"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_cpu_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    assert device.use_device(Runtime(device="cpu")) == torch.device("cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    assert not caplog.records


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        device.use_device(Runtime(device="cuda"))


def test_the_doctor_and_the_readme_say_what_no_gpu_has_run(tmp_path: Path) -> None:
    checks = {check["name"]: check for check in doctor.diagnose(str(tmp_path), Runtime(), deep=False)}
    readme = " ".join(README.read_text().split())
    assert device.UNPROVEN in checks["cuda"]["found"]
    assert device.UNPROVEN in readme
    assert ("not yet run on a GPU" in readme) == bool(device.UNPROVEN)
