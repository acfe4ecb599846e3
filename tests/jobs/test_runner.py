"""The frame around every job: skipping, racing, failing, dying."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crane_core.errors import (
    EXIT_ARTIFACT,
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_OK,
    EXIT_UNEXPECTED,
    ArtifactError,
    ConfigError,
    DataError,
)
from jobs.runner import Job, Result, run_stage
from jobs.stores import open_store
from tests.worlds.jobs import flags, last_line, write_raw, write_rows
from tests.worlds.raw_data import write_items


@pytest.mark.parametrize("where", ["local", "s3"])
def test_second_run_finds_what_the_first_made(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "store") if where == "local" else request.getfixturevalue("s3_uri")
    assert run_stage("etl.interactions", write_rows, argv=flags(store)) == EXIT_OK
    made = last_line(capsys)
    assert (made["status"], made["stage"], made["run"]) == ("done", "etl.interactions", "r")

    def fail(job: Job) -> Result:
        raise AssertionError("worked twice")

    assert run_stage("etl.interactions", fail, argv=flags(store, run="r2")) == EXIT_OK
    found = last_line(capsys)
    assert (found["status"], found["content"]) == ("found", made["content"])
    artifact = open_store(store).artifact("r2", "etl.interactions")
    assert artifact.file("rows.txt").read_text() == "rows"
    assert artifact.manifest["peak_bytes"] > 0 and artifact.manifest["config"]["etl"]["split"] == "temporal"


def test_changed_input_or_source_is_never_served_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(job: Job) -> Result:
        (job.out / "rows.txt").write_text(version)
        return Result({"given": job.input("etl.interactions").facts if job.stage.inputs(job.config) else {}})

    raw = tmp_path / "raw"
    write_raw(raw)
    argv = flags(tmp_path / "store", "--set", f"runtime.raw={raw}")
    seen = []
    for version in ("one", "one", "two"):
        if version == "two":
            write_items(raw, [("i", "Another title")])
        assert run_stage("etl.interactions", work, argv) == EXIT_OK
        upstream = last_line(capsys)["status"]
        assert run_stage("etl.features", work, argv) == EXIT_OK
        seen.append((upstream, last_line(capsys)["status"]))
    assert seen == [("done", "done"), ("found", "found"), ("done", "done")]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a", "b"), EXIT_CONFIG),
        (DataError("a", "b"), EXIT_DATA),
        (ArtifactError("a", "b"), EXIT_ARTIFACT),
        (ZeroDivisionError(), EXIT_UNEXPECTED),
    ],
)
def test_errors_become_exit_codes_and_leave_no_trace(
    tmp_path: Path, error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(job: Job) -> Result:
        (job.out / "rows.txt").write_text("half")
        raise error

    assert run_stage("etl.interactions", fail, argv=flags(tmp_path)) == code
    output = capsys.readouterr()
    told = json.loads(output.out)
    assert list(told) == ["stage", "error", "found", "remedy"]
    assert (told["stage"], told["error"]) == ("etl.interactions", type(error).__name__)
    (line,) = (each for each in output.err.splitlines() if " ERROR " in each)
    assert f"failed stage=etl.interactions error={type(error).__name__} message={told['found']}" in line
    assert ("Traceback" in output.err) == (code == EXIT_UNEXPECTED)
    assert not list(tmp_path.glob("etl.interactions/*"))
    assert open_store(str(tmp_path)).entry("r", "etl.interactions") is None
    assert run_stage("etl.interactions", write_rows, argv=flags(tmp_path)) == EXIT_OK
    assert open_store(str(tmp_path)).artifact("r", "etl.interactions").file("rows.txt").read_text() == "rows"


def test_missing_and_damaged_inputs_exit_with_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("etl.features", write_rows, argv=flags(tmp_path)) == EXIT_ARTIFACT
    assert "has no artifact of etl.interactions" in capsys.readouterr().err
    run_stage("etl.interactions", write_rows, argv=flags(tmp_path))
    open_store(str(tmp_path)).artifact("r", "etl.interactions").file("rows.txt").write_text("x")
    assert run_stage("etl.features", write_rows, argv=flags(tmp_path)) == EXIT_ARTIFACT
    assert "rows.txt is damaged: expected 4 bytes, found 1 bytes" in capsys.readouterr().err


RACER = """
import sys, time
from pathlib import Path
from jobs.runner import Result, run_stage
def work(job):
    with open(sys.argv[1], "a") as log:
        log.write("worked\\n")
    (job.work / "mark").write_text("kept")
    for n in range(50):
        (job.out / f"{n}.txt").write_text(str(n))
        time.sleep(float(sys.argv[2]))
    return Result({"n": 50})
raise SystemExit(run_stage("etl.interactions", work, argv=sys.argv[3:]))
"""


def racer(log: Path, pause: float, arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RACER, str(log), str(pause), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_racing_runners_work_once_and_agree(tmp_path: Path) -> None:
    racers = [racer(tmp_path / "log", 0.01, flags(tmp_path / "store", run=f"r{n}")) for n in range(3)]
    results = [json.loads(process.communicate(timeout=120)[0]) for process in racers]
    assert [process.returncode for process in racers] == [EXIT_OK] * 3
    assert sorted(result["status"] for result in results) == ["done", "found", "found"]
    assert len({result["content"] for result in results}) == 1
    assert (tmp_path / "log").read_text() == "worked\n"
    store = open_store(str(tmp_path / "store"))
    for n in range(3):
        store.artifact(f"r{n}", "etl.interactions").verify()


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_runner_frees_its_lock_and_leaves_nothing_visible(tmp_path: Path) -> None:
    store = tmp_path / "store"
    victim = racer(tmp_path / "log", 60, flags(store))
    wait_for(lambda: list(store.glob(".scratch/etl.interactions/*.out/*.txt")))
    waiting = racer(tmp_path / "log", 0, flags(store, run="r2"))
    time.sleep(0.5)
    assert waiting.poll() is None
    victim.kill()
    victim.communicate()
    assert open_store(str(store)).entry("r", "etl.interactions") is None
    result = json.loads(waiting.communicate(timeout=120)[0])
    assert result["status"] == "done"
    found = open_store(str(store)).artifact("r2", "etl.interactions")
    assert sorted(found.manifest["files"]) == sorted(f"{n}.txt" for n in range(50))
    assert not list(store.glob(".scratch/etl.interactions/*.work"))


def test_work_folder_survives_a_failure(tmp_path: Path) -> None:
    def work(job: Job) -> Result:
        checkpoint = job.work / "checkpoint"
        if not checkpoint.exists():
            checkpoint.write_text("half")
            raise RuntimeError("first attempt")
        assert not list(job.out.iterdir())
        return Result({"from": checkpoint.read_text()})

    assert run_stage("etl.interactions", work, argv=flags(tmp_path)) == EXIT_UNEXPECTED
    assert run_stage("etl.interactions", work, argv=flags(tmp_path)) == EXIT_OK
    assert open_store(str(tmp_path)).artifact("r", "etl.interactions").facts == {"from": "half"}
