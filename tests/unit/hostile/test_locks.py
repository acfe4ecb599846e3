"""The dependency locks of the images agree with pyproject.toml; `make locks` updates them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[3]
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;\\]+)(?: ;.*)? \\$")


def locked(name: str) -> dict[str, str]:
    """Read a lock: package to version. Every entry must have a hash."""
    versions: dict[str, str] = {}
    for entry in re.split(r"\n(?=[A-Za-z0-9])", (PROJECT / "docker" / "locks" / f"{name}.txt").read_text()):
        first, _, rest = entry.partition("\n")
        if first.startswith("#"):
            continue
        match = PIN.match(first)
        assert match, f"{name}: {first}"
        assert "--hash=sha256:" in rest, f"{name}: {first}"
        versions[canonicalize_name(match.group(1))] = match.group(2)
    return versions


def group(name: str) -> list[str]:
    found: list[str] = []
    for entry in PYPROJECT["dependency-groups"][name]:
        found += group(entry["include-group"]) if isinstance(entry, dict) else [entry]
    return found


def jobs(*extras: str) -> list[str]:
    project = PYPROJECT["project"]
    return project["dependencies"] + [each for extra in extras for each in project["optional-dependencies"][extra]]


WANTED = {
    "build": group("build"),
    "airflow": group("airflow-image"),
    "spark": jobs(),
    "torch-cpu": jobs("cpu", "server"),
    "torch-cuda": jobs("cuda", "server"),
}


@pytest.mark.parametrize("name", WANTED)
def test_a_lock_has_what_the_project_asks_for(name: str) -> None:
    versions = locked(name)
    for text in WANTED[name]:
        requirement = Requirement(text)
        package = canonicalize_name(requirement.name)
        if (name, package) == ("torch-cuda", "faiss-cpu"):
            assert package not in versions, "faiss-gpu stands in its place"
            continue
        assert package in versions, f"{package}: run make locks"
        assert requirement.specifier.contains(versions[package], prereleases=True), f"{text}: run make locks"


def test_each_device_has_its_own_torch() -> None:
    assert locked("torch-cpu")["torch"].endswith("+cpu")
    assert "+" not in locked("torch-cuda")["torch"]
    assert any(package.startswith("nvidia-") for package in locked("torch-cuda"))
    assert not any(package.startswith("nvidia-") for package in locked("torch-cpu"))


def test_tests_run_the_kernels_with_the_triton_of_the_image() -> None:
    found = [text for text in jobs("dev") if Requirement(text).name == "triton"]
    assert [str(Requirement(text).specifier) for text in found] == [f"=={locked('torch-cuda')['triton']}"]


def test_one_version_of_what_the_images_exchange() -> None:
    """torch reads what Spark writes, and Airflow's client submits to the Spark of the jobs."""
    spark, torch, airflow = locked("spark"), locked("torch-cpu"), locked("airflow")
    for package in ("pyarrow", "pyspark", "numpy", "pandas"):
        assert spark[package] == torch[package]
    assert airflow["pyspark-client"] == spark["pyspark"]


def test_locks_name_no_index() -> None:
    for path in (PROJECT / "docker" / "locks").glob("*.txt"):
        assert "://" not in path.read_text(), path.name
        assert "--find-links" not in path.read_text(), path.name
