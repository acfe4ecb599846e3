"""A training that is killed over and over, by the job's own command line, ends as an undisturbed one does."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from crane_core.config_file import load_config
from crane_core.errors import EXIT_OK, EXIT_UNEXPECTED
from jobs.stores import open_store
from tests.jobs.test_ml import SETTINGS, flags, plant

NUM_KILLS = 20
LONG = ("train.num_epochs=1500", "train.patience=1500", "train.batch_size=32", "train.checkpoint_steps=5")
"""A minute and a half of steps on an idle core: twenty kills must not outlast them."""


def prepare(folder: Path) -> Path:
    """A store with the artifacts of the ETL, recorded for the run `long`."""
    plant(folder / "store", folder / "scratch")
    store = open_store(str(folder / "store"))
    store.start_run("long", load_config(None, [*SETTINGS, *LONG]))
    store.record("long", "etl.interactions", store.entry("planted", "etl.interactions") or {})
    return folder / "store"


def start(store: Path, *settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.ml.behaviour", *flags(store, "long", "", (*LONG, *settings))]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(stream: IO[str] | None, text: str) -> str:
    """The first line with the text; fails where the stream ends before."""
    assert stream is not None
    seen = []
    for line in stream:
        seen.append(line)
        if text in line:
            return line
    raise AssertionError(f"no {text!r} in {''.join(seen)}")


def content(store: Path) -> dict:
    trained = open_store(str(store)).artifact("long", "ml.behaviour")
    return {"content": trained.manifest["content"], "validation": trained.facts["validation"]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    store = prepare(tmp_path_factory.mktemp("undisturbed"))
    process = start(store)
    _, log = process.communicate()
    assert process.returncode == EXIT_OK, log
    return content(store)


@pytest.mark.timeout(3000)
def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path, undisturbed: dict) -> None:
    store = prepare(tmp_path)
    moments, epochs = random.Random(0), []
    for _ in range(NUM_KILLS):
        process = start(store)
        line = wait_for(process.stderr, "epoch=")
        epochs.append(int(line.split("epoch=")[1].split()[0]))
        time.sleep(moments.uniform(0, 1))
        assert process.poll() is None, "the training ended before it was killed twenty times"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = start(store)
    _, log = process.communicate()
    assert process.returncode == EXIT_OK, log
    assert "resume epoch=" in log
    assert epochs == sorted(epochs) and epochs[-1] > 0, "the kills stopped the training from getting on"
    assert content(store) == undisturbed


def test_sigterm_loses_at_most_one_step(tmp_path: Path, undisturbed: dict) -> None:
    store = prepare(tmp_path)
    process = start(store)
    wait_for(process.stderr, "epoch=1 ")
    process.terminate()
    _, log = process.communicate()
    assert process.returncode == EXIT_UNEXPECTED
    assert "error=TrainingStopped" in log and "Traceback" not in log
    step = log.split("asked to stop after step ")[1].split()[0]
    resumed = start(store)
    assert f" step={step} " in wait_for(resumed.stderr, "resume epoch=")
    resumed.communicate()
    assert content(store) == undisturbed


@pytest.mark.timeout(1200)
def test_a_lost_rank_is_started_again_and_a_second_one_ends_the_job_with_its_number(
    tmp_path: Path, undisturbed: dict
) -> None:
    store = prepare(tmp_path)
    process = start(store, "runtime.world_size=2")
    wait_for(process.stderr, "epoch=1 ")
    kill_a_rank(process.pid)
    wait_for(process.stderr, "resume epoch=")
    time.sleep(1)
    kill_a_rank(process.pid)
    _, log = process.communicate()
    assert process.returncode == EXIT_UNEXPECTED
    assert "error=TrainingError" in log and "of 2 was lost" in log and "SIGKILL" in log
    resumed = start(store, "runtime.world_size=2")
    wait_for(resumed.stderr, "resume epoch=")
    _, log = resumed.communicate()
    assert resumed.returncode == EXIT_OK, log
    assert content(store)["validation"] == pytest.approx(undisturbed["validation"], abs=1e-5)


def kill_a_rank(agent: int) -> None:
    """Signal 9 to the last child that trains; the agent's other child watches over shared memory."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    ranks = [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    assert len(ranks) == 2, json.dumps(children)
    os.kill(int(ranks[-1]), signal.SIGKILL)
