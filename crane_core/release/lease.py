"""One mover of the champion at a time: a lease in the store that outlives no crash by more than its seconds.

Every term is an object of its own, `{store}/lease/{token:08d}.json`, made only if it does not exist, so that one of
many wins; its number is the fencing token that the ledger writes into its entries. The holder alone rewrites its term,
to prolong or to end it. A term that is neither ended nor prolonged runs out, and the next token takes over: whoever
still believes in the older one is refused by the ledger. Clocks of the machines that promote may differ by seconds,
not by a term.
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
    """Somebody else moves the champion meanwhile; running again reads and decides anew."""


@dataclass(frozen=True)
class Term:
    """One tenure of the lease.

    Attributes:
        token: its number, from 1; grows with every tenure.
        owner: host, process and what it is about.
        expires_at: seconds since the epoch.
        released: whether the owner has ended it.
    """

    token: int
    owner: str
    expires_at: float
    released: bool = False

    @property
    def key(self) -> str:
        return f"{FOLDER}/{self.token:08d}.json"

    def encode(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()


class Lease:
    """The lease of one store.

    Args:
        storage: where it lives.
        seconds: length of a term; a holder that died blocks the others that long.
    """

    def __init__(self, storage: Storage, seconds: float = SECONDS) -> None:
        self.storage = storage
        self.seconds = seconds

    @contextlib.contextmanager
    def hold(self, purpose: str) -> Iterator[Tenure]:
        """Wait for the lease, keep it for the block, end it.

        Args:
            purpose: what for, as those who wait are told.
        """
        tenure = Tenure(self, self._acquire(f"{socket.gethostname()}:{os.getpid()} {purpose}"))
        with tenure:
            yield tenure

    def newest(self) -> Term | None:
        """The last term, whatever its state."""
        names = self.storage.names(FOLDER)
        text = self.storage.read(f"{FOLDER}/{names[-1]}") if names else None
        return Term(**json.loads(text)) if text else None

    def _acquire(self, owner: str) -> Term:
        told = 0.0
        while True:
            last = self.newest()
            if last is None or last.released or last.expires_at <= time.time():
                term = Term(last.token + 1 if last else 1, owner, time.time() + self.seconds)
                if self.storage.create(term.key, term.encode()):
                    logger.info("lease token=%d owner=%s", term.token, owner)
                    return term
            elif time.monotonic() - told > NOTICE_SECONDS:
                told = time.monotonic()
                left = last.expires_at - time.time()
                logger.info("waiting for=lease token=%d held_by=%s expires_in=%.0f", last.token, last.owner, left)
            # Waiters that wake together would fight again.
            time.sleep(POLL_SECONDS * random.uniform(0.5, 1.5))


class Tenure:
    """A held lease: a thread prolongs the term three times before it runs out.

    Args:
        lease: the lease.
        term: the term that was won.
    """

    def __init__(self, lease: Lease, term: Term) -> None:
        self._lease = lease
        self._term = term
        self._over = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="lease", daemon=True)

    @property
    def token(self) -> int:
        """The fencing token."""
        return self._term.token

    def check(self) -> None:
        """Make sure that nobody has taken over.

        Raises:
            LeaseLost: somebody has.
        """
        last = self._lease.newest()
        if last is None or last.token != self.token:
            raise lost(self.token, last.token if last else 0)

    def __enter__(self) -> Tenure:
        self._keeper.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._keeper.join()
        # The work is done or has failed already; at worst the term runs out by itself.
        with contextlib.suppress(OSError):
            self._lease.storage.write(self._term.key, replace(self._term, released=True).encode())

    def _keep(self) -> None:
        while not self._over.wait(self._lease.seconds / 4):
            self._term = replace(self._term, expires_at=time.time() + self._lease.seconds)
            try:
                self._lease.storage.write(self._term.key, self._term.encode())
            except Exception as error:
                logger.warning("lease token=%d not prolonged: %s", self.token, error)


def lost(mine: int, newest: int) -> LeaseLost:
    """The error of a holder that was overtaken."""
    return LeaseLost(
        f"The lease ran out and was taken over: token {mine} is held here, {newest} is the newest.",
        "Run the same command again: it reads the ledger and decides anew.",
    )
