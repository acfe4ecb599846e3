"""A lock in the store: one process at a time changes the alias `champion`, or removes what nothing needs.

After a crash it expires within 60 s. Every term of the lease is an object of its own,
`{store}/{folder}/{token:08d}.json`. It is made only if it does not exist, so one of several processes wins. Its number
is the fencing token that the ledger writes into its entries. Only the holder rewrites its term, to prolong or to end
it. A term that is neither ended nor prolonged expires, and another process takes the next token; the ledger then
refuses entries with the older one. The clocks of the machines that promote may differ by seconds, but not by the length
of a term.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from crane_core.errors import CraneError
from crane_core.storage import Storage

logger = logging.getLogger(__name__)

FOLDER = "lease"
SECONDS = 60.0
POLL_SECONDS = 0.5
NOTICE_SECONDS = 15.0


class LeaseLost(CraneError):
    """Another process holds the lease by now; running the job again reads the ledger and decides anew."""


@dataclass(frozen=True)
class Term:
    """One term of the lease, as it is stored.

    Attributes:
        token: its number, from 1; the next term has the next number.
        owner: host, process and purpose.
        expires_at: seconds since the epoch.
        released: whether the owner has ended it.
    """

    token: int
    owner: str
    expires_at: float
    released: bool = False

    @property
    def name(self) -> str:
        return f"{self.token:08d}.json"

    @property
    def is_over(self) -> bool:
        """Whether the owner has ended it, or it has expired."""
        return self.released or self.expires_at <= time.time()

    def encode(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()


class Lease:
    """The lease of one store.

    Args:
        storage: holds the terms.
        seconds: length of a term; after a crash the others wait that long at most.
        folder: of the terms in the store; each folder is a lock of its own.
    """

    def __init__(self, storage: Storage, seconds: float = SECONDS, folder: str = FOLDER) -> None:
        self.storage = storage
        self.seconds = seconds
        self.folder = folder

    @contextlib.contextmanager
    def hold(self, purpose: str) -> Iterator[HeldLease]:
        """Wait for the lease, keep it for the block, end it.

        Args:
            purpose: shown in the log of the processes that wait.
        """
        held = HeldLease(self, self.acquire(f"{socket.gethostname()}:{os.getpid()} {purpose}"))
        with held:
            yield held

    def newest(self) -> Term | None:
        """Return the last term, whatever its state; None before the first."""
        names = self.storage.names(self.folder)
        text = self.storage.read(f"{self.folder}/{names[-1]}") if names else None
        return Term(**json.loads(text)) if text else None

    def acquire(self, owner: str) -> Term:
        """Wait until no other term runs, and make the next one.

        Args:
            owner: host, process and purpose.
        """
        told = 0.0
        while True:
            last = self.newest()
            if last is None or last.is_over:
                term = Term(last.token + 1 if last else 1, owner, time.time() + self.seconds)
                if self.storage.create(f"{self.folder}/{term.name}", term.encode()):
                    logger.info("lease token=%d owner=%s", term.token, owner)
                    return term
            elif time.monotonic() - told > NOTICE_SECONDS:
                told = time.monotonic()
                left = last.expires_at - time.time()
                logger.info("waiting for=lease token=%d held_by=%s expires_in=%.0f", last.token, last.owner, left)
            # Processes that wake at the same moment would compete again.
            time.sleep(POLL_SECONDS * random.uniform(0.5, 1.5))


class HeldLease:
    """A lease while it is held: a thread prolongs the term three times before it expires.

    Args:
        lease: the lease.
        term: the term that was acquired.
    """

    def __init__(self, lease: Lease, term: Term) -> None:
        self._lease = lease
        self._term = term
        self._over = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="lease", daemon=True)

    @property
    def token(self) -> int:
        """Fencing token of the term."""
        return self._term.token

    def check(self) -> None:
        """Make sure that no other process has taken over.

        Raises:
            LeaseLost: another process has.
        """
        last = self._lease.newest()
        if last is None or last.token != self.token:
            raise lost(self.token, last.token if last else 0)

    def __enter__(self) -> HeldLease:
        self._keeper.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._keeper.join()
        # The work is done or has failed already. If this write fails too, the term expires by itself.
        with contextlib.suppress(OSError):
            self._write(replace(self._term, released=True))

    def _write(self, term: Term) -> None:
        self._lease.storage.write(f"{self._lease.folder}/{term.name}", term.encode())

    def _keep(self) -> None:
        while not self._over.wait(self._lease.seconds / 4):
            self._term = replace(self._term, expires_at=time.time() + self._lease.seconds)
            try:
                self._write(self._term)
            except Exception as error:
                logger.warning("lease token=%d not prolonged: %s", self.token, error)


def lost(mine: int, newest: int) -> LeaseLost:
    """Return the error for a process whose lease another one has taken over."""
    return LeaseLost(
        f"The lease expired and was taken over: token {mine} is held here, {newest} is the newest.",
        "Run the same command again: it reads the ledger and decides anew.",
    )
