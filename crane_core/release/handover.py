"""Make the alias `champion` follow the ledger, and test the model through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from crane_core.errors import ArtifactError, CraneError
from crane_core.release.ledger import ANCHOR_TAG, FOLDER, Entry, Ledger, logger

CHAMPION = "champion"
MAX_MOVES = 10
SMOKE_TAG = "crane.smoke"


class Aliases(Protocol):
    """What the ledger needs of a model registry."""

    def holder(self, alias: str) -> str | None:
        """The version an alias points to."""

    def set_alias(self, alias: str, number: str | None) -> None:
        """Point an alias to a version, or nowhere."""

    def tag(self, number: str, tags: Mapping[str, str]) -> None:
        """Note something on a version."""

    def noted(self, number: str, tag: str) -> str | None:
        """What was noted on a version under a tag."""


def settle(ledger: Ledger, aliases: Aliases) -> str | None:
    """Make the alias follow the ledger, whoever died or raced in between; read both again after every move.

    Returns:
        The champion, who carries the alias.

    Raises:
        ArtifactError: the registry has a champion and the ledger no entry, the chain is broken, or somebody else keeps
            moving the alias.
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
        if holder == champion:
            return champion
        logger.info("alias %s from=%s to=%s ledger_seq=%d", CHAMPION, holder, champion, history[-1].seq)
        aliases.set_alias(CHAMPION, champion)
    raise ArtifactError(
        f"The alias {CHAMPION!r} of model {ledger.model!r} does not stay where the ledger puts it.",
        "Stop what else sets it (only jobs.ml.promote and jobs.ml.rollback may), then run the job again.",
    )


def recover(ledger: Ledger, aliases: Aliases, smoke: Callable[[Entry], object], fence: int) -> Entry | None:
    """Finish what a holder of the lease that died has left: a stale alias, or a champion that nobody has tested.

    Args:
        ledger, aliases: whose.
        smoke: tests the version of an entry through the alias and raises when its answers are wrong.
        fence: token of the lease that is held.

    Returns:
        The entry whose test was made up for and passed, None when there was none. The champion is tested either way.
    """
    settle(ledger, aliases)
    moves = [entry for entry in ledger.history() if entry.action != "refuse"]
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
    """Whether the smoke test of an entry has passed; what is restored was confirmed when it was promoted."""
    return entry.action == "restore" or aliases.noted(entry.version, SMOKE_TAG) == str(entry.seq)


def hand_over(ledger: Ledger, aliases: Aliases, entry: Entry, smoke: Callable[[], object], fence: int) -> None:
    """Carry out an entry that makes a version champion: move the alias, test through it, confirm or take it back.

    Args:
        ledger: holds the entry already.
        aliases: the registry.
        entry: a `promote` or `rollback`, the newest entry that moves the champion.
        smoke: loads the model through the alias and raises when its answers are wrong.
        fence: token of the lease that is held.

    Raises:
        ArtifactError: the smoke test failed; the alias is back where it was and the ledger says so.
    """
    aliases.tag(entry.version, {f"{ANCHOR_TAG}{entry.seq}": entry.hash})
    settle(ledger, aliases)
    try:
        smoke()
    except Exception as error:
        restored = restore(ledger, aliases, entry, f"version {entry.version} failed its smoke test ({error})", fence)
        remedy = error.remedy if isinstance(error, CraneError) else "Run python -m jobs.ml.register for its run again."
        raise ArtifactError(
            f"Version {entry.version} of model {ledger.model!r} failed its smoke test ({error}); the champion is "
            f"{restored.champion or 'nobody'} again.",
            remedy,
        ) from error
    aliases.tag(entry.version, {SMOKE_TAG: str(entry.seq)})


def restore(ledger: Ledger, aliases: Aliases, entry: Entry, why: str, fence: int) -> Entry:
    """Take the newest move of the champion back: one line in the ledger, then the alias.

    Args:
        ledger, aliases: whose.
        entry: the `promote` or `rollback`.
        why: half a sentence.
        fence: token of the lease that is held.
    """
    reason = f"Restored: {why}."
    before = entry.champion_before
    restored = ledger.append(
        ledger.size(), "restore", entry.version, before, entry.run_id, reason, {"restores": entry.seq}, fence
    )
    settle(ledger, aliases)
    aliases.tag(entry.version, {f"{ANCHOR_TAG}{restored.seq}": restored.hash})
    return restored
