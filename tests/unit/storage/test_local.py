"""Storage in a folder: killed and refused publishers."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crane_core.storage import open_storage
from tests.worlds.artifacts import folder

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from crane_core.storage import open_storage
def half(source, target):
    shutil.copytree(source / "table", target / "table")
    os.kill(os.getpid(), signal.SIGKILL)
shutil.move = half
open_storage(sys.argv[1]).publish(Path(sys.argv[2]), "stage/f")
"""


def test_a_publisher_killed_half_way_leaves_nothing_visible(tmp_path: Path) -> None:
    source = folder(tmp_path / "one", "one")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "store"), str(source)], check=False)
    assert killed.returncode == -signal.SIGKILL
    storage = open_storage(str(tmp_path / "store"))
    assert len(list((tmp_path / "store" / "stage").iterdir())) == 1
    assert storage.names("stage") == [] and storage.read("stage/f/manifest.json") is None
    assert storage.publish(folder(tmp_path / "two", "two"), "stage/f")
    assert storage.names("stage") == ["f"]


def test_failed_rename_is_no_lost_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(tmp_path / "store"))

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        storage.publish(folder(tmp_path / "one", "one"), "stage/f")
