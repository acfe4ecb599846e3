"""The import contract of the packages finds an import that goes the wrong way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_planted_import_the_wrong_way_is_found(tmp_path: Path) -> None:
    for package in ("crane_core", "jobs"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "crane_core" / "raw" / "files.py").open("a") as file:
        file.write("\nfrom crane_core.dataset import interactions  # noqa\n")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "crane_core.raw is not allowed to import crane_core.dataset" in done.stdout
    assert "1 broken" in done.stdout
