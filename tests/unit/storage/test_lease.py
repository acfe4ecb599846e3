import json
import os
import signal
import subprocess
import sys
import time

import pytest

from crane_core.storage import open_storage
from crane_core.storage.lease import FOLDER, HeldLease, Lease, LeaseLost
from crane_core.storage.local import LocalStorage

HOLDER = """
import sys, time
from pathlib import Path
from crane_core.storage.lease import Lease
from crane_core.storage.local import LocalStorage
with Lease(LocalStorage(Path(sys.argv[1])), seconds=float(sys.argv[2])).hold("test") as held:
    print(held.token, flush=True)
    time.sleep(60)
"""

COUNTER = """
import sys
from pathlib import Path
from crane_core.storage.lease import Lease
from crane_core.storage.local import LocalStorage
root = Path(sys.argv[1])
for _ in range(5):
    with Lease(LocalStorage(root)).hold("count") as held:
        count = int((root / "count").read_text())
        held.check()
        (root / "count").write_text(str(count + 1))
"""


def terms(storage):
    return [json.loads(storage.read(f"{FOLDER}/{name}")) for name in storage.names(FOLDER)]


def test_terms_are_numbered_and_ended(tmp_path):
    lease = Lease(LocalStorage(tmp_path))
    for token in (1, 2, 3):
        with lease.hold("test") as held:
            held.check()
            assert held.token == token
            assert [term["released"] for term in terms(lease.storage)] == [True] * (token - 1) + [False]
    assert [term["released"] for term in terms(lease.storage)] == [True] * 3


def test_an_error_inside_ends_the_term(tmp_path):
    lease = Lease(LocalStorage(tmp_path))
    with pytest.raises(ZeroDivisionError), lease.hold("test"):
        raise ZeroDivisionError
    started = time.monotonic()
    with lease.hold("test"):
        assert time.monotonic() - started < 1


@pytest.mark.slow
def test_a_dead_holder_blocks_for_one_term(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), "4"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
        os.kill(holder.pid, signal.SIGKILL)
    killed = time.monotonic()
    with Lease(LocalStorage(tmp_path), seconds=4).hold("test") as held:
        assert 1 < time.monotonic() - killed < 30
        assert held.token == 2


@pytest.mark.slow
def test_a_living_holder_is_waited_for_beyond_its_term(tmp_path):
    """Terms of two seconds, and a holder that works for six."""
    program = HOLDER.replace("time.sleep(60)", "time.sleep(6)")
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path), "2"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
        with Lease(LocalStorage(tmp_path), seconds=2).hold("test") as held:
            assert terms(LocalStorage(tmp_path))[0]["released"] is True
            assert held.token == 2


def test_a_holder_that_slept_through_its_term_is_told(tmp_path):
    storage = LocalStorage(tmp_path)
    lease = Lease(storage, seconds=0.2)
    lease_of_another = Lease(storage)
    asleep = lease.acquire("asleep")
    time.sleep(0.3)
    with lease_of_another.hold("awake") as awake:
        assert awake.token == asleep.token + 1
        with pytest.raises(LeaseLost, match="token 1 is held here, 2 is the newest"):
            HeldLease(lease, asleep).check()


def test_processes_take_turns(tmp_path):
    (tmp_path / "count").write_text("0")
    racers = [subprocess.Popen([sys.executable, "-c", COUNTER, str(tmp_path)]) for _ in range(4)]
    assert [racer.wait(120) for racer in racers] == [0] * 4
    assert (tmp_path / "count").read_text() == "20"
    assert [term["token"] for term in terms(LocalStorage(tmp_path))] == list(range(1, 21))


def test_it_works_on_an_object_store(s3_uri):
    storage = open_storage(s3_uri)
    for token in (1, 2):
        with Lease(storage).hold("test") as held:
            assert held.token == token
            held.check()
