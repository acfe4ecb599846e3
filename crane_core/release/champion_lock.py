"""The lock under which the champion is changed: registry and ledger while the lease is held, with the smoke test."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

from crane_core.config import Runtime
from crane_core.errors import ArtifactError
from crane_core.release.damage import damage_of, run_lost
from crane_core.release.handover import CHAMPION, hand_over, is_confirmed, recover, restore, settle
from crane_core.release.ledger import Draft, Entry, Ledger
from crane_core.release.registry import Registry, open_registry
from crane_core.serving.probe import smoke_test
from crane_core.storage.artifacts import ArtifactStore
from crane_core.storage.lease import HeldLease, Lease

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChampionLock:
    """Registry and ledger of a process that holds the lease.

    Attributes:
        registry: versions and aliases.
        ledger: the decisions.
        lease: the lease that is held.
        finished: entry of a crashed process whose smoke test was made up for when the lease was taken, if any.
    """

    registry: Registry
    ledger: Ledger
    lease: HeldLease
    finished: Entry | None = None

    @property
    def champion(self) -> str | None:
        """Version that is champion by the ledger, None where there is none or the registry has lost it."""
        champion = self.ledger.champion()
        return champion if champion is None or self.registry.exists(champion) else None

    def write(self, draft: Draft) -> Entry:
        """Add an entry to the ledger."""
        seen = self.ledger.size()
        self.lease.check()
        return self.ledger.append(seen, draft, self.lease.token)

    def go_back(self, store: ArtifactStore, damage: str) -> Entry:
        """Make the last earlier champion that is whole champion again, in place of one that cannot be served.

        Where there is none, there is no champion from now on.

        Args:
            store: has the runs.
            damage: half a sentence.

        Returns:
            The line that says so.
        """
        lost = str(self.ledger.champion())
        for number in reversed(self.ledger.earlier_champions()):
            found = damage_of(self.registry, number)
            if not found and (lost_run := run_lost(store, self.registry.version(number))):
                found = f"the run {lost_run} of version {number} was removed from the store"
            if found:
                logger.warning("passed_over version=%s: %s", number, found)
                continue
            reason = f"Repaired: version {lost} cannot be served ({damage}); version {number} is champion again."
            run = self.registry.version(number).run_id
            entry = self.write(Draft("rollback", number, number, run, reason, {"lost": lost}))
            self.carry_out(entry)
            return entry
        reason = (
            f"Repaired: version {lost} cannot be served ({damage}), and no earlier champion can; there is none now."
        )
        entry = self.write(Draft("repair", lost, None, "", reason, {"lost": lost}))
        settle(self.ledger, self.registry)
        return entry

    def carry_out(self, entry: Entry) -> None:
        """Move the alias as an entry says and test the model through it, unless that is done.

        Raises:
            ArtifactError: the test failed and the former champion is back.
        """
        if not is_confirmed(entry, self.registry):
            self.lease.check()
            hand_over(self.ledger, self.registry, entry, lambda: self.smoke(entry), self.lease.token)

    def take_back(self, entry: Entry, why: str) -> Entry:
        """Restore the champion before an entry.

        Args:
            entry: the newest entry that set the champion.
            why: half a sentence.
        """
        self.lease.check()
        return restore(self.ledger, self.registry, entry, why, self.lease.token)

    def smoke(self, entry: Entry) -> int:
        """Load the model through the alias, as a serving process would, and compare it with the evaluated embeddings.

        Returns:
            The number of users compared.

        Raises:
            ArtifactError: it is not the expected version, was tampered with, or recommends other items.
        """
        version = self.registry.version(entry.version)
        probe = json.loads(self.registry.evidence(version, "probe.json").read_text())
        self.registry.model_folder(version)
        holder = self.registry.holder(CHAMPION)
        if holder != version.number:
            raise ArtifactError(
                f"The alias {CHAMPION!r} points to version {holder}, expected {version.number}.",
                "Run the same command again: it puts the alias where the ledger says.",
            )
        compared = smoke_test(self.registry.load(f"@{CHAMPION}").predict, probe)
        logger.info("smoke_test version=%s users=%d passed", version.number, compared)
        return compared


@contextlib.contextmanager
def lock_champion(runtime: Runtime, store: ArtifactStore, purpose: str) -> Iterator[ChampionLock]:
    """Wait for the lease, verify the ledger, and finish what a crashed process has left.

    If somebody has removed the champion from the registry, the last earlier one that is whole is champion again.

    Args:
        runtime: names the registry.
        store: holds lease and ledger.
        purpose: shown in the log of the processes that wait.

    Raises:
        ArtifactError: the ledger was tampered with, or belongs to another registry.
    """
    registry = open_registry(runtime, store.storage.uri)
    ledger = Ledger(store.storage, registry.name)
    with Lease(store.storage).hold(purpose) as held:
        ledger.verify(registry.ledger_anchors())
        lock = ChampionLock(registry, ledger, held)
        lock = replace(lock, finished=recover(ledger, registry, lock.smoke, held.token))
        champion = ledger.champion()
        if champion is not None and not registry.exists(champion):
            lock.go_back(store, damage_of(registry, champion))
        yield lock
