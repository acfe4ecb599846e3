"""What running jobs need of a store, so that nobody removes it. A claim is one object, `{store}/claims/{name}.json`.

A job writes a claim first and then looks whether somebody removes things at this moment. If so, it waits for the end.
`crane_core.release.retention` takes its lease first and then reads the claims. So a job either finds what it looks for
before it is removed and its claim is seen, or it looks once that is over, does not find it, and makes it again.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from dataclasses import asdict, dataclass

from crane_core.storage import Storage
from crane_core.storage.lease import Lease

logger = logging.getLogger(__name__)

FOLDER = "claims"
REMOVAL = "removal"
"""Folder of the lease that is held while things are removed."""
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Claim:
    """What a job needs.

    Attributes:
        run: a run, with everything that it reaches.
        fingerprint: of an artifact which the job looks for or makes, None where only the run is claimed.
        at: when it was written, seconds since the epoch.
    """

    run: str
    fingerprint: str | None
    at: float


class Claims:
    """The claims of one store, and those of this process among them.

    Args:
        storage: holds the claims.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._mine: list[str] = []

    def claim(self, run: str, fingerprint: str | None = None) -> None:
        """Claim a run, or an artifact for it, until `release`; wait while things are being removed."""
        name = f"{uuid.uuid4().hex}.json"
        self._mine.append(name)
        self._write(name, Claim(run, fingerprint, time.time()))

    def keep(self, run: str) -> None:
        """Claim a run until `drop`, past the end of this process."""
        self._write(f"run-{run}.json", Claim(run, None, time.time()))

    def drop(self, run: str) -> None:
        """Take the claim of `keep` back, if there is one."""
        self._storage.delete(f"{FOLDER}/run-{run}.json")

    def release(self) -> None:
        """Take back all claims of this process but those of `keep`."""
        while self._mine:
            self._storage.delete(f"{FOLDER}/{self._mine.pop()}")

    def valid(self, seconds: float) -> list[Claim]:
        """Return the claims that are younger than some seconds, and remove the others: their jobs were killed."""
        found = []
        for name in self._storage.names(FOLDER):
            text = self._storage.read(f"{FOLDER}/{name}")
            if text is None:
                continue
            claim = Claim(**json.loads(text))
            if claim.at > time.time() - seconds:
                found.append(claim)
            else:
                self._storage.delete(f"{FOLDER}/{name}")
        return found

    def _write(self, name: str, claim: Claim) -> None:
        self._storage.write(f"{FOLDER}/{name}", json.dumps(asdict(claim)).encode())
        lease, told = Lease(self._storage, folder=REMOVAL), False
        while (term := lease.newest()) is not None and not term.is_over:
            if not told:
                logger.info("waiting for=removal held_by=%s", term.owner)
                told = True
            time.sleep(POLL_SECONDS)
