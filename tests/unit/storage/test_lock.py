"""Lock files: held by one process at a time, and released when it dies."""

import subprocess
import sys
from pathlib import Path

from crane_core.storage.lock import locked, locked_or_refused

HOLD = """
import sys
from pathlib import Path
from crane_core.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_a_lock_is_refused_while_another_process_holds_it_and_free_once_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.lock"
    process = hold(path)
    with locked_or_refused(path) as held:
        assert not held
    process.kill()
    process.wait()
    with locked_or_refused(path) as held:
        assert held


def test_who_waits_is_told_once_and_then_gets_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    process, told = hold(path), []

    def waiting() -> None:
        told.append(True)
        process.kill()

    with locked(path, waiting):
        assert told == [True]
    process.wait()
    with locked(path, lambda: told.append(False)):
        assert told == [True]
