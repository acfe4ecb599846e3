"""Set the alias `champion` to what the ledger says, and test the model through the alias."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from crane_core.errors import ArtifactError, CraneError
from crane_core.release.ledger import ANCHOR_TAG, FOLDER, Draft, Entry, Ledger

logger = logging.getLogger(__name__)

CHAMPION = "champion"
MAX_MOVES = 10
SMOKE_TAG = "crane.smoke"


class Aliases(Protocol):
    """The part of a model registry that moving the champion needs."""

    def holder(self, alias: str) -> str | None:
        """Return the version an alias points to."""

    def set_alias(self, alias: str, number: str | None) -> None:
        """Point an alias to a version, or remove it."""

    def tag(self, number: str, tags: Mapping[str, str]) -> None:
        """Write tags on a version."""

    def tag_of(self, number: str, tag: str) -> str | None:
        """Return the value of a tag of a version."""

    def exists(self, number: str) -> bool:
        """Return whether there is a version with a number."""


def settle(ledger: Ledger, aliases: Aliases) -> str | None:
    """Set the alias to the champion of the ledger. Both are read again after every change, in case of a crash or race.

    Returns:
        The champion, to which the alias points now; None where there is none, or where the registry has lost it.

    Raises:
        ArtifactError: the registry has a champion and the ledger no entry, the chain is broken, or another process
            keeps moving the alias.
    """
    for _ in range(MAX_MOVES):
        history = ledger.history()
        holder = aliases.holder(CHAMPION)
        if not history:
            if holder is not None:
                raise ArtifactError(
                    f"Version {holder} of model {ledger.model!r} carries the alias {CHAMPION!r} without an entry in "
                    f"{ledger.storage.uri}/{FOLDER}.",
                    "Give --store of the store whose ledger belongs to this registry, or delete the alias there.",
                )
            return None
        champion = history[-1].champion
        if champion is not None and not aliases.exists(champion):
            logger.warning("lost version=%s: it is champion, and the registry does not have it", champion)
            champion = None
        if holder == champion:
            return champion
        logger.info("alias %s from=%s to=%s ledger_seq=%d", CHAMPION, holder, champion, history[-1].seq)
        aliases.set_alias(CHAMPION, champion)
    raise ArtifactError(
        f"The alias {CHAMPION!r} of model {ledger.model!r} does not stay where the ledger puts it.",
        "Stop what else sets it (only jobs.ml.promote and jobs.ml.rollback may), then run the job again.",
    )


def recover(ledger: Ledger, aliases: Aliases, smoke: Callable[[Entry], object], fence: int) -> Entry | None:
    """Finish what a crashed process has left: a stale alias, or a champion that was not tested.

    Args:
        ledger: the decisions.
        aliases: the registry.
        smoke: tests the version of an entry through the alias and raises when its recommendations are wrong.
        fence: token of the lease that is held.

    Returns:
        The entry whose test was missing and has passed now, None when there was none. The champion is tested either
        way.
    """
    settle(ledger, aliases)
    moves = ledger.moves()
    if not moves or is_confirmed(moves[-1], aliases):
        return None
    logger.warning("unfinished ledger_seq=%d version=%s: testing it now", moves[-1].seq, moves[-1].version)
    try:
        hand_over(ledger, aliases, moves[-1], lambda: smoke(moves[-1]), fence)
    except ArtifactError as error:
        logger.warning("%s", error.found)
        settle(ledger, aliases)
        return None
    return moves[-1]


def is_confirmed(entry: Entry, aliases: Aliases) -> bool:
    """Return whether the smoke test of an entry has passed; a restored version passed it when it was promoted.

    Of a version that the registry has lost nobody knows; taking its promotion back would be no help either way.
    """
    if entry.action in ("restore", "repair") or not aliases.exists(entry.version):
        return True
    return aliases.tag_of(entry.version, SMOKE_TAG) == str(entry.seq)


def hand_over(ledger: Ledger, aliases: Aliases, entry: Entry, smoke: Callable[[], object], fence: int) -> None:
    """Carry out an entry that makes a version champion: move the alias, test through it, then confirm or restore.

    Args:
        ledger: holds the entry already.
        aliases: the registry.
        entry: a `promote` or `rollback`, the newest entry that moves the champion.
        smoke: loads the model through the alias and raises when its recommendations are wrong.
        fence: token of the lease that is held.

    Raises:
        ArtifactError: the smoke test failed. The alias is back where it was, and the ledger has an entry for it.
    """
    anchor(aliases, entry)
    settle(ledger, aliases)
    try:
        smoke()
    except Exception as error:
        restored = restore(ledger, aliases, entry, f"version {entry.version} failed its smoke test ({error})", fence)
        remedy = error.remedy if isinstance(error, CraneError) else "Run python -m jobs.ml.register for its run again."
        raise ArtifactError(
            f"Version {entry.version} of model {ledger.model!r} failed its smoke test ({error}); the champion is again "
            f"{f'version {restored.champion}' if restored.champion else 'none'}.",
            remedy,
        ) from error
    aliases.tag(entry.version, {SMOKE_TAG: str(entry.seq)})


def restore(ledger: Ledger, aliases: Aliases, entry: Entry, why: str, fence: int) -> Entry:
    """Take the newest change of the champion back: first an entry in the ledger, then the alias.

    Args:
        ledger: the decisions.
        aliases: the registry.
        entry: the `promote` or `rollback`.
        why: half a sentence.
        fence: token of the lease that is held.
    """
    reason = f"Restored: {why}."
    before = entry.champion_before
    draft = Draft("restore", entry.version, before, entry.run_id, reason, {"restores": entry.seq})
    restored = ledger.append(ledger.size(), draft, fence)
    settle(ledger, aliases)
    anchor(aliases, restored)
    return restored


def anchor(aliases: Aliases, entry: Entry) -> None:
    """Let the version of an entry remember the entry's hash, if the registry still has the version."""
    if aliases.exists(entry.version):
        aliases.tag(entry.version, {f"{ANCHOR_TAG}{entry.seq}": entry.hash})
