"""The bench for a GPU: its rehearsal, what it needs, and what is left of a part that fails or takes too long."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench.gpu import ceilings
from tests.bench.gpu.driver import Part, Settings, run_all, run_part
from tests.bench.gpu.parts import PARTS
from tests.bench.gpu.plan import Plan, Row, compared
from tests.bench.gpu.report import write

ROOT = Path(__file__).parents[2]
MOST_CPU_SECONDS = 60
COMPUTE = ("numerics", "dataset", "refine", "graph", "model", "training", "evaluation")
"""Packages of `crane_core` that compute; but for `evaluation.live`, which reads exports."""
ABSENT = ("faiss", "mlflow", "pyspark", "airflow", "boto3", "pandas", "sklearn", "matplotlib", "optuna", "jinja2")
BLOCK = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {ABSENT!r} else find(name, path, target)
PathFinder.find_spec = find_spec
"""
"""Makes a Python find none of the packages `ABSENT`."""
IMPORT = f"""
import importlib, pkgutil
for package in {COMPUTE!r}:
    folder = importlib.import_module("crane_core." + package).__path__
    for module in pkgutil.iter_modules(folder):
        if module.name not in ("attention_triton", "maxima_triton", "live"):
            importlib.import_module(f"crane_core.{{package}}.{{module.name}}")
import tests.bench.gpu.parts
"""


def rehearse(out: Path, *flags: str, before: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Rehearse the bench; `before` is a folder at the front of the module path."""
    places = [str(before)] if before else []
    path = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "tests/bench/gpu.sh"), "--rehearse", "--out", str(out), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def block(folder: Path) -> Path:
    """Let a Python that is started with this folder find none of the packages `ABSENT`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCK)
    return folder


def test_what_computes_is_imported_without_faiss_mlflow_spark_or_airflow() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", BLOCK + IMPORT], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ended.returncode == 0, ended.stderr
    blocked = subprocess.run(
        [sys.executable, "-c", BLOCK + "import faiss"], capture_output=True, text=True, check=False
    )
    assert "No module named 'faiss'" in blocked.stderr


@pytest.mark.slow
def test_the_rehearsal_runs_every_part_without_what_a_gpu_machine_lacks(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton's interpreter rehearses the kernels: make setup installs it")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = rehearse(tmp_path / "out", before=block(tmp_path / "absent"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [(part["name"], part["status"]) for part in result["parts"]] == [
        ("start", "ok"),
        *((part.name, "ok") for part in PARTS),
    ]
    rows = {part["name"]: part["rows"] for part in result["parts"]}
    assert all(rows.values())
    # Nothing is left out but what needs faiss, and PyTorch's kernels that are for GPUs only.
    reasons = {name: [row["skipped"] for row in part if "skipped" in row] for name, part in rows.items()}
    assert {name for name, found in reasons.items() if found} == {"faiss", "joint", "forms"}
    assert all("scaled_dot_product_attention" in reason or "fused kernels" in reason for reason in reasons["forms"])
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert all(row["what"] in table for part in rows.values() for row in part)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MOST_CPU_SECONDS


@pytest.mark.slow
def test_the_parts_that_need_faiss_are_rehearsed_with_it(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton's interpreter rehearses the kernels: make setup installs it")
    ended = rehearse(tmp_path, "--only", "joint", "faiss")
    assert ended.returncode == 0, ended.stderr[-3000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [part["name"] for part in parts] == ["start", "joint", "faiss"]
    assert not [row for part in parts for row in part["rows"] if "skipped" in row]


@pytest.fixture(autouse=True)
def algorithms() -> Iterator[None]:
    """Give back the choice of algorithms that the driver makes for its parts."""
    yield
    torch.use_deterministic_algorithms(False)


def settings(folder: Path) -> Settings:
    return Settings("cpu", 1, folder)


def good(plan: Plan) -> Iterator[Row]:
    yield compared("good", 0.0, 0.0)


def wrong(plan: Plan) -> Iterator[Row]:
    yield compared("not a number", float("nan"), 1.0)
    yield compared("good", 0.0, 0.0)


def failing(plan: Plan) -> Iterator[Row]:
    yield compared("good", 0.0, 0.0)
    raise RuntimeError("no kernel image")


def crashing(plan: Plan) -> Iterator[Row]:
    yield compared("good", 0.0, 0.0)
    os.kill(os.getpid(), signal.SIGKILL)


def endless(plan: Plan) -> Iterator[Row]:
    yield compared("good", 0.0, 0.0)
    time.sleep(600)


@pytest.mark.parametrize(
    ("run", "status", "num_rows"),
    [(good, "ok", 1), (wrong, "wrong", 2), (failing, "failed", 1), (crashing, "failed", 1), (endless, "timed out", 1)],
)
def test_what_a_part_has_found_stays_however_it_ends(run: Any, status: str, num_rows: int, tmp_path: Path) -> None:
    result = run_part(Part("part", 60, run), settings(tmp_path), 8.0, {})
    assert (result["status"], len(result["rows"])) == (status, num_rows)
    assert result["seconds"] < 30


def test_a_part_can_be_started_without_a_fork(tmp_path: Path) -> None:
    result = run_part(Part("ceilings", 60, ceilings.run), settings(tmp_path), 300.0, {}, "spawn")
    assert result["status"] == "ok"
    assert {row["ceiling"] for row in result["rows"]} == {"bfloat16", "tf32", "float32", "bandwidth"}


def test_results_are_written_before_the_next_part_begins(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def done(results: list[dict[str, Any]]) -> None:
        write({"card": "none", "parts": results}, tmp_path)
        written = json.loads((tmp_path / "gpu.json").read_text())
        seen.append([f"{part['name']} {part['status']}" for part in written["parts"]])

    run_all([Part("a", 60, wrong), Part("b", 60, good)], settings(tmp_path), 60.0, done)
    assert seen[0] == ["start ok", "a wrong"]
    assert seen[-1] == ["start ok", "a wrong", "b ok"]
    assert "**WRONG**" in (tmp_path / "gpu.md").read_text()


def test_no_part_begins_when_the_time_is_up(tmp_path: Path) -> None:
    results = run_all([Part("a", 60, good)], settings(tmp_path), 0.1, lambda results: None)
    assert [(result["name"], result["status"]) for result in results] == [("start", "ok"), ("a", "no time left")]


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="gpu.sh asks for Triton first")
    ended = rehearse(tmp_path, "--only", "nothing")
    assert ended.returncode == 2
    assert "no part nothing: choose among attention" in ended.stderr
