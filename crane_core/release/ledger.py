"""The append-only ledger of the model registry: every decision about the champion, its time and its reason.

One object per entry, `{store}/ledger/{seq:08d}.json`, made only if it does not exist, and chained: each entry
carries the hash of the one before and its own. The ledger decides who is champion: an entry is written first and the
alias is moved second. After a crash in between, the alias is set to what the ledger says. The writer holds the lease of
the store (`crane_core.storage.lease`). An entry carries the token of its lease, and no entry follows one with a higher
token.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from crane_core.errors import ArtifactError
from crane_core.storage import Storage
from crane_core.storage.lease import lost

logger = logging.getLogger(__name__)
FOLDER = "ledger"
GENESIS = "0" * 64
ANCHOR_TAG = "crane.ledger."
Action = Literal["promote", "refuse", "pass", "rollback", "restore", "repair"]
MOVES = ("promote", "rollback", "restore", "repair")
"""Actions that set the champion."""


@dataclass(frozen=True)
class Draft:
    """A decision before it is written into the ledger.

    Attributes:
        action: `promote` and `rollback` make `version` champion; `refuse` changes nothing, and so does `pass`: a newer
            candidate was judged before anybody judged `version`; `restore` takes back a promotion or rollback whose
            smoke test, or a step that had to follow it, failed; `repair` ends the time of a champion that cannot be
            served any more and that has no successor among the earlier ones.
        version: the version the decision is about.
        champion: champion from now on, None when there is none.
        run_id: run that asked for it.
        reason: one sentence.
        numbers: everything the decision rests on, JSON values.
    """

    action: Action
    version: str
    champion: str | None
    run_id: str
    reason: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A decision in the ledger.

    Attributes:
        seq: position, from 1.
        previous: hash of the entry before, zeros for the first.
        at: time, ISO 8601 UTC.
        model: registered model.
        action, version, champion, run_id, reason, numbers: see `Draft`.
        champion_before: champion until now, None when there was none.
        fence: token of the lease it was written under, 0 without one.
        hash: sha256 of all of the above.
    """

    seq: int
    previous: str
    at: str
    model: str
    action: Action
    version: str
    champion_before: str | None
    champion: str | None
    run_id: str
    reason: str
    numbers: dict[str, Any] = field(default_factory=dict)
    fence: int = 0
    hash: str = ""

    def computed_hash(self) -> str:
        """Return the sha256 over every field but `hash`."""
        fields = {name: value for name, value in asdict(self).items() if name != "hash"}
        # Entries older than the lease were hashed without the field.
        if not self.fence:
            del fields["fence"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def encode(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()


class Ledger:
    """The entries of one store.

    Args:
        storage: holds the entries.
        model: registered model that is asked about; one chain runs through the entries of all models.
    """

    def __init__(self, storage: Storage, model: str) -> None:
        self.storage = storage
        self.model = model

    def entries(self) -> list[Entry]:
        """Read every entry of every model and verify the chain.

        Raises:
            ArtifactError: an entry was changed, removed or does not follow the one before.
        """
        entries: list[Entry] = []
        previous = GENESIS
        for seq, name in enumerate(self.storage.names(FOLDER), start=1):
            entry = self._checked(name)
            if name != _name(seq) or entry.seq != seq:
                raise self._broken(f"{name} found where {_name(seq)} belongs")
            if entry.previous != previous:
                raise self._broken(f"{name} does not follow the entry before it")
            previous = entry.hash
            entries.append(entry)
        return entries

    def verify(self, anchors: Mapping[int, str] | None = None) -> int:
        """Check the whole chain.

        Args:
            anchors: seq to hash, as tagged on the registry's versions. They show that entries were cut off the end,
                or that the whole chain was rewritten.

        Returns:
            The number of entries.

        Raises:
            ArtifactError: the chain is broken or lacks an anchored entry.
        """
        hashes = {entry.seq: entry.hash for entry in self.entries()}
        for seq, expected in (anchors or {}).items():
            if hashes.get(seq) != expected:
                raise self._broken(f"entry {seq} is not the one the registry remembers ({expected[:12]})")
        return len(hashes)

    def history(self) -> list[Entry]:
        """Return the entries of this model, oldest first, after verifying the chain."""
        return [entry for entry in self.entries() if entry.model == self.model]

    def moves(self) -> list[Entry]:
        """Return the entries of this model that set the champion, oldest first."""
        return [entry for entry in self.history() if entry.action in MOVES]

    def champion(self) -> str | None:
        """Return the version that the alias has to point to."""
        history = self.history()
        return history[-1].champion if history else None

    def choice(self) -> Entry | None:
        """Return the entry that made the champion champion, None where there is no champion.

        It reads the newest entries only, and leaves the chain to `verify`.

        Raises:
            ArtifactError: an entry that was read was changed.
        """
        champion: str | None = None
        for name in reversed(self.storage.names(FOLDER)):
            entry = self._checked(name)
            if entry.model != self.model:
                continue
            champion = champion or entry.champion
            if champion is None or (entry.action in ("promote", "rollback") and entry.version == champion):
                return entry if champion else None
        return None

    def earlier_champions(self) -> list[str]:
        """Return the champions before this one, the last before it at the end.

        A rollback discards the champions that it skips. Rolling back twice therefore goes back two champions and
        never returns to the one that was left.
        """
        stack: list[str] = []
        for entry in self.history():
            if entry.champion is None:
                stack = []
            elif entry.champion in stack and entry.action in ("rollback", "restore"):
                del stack[stack.index(entry.champion) + 1 :]
            elif entry.champion not in stack[-1:]:
                stack.append(entry.champion)
        return stack[:-1]

    def append(self, seen: int, draft: Draft, fence: int = 0) -> Entry:
        """Add an entry, if no other was added since the caller read the ledger.

        Args:
            seen: number of entries the decision was made on.
            draft: the decision.
            fence: token of the lease that is held, 0 without one.

        Raises:
            LeaseLost: another entry was added, or a later holder of the lease has written. The caller must read the
                ledger and decide again.
        """
        entries = self.entries()
        newest = max((entry.fence for entry in entries), default=0)
        if len(entries) != seen or newest > fence:
            raise lost(fence, newest)
        before = next((entry.champion for entry in reversed(entries) if entry.model == self.model), None)
        entry = Entry(
            seq=seen + 1,
            previous=entries[-1].hash if entries else GENESIS,
            at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            model=self.model,
            action=draft.action,
            version=draft.version,
            champion_before=before,
            champion=draft.champion,
            run_id=draft.run_id,
            reason=draft.reason,
            numbers=json.loads(json.dumps(draft.numbers)),
            fence=fence,
        )
        entry = Entry(**{**asdict(entry), "hash": entry.computed_hash()})
        if not self.storage.create(f"{FOLDER}/{_name(entry.seq)}", entry.encode()):
            raise lost(fence, fence)
        logger.info(
            "ledger seq=%d action=%s version=%s champion=%s before=%s",
            *(entry.seq, entry.action, entry.version, entry.champion, before),
        )
        return entry

    def size(self) -> int:
        """Return the number of entries of all models."""
        return len(self.storage.names(FOLDER))

    def _read(self, name: str) -> Entry:
        text = self.storage.read(f"{FOLDER}/{name}")
        try:
            return Entry(**json.loads(text or b""))
        except (TypeError, ValueError) as error:
            raise self._broken(f"{name} is not an entry ({error})") from error

    def _checked(self, name: str) -> Entry:
        entry = self._read(name)
        if entry.hash != entry.computed_hash():
            raise self._broken(f"{name} does not match its own hash")
        return entry

    def _broken(self, found: str) -> ArtifactError:
        return ArtifactError(
            f"The ledger {self.storage.uri}/{FOLDER} was tampered with: {found}.",
            "Restore the folder from a backup until crane ledger verify succeeds; no alias moves before that.",
        )


def _name(seq: int) -> str:
    return f"{seq:08d}.json"
