"""Which runs and artifacts of a store are needed, and removing the others.

Needed are the runs of a registered version that carries an alias, of the newest champions of the ledger, of windows
that ended within some days before the newest one's, and of running jobs; and the run that each of these goes on from
(`etl.base_run`). A run and its refit run are needed together. An artifact is needed if the record of such a run names
it, or a running job looks for it.

The record of a run goes first, then the artifacts. So whatever is killed, no record names an artifact that is gone. An
artifact becomes absent in one step; its files are removed afterwards.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from crane_core.refit import both_runs
from crane_core.release.ledger import Entry
from crane_core.stages import STAGES
from crane_core.storage.artifacts import ArtifactStore
from crane_core.storage.claims import REMOVAL, Claim
from crane_core.storage.lease import HeldLease, Lease

logger = logging.getLogger(__name__)

RUNS, REPORTS = "runs", "reports"


@dataclass
class Excess:
    """What nothing needs.

    Attributes:
        runs: run ids, sorted.
        artifacts: stage to fingerprints.
        num_kept: runs that are needed.
    """

    runs: list[str]
    artifacts: dict[str, list[str]]
    num_kept: int


@dataclass
class Removed:
    """What was removed.

    Attributes:
        stages: stage, `runs` or `reports`, to bytes.
        rest: what is left to discard.
    """

    stages: dict[str, int] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)

    def add(self, stage: str, num_bytes: int) -> None:
        self.stages[stage] = self.stages.get(stage, 0) + num_bytes


def champion_runs(entries: Iterable[Entry], keep_versions: int) -> set[str]:
    """Return the runs of the newest champions, the one in service included, of every model of a ledger.

    Args:
        entries: the whole ledger, oldest first.
        keep_versions: champions to keep per model.
    """
    runs: dict[tuple[str, str], str] = {}
    order: dict[str, list[str]] = {}
    for entry in entries:
        if entry.action in ("promote", "rollback"):
            runs[entry.model, entry.version] = entry.run_id
        stack = order.setdefault(entry.model, [])
        if entry.champion is None:
            continue
        if entry.champion in stack and entry.action in ("rollback", "restore"):
            # The champions that a rollback skips are behind those it can go back to.
            place = stack.index(entry.champion)
            order[entry.model] = [*stack[place + 1 :], *stack[: place + 1]]
        elif entry.champion != (stack[-1] if stack else None):
            order[entry.model] = [*(each for each in stack if each != entry.champion), entry.champion]
    kept = ((model, version) for model, stack in order.items() for version in stack[-keep_versions:])
    return {runs[each] for each in kept if each in runs}


def find_excess(store: ArtifactStore, keep_days: int, roots: set[str], claims: Iterable[Claim]) -> Excess:
    """Find the runs and artifacts that nothing needs.

    Args:
        store: holds them.
        keep_days: days before the newest window's end; a window that ends later than now counts as ending now.
        roots: runs that are needed whatever their windows.
        claims: of running jobs.
    """
    claimed = list(claims)
    configs = {run: store.recorded_config(run) for run in store.run_ids()}
    known = {run: config for run, config in configs.items() if config is not None}
    ends = {run: datetime.fromisoformat(config["window"]["end"]) for run, config in known.items()}
    newest = min(max(ends.values(), default=datetime.now(UTC)), datetime.now(UTC))
    needed = {run for run, end in ends.items() if end > newest - timedelta(days=keep_days)}
    needed |= roots | {claim.run for claim in claimed}
    needed = _with_refits(needed)
    needed |= _with_refits({base for run in needed & set(known) if (base := known[run]["etl"].get("base_run"))})
    fingerprints = {claim.fingerprint for claim in claimed if claim.fingerprint}
    fingerprints |= {each for run in needed for each in _fingerprints(store, run)}
    artifacts = {stage: [name for name in store.storage.names(stage) if name not in fingerprints] for stage in STAGES}
    return Excess(sorted(set(configs) - needed), artifacts, len(set(configs) & needed))


def remove(store: ArtifactStore, excess: Excess, lease: HeldLease, protected: set[str]) -> Removed:
    """Make absent what nothing needs; the caller discards the rest when it holds the lease no more.

    Args:
        store: holds it.
        excess: what to remove.
        lease: on the folder `REMOVAL`.
        protected: fingerprints of running jobs, whose unfinished files stay.

    Raises:
        LeaseLost: another process removes things by now.
    """
    removed, storage = Removed(), store.storage
    for run in excess.runs:
        lease.check()
        removed.add(RUNS, storage.size(f"{RUNS}/{run}"))
        removed.rest += storage.withdraw(f"{RUNS}/{run}")
        report = f"{REPORTS}/{run}.html"
        removed.add(REPORTS, len(storage.read(report) or b""))
        storage.delete(report)
    for stage, fingerprints in excess.artifacts.items():
        for fingerprint in fingerprints:
            lease.check()
            removed.add(stage, storage.size(f"{stage}/{fingerprint}"))
            removed.rest += storage.withdraw(f"{stage}/{fingerprint}")
    for folder in (RUNS, *STAGES):
        for name, rest in storage.leftovers(folder).items():
            if name not in protected:
                removed.rest += [each for each in rest if each not in removed.rest]
    return removed


def sizes(store: ArtifactStore, excess: Excess) -> dict[str, int]:
    """Return the bytes of what `remove` would remove, by stage."""
    storage = store.storage
    found = {RUNS: sum(storage.size(f"{RUNS}/{run}") for run in excess.runs)}
    found[REPORTS] = sum(len(storage.read(f"{REPORTS}/{run}.html") or b"") for run in excess.runs)
    for stage, fingerprints in excess.artifacts.items():
        found[stage] = sum(storage.size(f"{stage}/{fingerprint}") for fingerprint in fingerprints)
    return found


def removal_lease(store: ArtifactStore) -> Lease:
    """Return the lease under which things are removed, after clearing its former terms."""
    storage = store.storage
    for name in storage.names(REMOVAL)[:-1]:
        storage.delete(f"{REMOVAL}/{name}")
    return Lease(storage, folder=REMOVAL)


def _with_refits(runs: Iterable[str]) -> set[str]:
    return {each for run in runs for each in both_runs(run)}


def _fingerprints(store: ArtifactStore, run: str) -> Iterator[str]:
    """Yield the artifacts that the record of a run names."""
    for name in store.storage.names(f"{RUNS}/{run}"):
        entry = json.loads(store.storage.read(f"{RUNS}/{run}/{name}") or b"{}")
        if "fingerprint" in entry:
            yield entry["fingerprint"]
