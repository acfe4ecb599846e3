import json
import subprocess
import sys
from itertools import pairwise

import pytest

from crane_core.errors import ArtifactError
from crane_core.release.handover import SMOKE_TAG, hand_over, recover, restore, settle
from crane_core.release.lease import LeaseLost
from crane_core.release.ledger import FOLDER, Ledger
from crane_core.storage.local import LocalStorage


class Registry:
    """An alias and tags in memory."""

    def __init__(self) -> None:
        self.champion: str | None = None
        self.tags: dict[str, dict[str, str]] = {}

    def holder(self, alias: str) -> str | None:
        return self.champion

    def set_alias(self, alias: str, number: str | None) -> None:
        self.champion = number

    def tag(self, number: str, tags) -> None:
        self.tags.setdefault(number, {}).update(tags)

    def noted(self, number: str, tag: str) -> str | None:
        return self.tags.get(number, {}).get(tag)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(LocalStorage(tmp_path), "crane")


def promote(ledger: Ledger, version: str, action="promote"):
    return ledger.append(ledger.size(), action, version, version, f"run-{version}", "because", {"recall": 0.25})


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
        ledger.append(seen, "promote", "2", "2", "run-2", "late")
    assert ledger.size() == 1


def test_an_overtaken_holder_cannot_write(ledger):
    """Token 2 has written: whoever still holds token 1, or none, is refused although it has read everything."""
    ledger.append(0, "promote", "1", "1", "run-1", "because", fence=1)
    ledger.append(1, "promote", "2", "2", "run-2", "because", fence=2)
    for fence in (1, 0):
        with pytest.raises(LeaseLost, match=f"token {fence} is held here, 2 is the newest"):
            ledger.append(2, "promote", "3", "3", "run-3", "because", fence=fence)
    assert ledger.append(2, "promote", "3", "3", "run-3", "because", fence=2).fence == 2
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


def test_a_crash_between_ledger_and_alias_is_repaired(ledger):
    registry = Registry()
    promote(ledger, "1")
    assert settle(ledger, registry) == registry.champion == "1"
    promote(ledger, "2")
    assert registry.champion == "1"
    assert settle(ledger, registry) == registry.champion == "2"


def test_an_alias_moved_by_hand_is_put_back(ledger):
    registry = Registry()
    promote(ledger, "1")
    registry.champion = "9"
    assert settle(ledger, registry) == registry.champion == "1"


def test_a_champion_the_ledger_has_never_heard_of_is_an_error(ledger):
    registry = Registry()
    assert settle(ledger, registry) is None
    registry.champion = "4"
    with pytest.raises(ArtifactError, match=r"Version 4 .* without an entry"):
        settle(ledger, registry)
    assert registry.champion == "4"


def test_a_slow_mover_ends_at_the_newest_entry(ledger):
    """While one process is about to set the alias to 1, another promotes 2 and sets it."""

    class Slow(Registry):
        moves = 0

        def set_alias(self, alias, number):
            self.moves += 1
            if self.moves == 1:
                promote(ledger, "2")
                self.champion = "2"
            self.champion = number

    registry = Slow()
    promote(ledger, "1")
    assert settle(ledger, registry) == registry.champion == "2"


def test_handing_over_tests_and_confirms(ledger):
    registry, seen = Registry(), []
    entry = promote(ledger, "1")
    hand_over(ledger, registry, entry, lambda: seen.append(registry.champion), 0)
    assert seen == ["1"]
    assert registry.tags["1"] == {"crane.ledger.1": entry.hash, SMOKE_TAG: "1"}


@pytest.mark.parametrize("before", [None, "1"])
def test_a_failed_smoke_test_puts_the_champion_back(ledger, before):
    registry = Registry()
    if before:
        hand_over(ledger, registry, promote(ledger, before), lambda: None, 0)
    entry = promote(ledger, "2")

    def smoke() -> None:
        assert registry.champion == "2"
        raise ArtifactError("wrong answers", "look")

    with pytest.raises(ArtifactError, match=r"failed its smoke test \(wrong answers"):
        hand_over(ledger, registry, entry, smoke, 0)
    assert registry.champion == before
    last = ledger.history()[-1]
    assert (last.action, last.version, last.champion) == ("restore", "2", before)
    assert SMOKE_TAG not in registry.tags["2"]
    assert ledger.earlier_champions() == []


def test_an_alias_that_does_not_stay_is_an_error(ledger):
    class Stubborn(Registry):
        def set_alias(self, alias, number):
            self.champion = "9"

    promote(ledger, "1")
    with pytest.raises(ArtifactError, match="does not stay where the ledger puts it"):
        settle(ledger, Stubborn())


@pytest.mark.parametrize("works", [True, False])
def test_a_champion_that_nobody_has_tested_is_tested_before_anything_else(ledger, works):
    """Its promoter died after the ledger entry: the next holder of the lease confirms or restores."""
    registry = Registry()
    hand_over(ledger, registry, promote(ledger, "1"), lambda: None, 0)
    entry = promote(ledger, "2")
    tested = []

    def smoke(of):
        tested.append((of.version, registry.champion))
        if not works:
            raise ArtifactError("wrong answers", "look")

    assert recover(ledger, registry, smoke, 5) == (entry if works else None)
    assert tested == [("2", "2")]
    assert registry.champion == ledger.champion() == ("2" if works else "1")
    assert [each.action for each in ledger.history()] == ["promote"] * 2 + ["restore"] * (not works)
    # Once is enough.
    assert recover(ledger, registry, smoke, 5) is None and len(tested) == 1


def test_a_promotion_is_taken_back(ledger):
    registry = Registry()
    hand_over(ledger, registry, promote(ledger, "1"), lambda: None, 0)
    entry = promote(ledger, "2")
    hand_over(ledger, registry, entry, lambda: None, 0)
    restored = restore(ledger, registry, entry, "the export failed", 0)
    assert (restored.action, restored.champion, restored.reason) == ("restore", "1", "Restored: the export failed.")
    assert registry.champion == "1" and registry.tags["2"]["crane.ledger.3"] == restored.hash
    assert recover(ledger, registry, lambda entry: pytest.fail("tested already"), 0) is None


def test_a_disk_without_room_leaves_the_ledger_as_it_was(ledger):
    """The kernel refuses to write more than 300 bytes into a file, as it would on a full disk."""
    promote(ledger, "1")
    program = (
        "import resource, signal, sys; from pathlib import Path; from crane_core.release.ledger import Ledger\n"
        "from crane_core.storage.local import LocalStorage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "Ledger(LocalStorage(Path(sys.argv[1])), 'crane').append(1, 'promote', '2', '2', 'run-2', 'x' * 400)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(ledger.storage.root)], capture_output=True, text=True)
    assert ended.returncode == 1 and "OSError: [Errno 27]" in ended.stderr
    assert [path.name for path in (ledger.storage.root / FOLDER).iterdir()] == ["00000001.json"]
    assert ledger.verify() == 1
    promote(ledger, "2")


def test_processes_that_race_end_in_one_order(tmp_path):
    program = (
        "import sys; from pathlib import Path; from crane_core.release.lease import LeaseLost\n"
        "from crane_core.release.ledger import Ledger; from crane_core.storage.local import LocalStorage\n"
        "ledger, me, lost = Ledger(LocalStorage(Path(sys.argv[1])), 'crane'), sys.argv[2], 0\n"
        "for number in range(8):\n"
        "    version = f'{me}{number}'\n"
        "    while True:\n"
        "        try: ledger.append(ledger.size(), 'promote', version, version, me, 'race'); break\n"
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
