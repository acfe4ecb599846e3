"""Read what was built: recommendations of the champion, similar items, runs, the ledger."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from crane_core.config import RunConfig, Runtime
from crane_core.errors import ArtifactError, ConfigError, DataError
from crane_core.refit import is_refit
from crane_core.release.handover import CHAMPION
from crane_core.release.ledger import Ledger
from crane_core.release.local_registry import read_registry
from crane_core.schema import BECAUSE, ITEM_ID, TITLE, USER_ID
from crane_core.stages import STAGES
from crane_core.storage.artifacts import Artifact, ArtifactStore

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Served:
    """The champion and its export.

    Attributes:
        version: champion's number in the registry.
        run_id: run that made it.
        export: its recommendations and similar items.
    """

    version: str
    run_id: str
    export: Artifact

    def titles(self) -> dict[str, str]:
        """Return item id to title, for the items that have one."""
        # Imported here, as below: it imports pyarrow, and `runs` does not need it.
        from crane_core.storage.rows import read_columns

        table = read_columns(self.export.file("items.parquet"), [ITEM_ID, TITLE])
        return {item: title for item, title in zip(table[ITEM_ID], table[TITLE], strict=True) if title}


def served(store: ArtifactStore, runtime: Runtime) -> Served:
    """Ask the ledger for the champion, and find the export of its version.

    Raises:
        ArtifactError: there is no champion, or its export is missing.
    """
    chosen = Ledger(store.storage, runtime.model_name).choice()
    if chosen is None:
        raise ArtifactError(
            f"Model {runtime.model_name!r} has no champion in the ledger of {store.storage.uri}.",
            "Promote a run: crane promote --run RUN (crane runs lists them).",
        )
    number = chosen.version
    # A run that registers a model which an earlier run has registered gets that run's version.
    exported = store.entry(chosen.run_id, "ml.export") or {}
    known = exported.get("version") == number
    run_id = exported["champion_run"] if known else read_registry(runtime, store.storage.uri).version(number).run_id
    return Served(number, run_id, store.artifact(run_id, "ml.export"))


def recommend(served: Served, user: str, k: int) -> dict[str, Any]:
    """Return the best k items of a user, at most as many as were exported.

    Raises:
        ConfigError: k is below 1.
        DataError: the user is unknown.
    """
    rows = _rows(served, "recommendations", USER_ID, user, ("rank", ITEM_ID, "score", BECAUSE), k)
    if not rows:
        raise DataError(
            f"User {user!r} has no recommendations in version {served.version} (run {served.run_id}).",
            f"Give an id of the data's {USER_ID} that has training interactions, for example "
            f"{', '.join(example_users(served))}.",
        )
    titles = served.titles()
    items = [
        {**row, "title": titles.get(row[ITEM_ID]), "because_title": titles.get(row.get(BECAUSE) or "")} for row in rows
    ]
    return {"user": user, "model_version": served.version, "run": served.run_id, "items": items}


def similar(served: Served, item: str, k: int) -> dict[str, Any]:
    """Return the k items most similar to an item, at most as many as were exported.

    Raises:
        ConfigError: k is below 1.
        DataError: the item is unknown.
    """
    rows = _rows(served, "similar", ITEM_ID, item, ("rank", "similar_item_id", "similarity"), k)
    titles = served.titles()
    if not rows:
        from crane_core.storage.rows import read_columns

        known = read_columns(served.export.file("items.parquet"), [ITEM_ID])[ITEM_ID]
        raise DataError(
            f"Item {item!r} has no similar items in version {served.version} (run {served.run_id}).",
            f"Give an id of the catalog, for example {', '.join(known[:NUM_EXAMPLES])}.",
        )
    items = [
        {
            "rank": row["rank"],
            ITEM_ID: row["similar_item_id"],
            "similarity": row["similarity"],
            "title": titles.get(row["similar_item_id"]),
        }
        for row in rows
    ]
    return {
        "item": item,
        "title": titles.get(item),
        "model_version": served.version,
        "run": served.run_id,
        "items": items,
    }


def example_users(served: Served) -> list[str]:
    """Return three users with recommendations: the first, the middle and the last by id."""
    import pyarrow.dataset as ds

    table = ds.dataset(served.export.file("recommendations")).to_table(columns=[USER_ID], filter=ds.field("rank") == 1)
    users = sorted(table[USER_ID].to_pylist())
    return [users[i] for i in sorted({0, len(users) // 2, len(users) - 1})] if users else []


def runs(store: ArtifactStore, runtime: Runtime) -> list[dict[str, Any]]:
    """Return every run of the store, sorted by the end of its window; a refit run is part of its run."""
    aliases = _aliases(store, runtime)
    names = [run_id for run_id in store.run_ids() if not is_refit(run_id)]
    return sorted((_run(store, run_id, aliases) for run_id in names), key=lambda run: (run["end"], run["run"]))


def verify_ledger(store: ArtifactStore, runtime: Runtime) -> dict[str, Any]:
    """Check the entries of the ledger, their chain, their copies in the registry, the alias, and the champion's files.

    Raises:
        ArtifactError: the ledger was tampered with, the alias is not where it puts it, or the champion was removed or
            changed in the registry.
    """
    # Imported here: it imports pandas, and most commands do not need it.
    from crane_core.release.damage import damage_of

    registry = read_registry(runtime, store.storage.uri)
    ledger = Ledger(store.storage, registry.name)
    anchors = registry.ledger_anchors()
    num_entries = ledger.verify(anchors)
    champion, holder = ledger.champion(), registry.holder(CHAMPION)
    damage = damage_of(registry, champion) if champion is not None else ""
    if damage:
        raise ArtifactError(
            f"The champion cannot be served or judged: {damage}.",
            "Run crane ledger repair, which goes back to the last champion that can be, or crane promote --run RUN.",
        )
    if holder != champion:
        raise ArtifactError(
            f"The alias {CHAMPION!r} points to version {holder}, the ledger says {champion}.",
            "Run crane ledger repair: it puts the alias where the ledger says.",
        )
    last = ledger.entries()[-1].hash if num_entries else None
    return {"status": "whole", "entries": num_entries, "anchored": len(anchors), "champion": champion, "last": last}


def figures(store: ArtifactStore, run_id: str) -> dict[str, Any]:
    """Return `metrics.json` of a run's evaluation, empty before it.

    Raises:
        ArtifactError: the artifact is damaged.
    """
    if store.entry(run_id, "ml.evaluate") is None:
        return {}
    return json.loads(store.artifact(run_id, "ml.evaluate").file("metrics.json").read_text())


def _run(store: ArtifactStore, run_id: str, aliases: dict[str, list[str]]) -> dict[str, Any]:
    window = store.run(run_id)["config"]["window"]
    config = RunConfig.model_validate(store.run(run_id)["config"])
    done = [
        name
        for name, stage in STAGES.items()
        if all(store.entry(run_id, label) is not None for label in stage.labels(config))
    ]
    registered = store.entry(run_id, "ml.register") or {}
    version = registered.get("version")
    metrics = figures(store, run_id)
    return {
        "run": run_id,
        "start": window["start"],
        "end": window["end"],
        "stages": done,
        "num_stages": len(STAGES),
        "shipped_run": registered.get("shipped_run"),
        "model_version": version,
        "aliases": aliases.get(version, []) if version else [],
        "recall@20": metrics["models"]["crane"]["recall@20"]["mean"] if metrics else None,
    }


def _aliases(store: ArtifactStore, runtime: Runtime) -> dict[str, list[str]]:
    if not any(store.entry(run_id, "ml.register") for run_id in store.run_ids()):
        return {}
    registry = read_registry(runtime, store.storage.uri)
    return {version.number: sorted(version.aliases) for version in registry.versions()}


def _rows(served: Served, table: str, key: str, value: str, columns: tuple[str, ...], k: int) -> list[dict[str, Any]]:
    if k < 1:
        raise ConfigError(f"-k is {k}.", "Give -k 1 or more, for example -k 10.")
    from crane_core.storage.rows import read_rows

    rows = read_rows(served.export.file(table), columns, key, value)
    return sorted((row for row in rows if row["rank"] <= k), key=lambda row: row["rank"])
