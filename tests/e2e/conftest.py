"""A small world with a known answer. Airflow runs the whole pipeline over it once, for all tests."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cli import main
from jobs.commands.paths import AIRFLOW_ENVIRONMENT

NUM_GROUPS, NUM_USERS, NUM_ITEMS = 4, 240, 96
TRAIN_PER_USER, HELD_PER_USER = 10, 2
SETTINGS = (
    "refine.num_steps=20",
    "refine.embedding_dim=16",
    "lightgcn.embedding_dim=16",
    "train.num_epochs=12",
    "train.batch_size=512",
    "train.learning_rate=0.01",
    "evaluate.num_bootstrap=200",
    "evaluate.ks=[5,20]",
    "export.k=10",
    "export.num_similar=5",
    'promote.beats=["popularity"]',
    "runtime.num_threads=1",
)
SECONDS = 900


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code.
        out: lines of stdout.
        err: stderr.
    """

    code: int
    out: list[str]
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of stdout."""
        return json.loads(self.out[-1])


def ask(*arguments: str | Path) -> Ended:
    """Run a quick `crane` command in this process, which needs no new imports."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, arguments)])
    return Ended(code, out.getvalue().splitlines(), err.getvalue())


def crane(*arguments: str | Path) -> Ended:
    """Run `crane` as a person does."""
    ended = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"COLUMNS": "120"},
    )
    return Ended(ended.returncode, ended.stdout.splitlines(), ended.stderr)


def plant(folder: Path) -> Path:
    """An MMRec folder: users and items of four groups, users like their own group, features tell an item's group."""
    random = np.random.default_rng(11)
    group_of_item = np.arange(NUM_ITEMS) % NUM_GROUPS
    rows = ["userID\titemID\tx_label"]
    for user in range(NUM_USERS):
        own = np.flatnonzero(group_of_item == user % NUM_GROUPS)
        chosen = random.choice(own, TRAIN_PER_USER + 2 * HELD_PER_USER, replace=False)
        labels = [0] * TRAIN_PER_USER + [1] * HELD_PER_USER + [2] * HELD_PER_USER
        rows += [f"{user}\t{item}\t{label}" for item, label in zip(chosen, labels, strict=True)]
    folder.mkdir()
    (folder / "planted.inter").write_text("\n".join(rows) + "\n")
    for modality, dim in (("sound", 12), ("words", 6)):
        centres = random.normal(size=(NUM_GROUPS, dim))
        noise = 0.3 * random.normal(size=(NUM_ITEMS, dim))
        np.save(folder / f"{modality}_feat.npy", (centres[group_of_item] + noise).astype(np.float32))
    titles = [f"{item}\tpiece {item} of group {group_of_item[item]}" for item in range(NUM_ITEMS)]
    (folder / "items.tsv").write_text("\n".join(["itemID\tname", *titles]) + "\n")
    return folder


@dataclass(frozen=True)
class World:
    """Where the demo ran and how it ended.

    Attributes:
        data: the planted folder.
        home: what `.crane` is to a person.
        first: the demo that built everything.
    """

    data: Path
    home: Path
    first: Ended

    @property
    def store(self) -> Path:
        return self.home / "planted" / "store"

    @property
    def run(self) -> str:
        return self.first.json["run"]

    def demo(self) -> Ended:
        """The same demo again."""
        return demo(self.data, self.home)


def demo(data: Path, home: Path) -> Ended:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return crane("demo", "--data", data, "--home", home, *settings)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if not (AIRFLOW_ENVIRONMENT / "bin" / "airflow").exists():
        pytest.skip(f"no Airflow environment at {AIRFLOW_ENVIRONMENT}: run make setup")
    base = tmp_path_factory.mktemp("e2e")
    data = plant(base / "planted")
    home = base / "home"
    yield World(data, home, demo(data, home))
