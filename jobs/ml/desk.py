"""Where the champion is moved: registry and ledger under the lease, and the test of a model through its alias."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from crane_core.config import Runtime
from crane_core.errors import ArtifactError
from crane_core.release.handover import CHAMPION, hand_over, is_confirmed, recover, restore
from crane_core.release.lease import Lease, Tenure
from crane_core.release.ledger import Action, Entry, Ledger
from crane_core.release.registry import Registry, open_registry
from crane_core.serving.probe import smoke_test
from crane_core.storage.artifacts import ArtifactStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Desk:
    """What the holder of the lease works with.

    Attributes:
        registry: versions and aliases.
        ledger: the decisions.
        tenure: the lease that is held.
        finished: the entry of a holder that died, if its test was made up for just now.
    """

    registry: Registry
    ledger: Ledger
    tenure: Tenure
    finished: Entry | None = None

    @property
    def champion(self) -> str | None:
        """The version that carries the alias, its smoke test passed."""
        return self.ledger.champion()

    def write(
        self, action: Action, version: str, champion: str | None, run_id: str, reason: str, numbers: dict[str, Any]
    ) -> Entry:
        """Add an entry to the ledger."""
        seen = self.ledger.size()
        self.tenure.check()
        return self.ledger.append(seen, action, version, champion, run_id, reason, numbers, self.tenure.token)

    def carry_out(self, entry: Entry) -> None:
        """Move the alias as an entry says and test through it, unless that is done.

        Raises:
            ArtifactError: the test failed and the former champion is back.
        """
        if not is_confirmed(entry, self.registry):
            self.tenure.check()
            hand_over(self.ledger, self.registry, entry, lambda: self.smoke(entry), self.tenure.token)

    def take_back(self, entry: Entry, why: str) -> Entry:
        """Restore the champion before an entry."""
        self.tenure.check()
        return restore(self.ledger, self.registry, entry, why, self.tenure.token)

    def smoke(self, entry: Entry) -> int:
        """Load what the alias points to, as a serving process would, and compare its answers with the evaluation's.

        Raises:
            ArtifactError: it is not the version expected, was tampered with, or answers wrongly.
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
def take_desk(runtime: Runtime, store: ArtifactStore, purpose: str) -> Iterator[Desk]:
    """Wait for the lease, check the ledger, finish what a holder that died has left.

    Args:
        runtime: names the registry.
        store: holds lease and ledger.
        purpose: what for, as those who wait are told.

    Raises:
        ArtifactError: the ledger was tampered with, or is not this registry's.
    """
    registry = open_registry(runtime, store.storage.uri)
    ledger = Ledger(store.storage, registry.name)
    with Lease(store.storage).hold(purpose) as tenure:
        ledger.verify(registry.ledger_anchors())
        desk = Desk(registry, ledger, tenure)
        yield replace(desk, finished=recover(ledger, registry, desk.smoke, tenure.token))
