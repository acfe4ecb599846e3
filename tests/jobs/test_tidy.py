"""The scratch folder: what is old goes, what is young or at work stays."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from crane_core.errors import EXIT_OK
from jobs import tidy
from jobs.stores import open_store, scratch

WINDOW = ("--set", "window.start=2026-03-01", "--set", "window.end=2026-03-02")


def plant(folder: Path, days: float) -> Path:
    """A folder with a file inside, neither touched for so many days."""
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_bytes(b"12345678")
    then = time.time() - days * 86400
    for path in (folder / "deep" / "file", folder / "deep", folder):
        os.utime(path, (then, then))
    return folder


def run(uri: str, capsys: pytest.CaptureFixture[str], *extra: str) -> dict:
    assert tidy.main(["--store", uri, "--run", "r1", *WINDOW, *extra]) == EXIT_OK
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_what_nobody_has_touched_for_a_week_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = scratch(str(tmp_path))
    old = [plant(base / "ml.train" / "f1.work", 8), plant(base / "spark" / "blockmgr-1", 8)]
    young = [plant(base / "ml.train" / "f2.work", 6), plant(tmp_path / "ml.train" / "published", 80)]
    # Old outside, but a checkpoint was written inside.
    (busy := plant(base / "ml.train" / "f3.work", 8) / "deep" / "checkpoint").write_bytes(b"")
    os.utime(busy.parent, (0, 0))
    lock = base / "ml.train" / "f1.lock"
    lock.touch()
    found = run(str(tmp_path), capsys)
    assert not any(folder.exists() for folder in old)
    assert all((folder / "deep" / "file").exists() for folder in young) and busy.exists() and lock.exists()
    assert (found["num_removed"], found["status"]) == (2, "done") and found["bytes"] >= 16
    assert run(str(tmp_path), capsys, "--set", "runtime.scratch_days=5")["num_removed"] == 1
    assert not young[0].exists()


def test_the_folder_of_a_job_at_work_stays_however_old(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = plant(scratch(str(tmp_path)) / "ml.train" / "f1.work", 80)
    with (work.parent / "f1.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert run(str(tmp_path), capsys)["num_removed"] == 0
    assert run(str(tmp_path), capsys)["num_removed"] == 1
    assert not work.exists()


def test_a_folder_that_its_job_takes_away_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = scratch(str(tmp_path))
    folders = [plant(base / "spark" / f"blockmgr-{number}", 8) for number in range(2)]
    real = tidy._unless_at_work

    def ended(folder: Path) -> AbstractContextManager[bool]:
        if folder == folders[0]:
            shutil.rmtree(folder)
        return real(folder)

    monkeypatch.setattr(tidy, "_unless_at_work", ended)
    assert run(str(tmp_path), capsys)["num_removed"] == 1


def test_nothing_behind_a_link_is_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = plant(tmp_path / "disk" / "somebody", 80)
    base = scratch(str(tmp_path / "store"))
    plant(base / "ml.train" / "f1.work", 1)
    (base / "spark").symlink_to(tmp_path / "disk")
    (base / "ml.train" / "f2.work").symlink_to(elsewhere)
    assert run(str(tmp_path / "store"), capsys)["num_removed"] == 0
    assert (elsewhere / "deep" / "file").exists()


def test_killed_in_the_middle_it_leaves_no_half_of_a_copy(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = open_store(s3_uri)
    (tmp_path / "f1").mkdir()
    (tmp_path / "f1" / "data").write_text("f1")
    copy = store.publish(tmp_path / "f1", {"stage": "ml.graph", "fingerprint": "f1", "facts": {}}).path
    for each in (*copy.rglob("*"), copy):
        os.utime(each, (0, 0))

    def killed(folder: Path) -> None:
        (folder / "data").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("jobs.tidy.shutil.rmtree", killed)
        tidy.main(["--store", s3_uri, "--run", "r1", *WINDOW])
    assert (found := store.find("ml.graph", "f1")) and found.file("data").read_text() == "f1"
    (left,) = (path for path in copy.parent.iterdir() if path != copy)
    for each in (*left.rglob("*"), left):
        os.utime(each, (0, 0))
    assert run(s3_uri, capsys)["num_removed"] == 1 and not left.exists()


def test_copies_of_remote_artifacts_go_a_week_after_they_were_last_asked_for(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = open_store(s3_uri)
    for fingerprint in ("f1", "f2"):
        (tmp_path / fingerprint).mkdir()
        (tmp_path / fingerprint / "data").write_text(fingerprint)
        store.publish(tmp_path / fingerprint, {"stage": "ml.graph", "fingerprint": fingerprint, "facts": {}})
    copies = {path.name: path for path in (store.cache / "ml.graph").iterdir()}
    partial = plant(store.cache / "ml.graph" / ".f3.0123", 8)
    for path in copies.values():
        for each in (*path.rglob("*"), path):
            os.utime(each, (0, 0))
    assert store.find("ml.graph", "f2") is not None
    assert run(s3_uri, capsys)["num_removed"] == 2
    assert not copies["f1"].exists() and not partial.exists() and copies["f2"].exists()
    # It is only a copy.
    assert (found := store.find("ml.graph", "f1")) and found.file("data").read_text() == "f1"
