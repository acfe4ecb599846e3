"""Entries of a ledger, and the aliases of a model registry in memory."""

from __future__ import annotations

from collections.abc import Mapping

from crane_core.release.ledger import Action, Draft, Entry, Ledger


class MemoryAliases:
    """Aliases and tags of a model registry, in memory."""

    def __init__(self) -> None:
        self.champion: str | None = None
        self.tags: dict[str, dict[str, str]] = {}
        self.removed: set[str] = set()

    def exists(self, number: str) -> bool:
        return number not in self.removed

    def holder(self, alias: str) -> str | None:
        return self.champion

    def set_alias(self, alias: str, number: str | None) -> None:
        self.champion = number

    def tag(self, number: str, tags: Mapping[str, str]) -> None:
        self.tags.setdefault(number, {}).update(tags)

    def tag_of(self, number: str, tag: str) -> str | None:
        return self.tags.get(number, {}).get(tag)


def promote(ledger: Ledger, version: str, action: Action = "promote") -> Entry:
    """Write an entry that sets the champion."""
    return ledger.append(ledger.size(), draft(version, action))


def draft(version: str, action: Action = "promote", reason: str = "because") -> Draft:
    return Draft(action, version, version, f"run-{version}", reason, {"recall": 0.25})
