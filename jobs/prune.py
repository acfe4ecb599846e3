"""Remove the runs and artifacts that nothing needs: `python -m jobs.prune --store URI --keep-days N [--dry-run]`.

Kept are the runs of versions with an alias, of the last `promote.keep_versions` champions of the ledger, of windows
that ended within N days before the newest one's, and of jobs that are running; the runs that these go on from; the
refit run of each; and every artifact that the record of one of them names. Registered versions stay, and those whose
run is gone are tagged `crane.pruned`. The job may run beside any other job of the store, and after a kill the next one
removes the rest.

Without `--keep-days` it obeys `runtime.keep_days`, and does nothing where that is not set either.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from crane_core.config import RunConfig
from crane_core.errors import ConfigError
from crane_core.release.ledger import Ledger
from crane_core.release.registry import PRUNED_TAG, Registry, open_registry
from crane_core.release.retention import Excess, champion_runs, find_excess, removal_lease, remove, sizes
from crane_core.storage.artifacts import ArtifactStore
from crane_core.storage.lease import Lease
from jobs.entry_points import load_general, run_command

logger = logging.getLogger(__name__)

DAY_SECONDS = 86400.0


def prune(store: ArtifactStore, config: RunConfig, keep_days: int, dry_run: bool) -> dict[str, Any]:
    """Remove what nothing needs, or only say what that is.

    Args:
        store: the store.
        config: names the registry, and how many champions are kept.
        keep_days: days before the end of the newest window.
        dry_run: remove nothing.
    """
    if keep_days < 1:
        raise ConfigError(f"--keep-days is {keep_days}.", "Give --keep-days 1 or more, for example --keep-days 30.")
    registry = open_registry(config.runtime, store.storage.uri)
    seconds = DAY_SECONDS * max(keep_days, config.runtime.scratch_days)
    if dry_run:
        excess = _excess(store, config, registry, keep_days, seconds)[0]
        stages, versions = sizes(store, excess), _versions(registry, excess)
    else:
        # No alias moves meanwhile, and no job starts to use what is being removed.
        with Lease(store.storage).hold("prune"), removal_lease(store).hold("prune") as lease:
            excess, protected = _excess(store, config, registry, keep_days, seconds)
            versions = _versions(registry, excess)
            for number in versions:
                registry.tag(number, {PRUNED_TAG: datetime.now(UTC).isoformat(timespec="seconds")})
            removed = remove(store, excess, lease, protected)
        store.storage.discard(removed.rest)
        stages = removed.stages
    stages = {stage: num_bytes for stage, num_bytes in stages.items() if num_bytes}
    num_artifacts = sum(map(len, excess.artifacts.values()))
    for stage, num_bytes in stages.items():
        logger.info("%s stage=%s bytes=%d", "would_free" if dry_run else "freed", stage, num_bytes)
    return {
        "status": "planned" if dry_run else "done",
        "keep_days": keep_days,
        "runs": excess.runs,
        "num_kept": excess.num_kept,
        "num_artifacts": num_artifacts,
        "bytes": sum(stages.values()),
        "stages": stages,
        "versions": versions,
    }


def _excess(
    store: ArtifactStore, config: RunConfig, registry: Registry, keep_days: int, seconds: float
) -> tuple[Excess, set[str]]:
    """Find what nothing needs, and the fingerprints that running jobs claim."""
    entries = Ledger(store.storage, registry.name).entries()
    roots = registry.aliased_runs() | champion_runs(entries, config.promote.keep_versions)
    claims = store.claims.valid(seconds)
    return find_excess(store, keep_days, roots, claims), {each.fingerprint for each in claims if each.fingerprint}


def _versions(registry: Registry, excess: Excess) -> list[str]:
    """Return the versions whose run is not needed and that do not say so yet."""
    gone = set(excess.runs)
    return [
        version.number
        for version in registry.versions()
        if version.tags.get("crane.run") in gone and not version.tags.get(PRUNED_TAG)
    ]


def _job(arguments: argparse.Namespace, store: ArtifactStore) -> dict[str, Any]:
    config = load_general(arguments)
    keep_days = arguments.keep_days if arguments.keep_days is not None else config.runtime.keep_days
    if keep_days is None:
        logger.info("skipped reason=runtime.keep_days_is_not_set")
        return {"status": "skipped", "reason": "Neither --keep-days nor runtime.keep_days is set."}
    return prune(store, config, keep_days, arguments.dry_run)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", help="run whose DAG asks; every run is treated alike")
    parser.add_argument("--keep-days", type=int, metavar="N", help="days before the newest window's end")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("prune", _job, argv, flags=add_flags)


if __name__ == "__main__":
    raise SystemExit(main())
