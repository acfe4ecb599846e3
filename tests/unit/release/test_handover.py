import pytest

from crane_core.errors import ArtifactError
from crane_core.release.handover import SMOKE_TAG, hand_over, recover, restore, settle
from crane_core.release.ledger import Ledger
from crane_core.storage.local import LocalStorage
from tests.worlds.ledgers import MemoryAliases, promote


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(LocalStorage(tmp_path), "crane")


def test_a_crash_between_ledger_and_alias_is_repaired(ledger):
    registry = MemoryAliases()
    promote(ledger, "1")
    assert settle(ledger, registry) == registry.champion == "1"
    promote(ledger, "2")
    assert registry.champion == "1"
    assert settle(ledger, registry) == registry.champion == "2"


def test_an_alias_moved_by_hand_is_put_back(ledger):
    registry = MemoryAliases()
    promote(ledger, "1")
    registry.champion = "9"
    assert settle(ledger, registry) == registry.champion == "1"


def test_a_champion_the_ledger_has_never_heard_of_is_an_error(ledger):
    registry = MemoryAliases()
    assert settle(ledger, registry) is None
    registry.champion = "4"
    with pytest.raises(ArtifactError, match=r"Version 4 .* without an entry"):
        settle(ledger, registry)
    assert registry.champion == "4"


def test_a_slow_mover_ends_at_the_newest_entry(ledger):
    """While one process is about to set the alias to 1, another promotes 2 and sets it."""

    class Slow(MemoryAliases):
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
    registry, seen = MemoryAliases(), []
    entry = promote(ledger, "1")
    hand_over(ledger, registry, entry, lambda: seen.append(registry.champion), 0)
    assert seen == ["1"]
    assert registry.tags["1"] == {"crane.ledger.1": entry.hash, SMOKE_TAG: "1"}


@pytest.mark.parametrize("before", [None, "1"])
def test_a_failed_smoke_test_puts_the_champion_back(ledger, before):
    registry = MemoryAliases()
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
    class Stubborn(MemoryAliases):
        def set_alias(self, alias, number):
            self.champion = "9"

    promote(ledger, "1")
    with pytest.raises(ArtifactError, match="does not stay where the ledger puts it"):
        settle(ledger, Stubborn())


@pytest.mark.parametrize("works", [True, False])
def test_a_champion_that_nobody_has_tested_is_tested_before_anything_else(ledger, works):
    """Its promoter died after the ledger entry: the next holder of the lease confirms or restores."""
    registry = MemoryAliases()
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
    registry = MemoryAliases()
    hand_over(ledger, registry, promote(ledger, "1"), lambda: None, 0)
    entry = promote(ledger, "2")
    hand_over(ledger, registry, entry, lambda: None, 0)
    restored = restore(ledger, registry, entry, "the export failed", 0)
    assert (restored.action, restored.champion, restored.reason) == ("restore", "1", "Restored: the export failed.")
    assert registry.champion == "1" and registry.tags["2"]["crane.ledger.3"] == restored.hash
    assert recover(ledger, registry, lambda entry: pytest.fail("tested already"), 0) is None
