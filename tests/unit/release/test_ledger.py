import json
import subprocess
import sys
from itertools import pairwise

import pytest

from crane_core.errors import ArtifactError
from crane_core.release.ledger import FOLDER, Ledger
from crane_core.storage.lease import LeaseLost
from crane_core.storage.local import LocalStorage
from tests.worlds.ledgers import draft, promote


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(LocalStorage(tmp_path), "crane")


def test_entries_are_chained(ledger):
    first, second = promote(ledger, "1"), promote(ledger, "2")
    assert (first.seq, first.previous, first.champion_before) == (1, "0" * 64, None)
    assert (second.seq, second.previous, second.champion_before) == (2, first.hash, "1")
    assert ledger.entries() == [first, second]
    assert ledger.champion() == "2"
    assert ledger.verify({1: first.hash, 2: second.hash}) == 2


def test_models_share_the_chain_and_not_the_champion(ledger):
    promote(ledger, "1")
    other = Ledger(ledger.storage, "other")
    entry = promote(other, "7")
    assert entry.seq == 2 and entry.champion_before is None
    assert (ledger.champion(), other.champion()) == ("1", "7")


def test_a_decision_on_an_old_view_is_not_written(ledger):
    seen = ledger.size()
    promote(ledger, "1")
    with pytest.raises(LeaseLost):
        ledger.append(seen, draft("2"))
    assert ledger.size() == 1


def test_an_overtaken_holder_cannot_write(ledger):
    """Token 2 has written: whoever still holds token 1, or none, is refused although it has read everything."""
    ledger.append(0, draft("1"), fence=1)
    ledger.append(1, draft("2"), fence=2)
    for fence in (1, 0):
        with pytest.raises(LeaseLost, match=f"token {fence} is held here, 2 is the newest"):
            ledger.append(2, draft("3"), fence=fence)
    assert ledger.append(2, draft("3"), fence=2).fence == 2
    assert ledger.verify() == 3


def test_entries_from_before_there_were_leases_stay_whole(ledger):
    promote(ledger, "1")
    path = ledger.storage.root / FOLDER / "00000001.json"
    content = json.loads(path.read_text())
    del content["fence"]
    path.write_text(json.dumps(content))
    assert ledger.verify() == 1
    rewrite(ledger, 1, fence=3)
    with pytest.raises(ArtifactError, match="does not match its own hash"):
        ledger.verify()


def rewrite(ledger: Ledger, seq: int, **changes) -> None:
    path = ledger.storage.root / FOLDER / f"{seq:08d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("seq", [1, 2, 3])
def test_a_changed_entry_shows(ledger, seq):
    for version in "123":
        promote(ledger, version)
    rewrite(ledger, seq, reason="a better story")
    with pytest.raises(ArtifactError, match=f"0000000{seq}.json does not match its own hash"):
        ledger.verify()


def test_an_entry_forged_with_its_hash_breaks_the_chain(ledger):
    entries = [promote(ledger, version) for version in "123"]
    rewrite(ledger, 2, reason="a better story")
    forged = json.loads((ledger.storage.root / FOLDER / "00000002.json").read_text())
    rewrite(ledger, 2, hash=type(entries[1])(**forged).computed_hash())
    with pytest.raises(ArtifactError, match=r"00000003\.json does not follow the entry before it"):
        ledger.verify()


def test_a_removed_entry_shows(ledger):
    entries = [promote(ledger, version) for version in "123"]
    (ledger.storage.root / FOLDER / "00000002.json").unlink()
    with pytest.raises(ArtifactError, match=r"00000003\.json found where 00000002\.json belongs"):
        ledger.champion()
    (ledger.storage.root / FOLDER / "00000003.json").unlink()
    assert ledger.verify() == 1
    with pytest.raises(ArtifactError, match="entry 3 is not the one the registry remembers"):
        ledger.verify({3: entries[2].hash})


def test_going_back_twice_goes_back_two_champions(ledger):
    for version in "123":
        promote(ledger, version)
    assert ledger.earlier_champions() == ["1", "2"]
    promote(ledger, "2", "rollback")
    assert ledger.earlier_champions() == ["1"]
    promote(ledger, "1", "rollback")
    assert ledger.earlier_champions() == []
    promote(ledger, "3", "rollback")
    assert ledger.earlier_champions() == ["1"]


def test_a_disk_without_room_leaves_the_ledger_as_it_was(ledger):
    """The kernel refuses to write more than 300 bytes into a file, as it would on a full disk."""
    promote(ledger, "1")
    program = (
        "import resource, signal, sys; from pathlib import Path; from crane_core.release.ledger import Draft, Ledger\n"
        "from crane_core.storage.local import LocalStorage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "Ledger(LocalStorage(Path(sys.argv[1])), 'crane').append(1, Draft('promote', '2', '2', 'run-2', 'x' * 400))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(ledger.storage.root)], capture_output=True, text=True)
    assert ended.returncode == 1 and "OSError: [Errno 27]" in ended.stderr
    assert [path.name for path in (ledger.storage.root / FOLDER).iterdir()] == ["00000001.json"]
    assert ledger.verify() == 1
    promote(ledger, "2")


def test_processes_that_race_end_in_one_order(tmp_path):
    program = (
        "import sys; from pathlib import Path; from crane_core.storage.lease import LeaseLost\n"
        "from crane_core.release.ledger import Draft, Ledger; from crane_core.storage.local import LocalStorage\n"
        "ledger, me, lost = Ledger(LocalStorage(Path(sys.argv[1])), 'crane'), sys.argv[2], 0\n"
        "for number in range(8):\n"
        "    version = f'{me}{number}'\n"
        "    while True:\n"
        "        draft = Draft('promote', version, version, me, 'race')\n"
        "        try: ledger.append(ledger.size(), draft); break\n"
        "        except LeaseLost: lost += 1\n"
        "print(lost)\n"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name], stdout=subprocess.PIPE) for name in "abc"
    ]
    assert [racer.wait(60) for racer in racers] == [0, 0, 0]
    entries = Ledger(LocalStorage(tmp_path), "crane").entries()
    assert [entry.seq for entry in entries] == list(range(1, 25))
    assert sorted(entry.version for entry in entries) == sorted(f"{name}{i}" for name in "abc" for i in range(8))
    assert all(later.champion_before == earlier.champion for earlier, later in pairwise(entries))
    for name in "abc":
        mine = [entry.version for entry in entries if entry.run_id == name]
        assert mine == [f"{name}{i}" for i in range(8)]
