"""The whole pipeline on one machine: get data, run both DAGs through Airflow, show the result.

Everything stays below `.crane`: downloads, one folder per dataset with its raw data and store, the private Airflow.
The run id is made of dataset, window and configuration, so the same demo again finds every stage done.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crane_core.config import RunConfig, Runtime
from crane_core.config_file import load_config
from crane_core.errors import ConfigError, CraneError
from crane_core.raw.importers import Imported, import_mmrec, import_movielens
from jobs.commands.airflow import LocalAirflow
from jobs.commands.paths import Last, remember
from jobs.commands.query import example_users, figures, recommend, served
from jobs.commands.steps import Steps
from jobs.stores import open_store

WHEEL = "recbole==1.2.1"
WHEEL_FILES = "recbole-1.2.1-*.whl"
NUM_SHOWN = 5
DOWNLOAD_SECONDS = 300


@dataclass(frozen=True)
class Outcome:
    """The result of a demo.

    Attributes:
        summary: the last line of stdout.
        users: recommendations of a few users.
    """

    summary: dict[str, Any]
    users: list[dict[str, Any]]


def demo(data: Path | None, config: str | None, overrides: list[str], home: Path) -> Outcome:
    """Build, judge and serve a recommender.

    Args:
        data: folder in MMRec layout; MovieLens 100K when None.
        config: preset or file; the preset that fits the data when None.
        overrides: `section.field=value`, applied last.
        home: folder that holds everything.

    Raises:
        CraneError: the data cannot be had or used, or a task failed.
    """
    steps = Steps()
    home = home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    (home / "logs").mkdir(exist_ok=True)
    imported = _import(data, home, steps)
    config = config or ("mmrec" if data else "movielens")
    overrides = [
        f"runtime.raw={imported.raw}",
        "runtime.spark_master=local[2]",
        # Small matrices: a second thread waits more than it works, and much more on a busy machine.
        "runtime.num_threads=1",
        f"etl.split={imported.split}",
        *overrides,
    ]
    start, end = (datetime(day.year, day.month, day.day, tzinfo=UTC) for day in (imported.start, imported.end))
    window = [f"window.start={start.isoformat()}", f"window.end={end.isoformat()}"]
    resolved = load_config(config, [*overrides, *window])
    run = run_id(imported.dataset, resolved)
    store = str(Path(imported.raw).parent / "store")
    log = home / "logs" / f"{run}.log"
    steps.show("demo", f"run={run} store={store} log={log}")

    airflow = LocalAirflow(home / "airflow", log, steps)
    airflow.prepare()
    settings = {"store": store, "run": run}
    airflow.run_dag(
        "crane_retrain",
        settings
        | {
            "config": config,
            "window_start": start.isoformat(),
            "window_end": end.isoformat(),
            "overrides": overrides,
        },
        logical_date=end,
    )
    airflow.run_dag("crane_promote", settings | {"overrides": [o for o in overrides if o.startswith("runtime.")]})
    outcome = _outcome(store, run, resolved, steps)
    remember(Last(store, run), home)
    return outcome


def run_id(dataset: str, config: RunConfig) -> str:
    """`{dataset}-{end of the window}-{8 hex digits of the configuration}`."""
    identity = hashlib.sha256(json.dumps(config.identity(), sort_keys=True).encode()).hexdigest()[:8]
    return f"{_slug(dataset)}-{config.window.end:%Y-%m-%d}-{identity}"


def show(outcome: Outcome) -> None:
    """Print the report's path, the users' recommendations and the JSON line to stdout."""
    print(f"report  {outcome.summary['report']}")
    for user in outcome.users:
        print(f"user {user['user']}")
        for item in user["items"]:
            print(f"  {item['rank']:2d}. {item['title'] or item['item_id']}  ({item['score']:.3f})")
    print(json.dumps(outcome.summary), flush=True)


def wheel(downloads: Path, steps: Steps) -> Path:
    """The wheel that carries MovieLens 100K, downloaded once.

    Raises:
        CraneError: pip cannot get it.
    """
    found = sorted(downloads.glob(WHEEL_FILES))
    if not found:
        steps.show("download", f"{WHEEL} (2 MB, carries MovieLens 100K)")
        downloads.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        ended = subprocess.run(
            [*argv, "--dest", str(downloads), WHEEL],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
        )
        found = sorted(downloads.glob(WHEEL_FILES))
        if ended.returncode != 0 or not found:
            raise CraneError(
                f"pip could not download {WHEEL}: {ended.stderr.strip()[-500:] or 'no wheel came'}.",
                f"Put {WHEEL_FILES} into {downloads}, or use your own data: make demo DATA=<folder in MMRec layout>.",
            )
    return found[0]


def _import(data: Path | None, home: Path, steps: Steps) -> Imported:
    if data is None:
        source = wheel(home / "downloads", steps)
        steps.show("import", f"MovieLens 100K from {source.name}")
        imported = import_movielens(source, home / "ml-100k" / "raw")
    else:
        if not data.is_dir():
            raise ConfigError(
                f"{data} is no folder.",
                "Give --data a folder in MMRec layout: one *.inter file and {modality}_feat.npy files.",
            )
        steps.show("import", f"MMRec folder {data}")
        imported = import_mmrec(data, home / _slug(data.resolve().name) / "raw")
    steps.show(
        "import",
        f"{'done' if imported.is_new else 'found'} users={imported.num_users} items={imported.num_items} "
        f"interactions={imported.num_interactions} features={json.dumps(imported.modalities)}",
    )
    return imported


def _outcome(store_uri: str, run: str, config: RunConfig, steps: Steps) -> Outcome:
    store = open_store(store_uri)
    models = figures(store, run)["models"]
    registered, promoted = store.entry(run, "ml.register"), store.entry(run, "ml.promote")
    reported = store.entry(run, "ml.report")
    assert registered and promoted and reported
    window = config.window
    summary = {
        "run": run,
        "window": f"{window.start:%Y-%m-%d}/{window.end:%Y-%m-%d}",
        "model_version": registered["version"],
        "alias": "champion" if promoted["champion"] == registered["version"] else registered["alias"],
        "recall@20": models["crane"]["recall@20"]["mean"],
        "ndcg@20": models["crane"]["ndcg@20"]["mean"],
        "lightgcn_recall@20": models["lightgcn"]["recall@20"]["mean"],
        "recent_popularity_recall@20": models["recent_popularity"]["recall@20"]["mean"],
        "report": str(Path(store.storage.uri) / "reports" / f"{run}.html"),
        "seconds": round(steps.seconds, 1),
    }
    if promoted["champion"] is None:
        steps.show("demo", f"nobody is served: the gate refused. {promoted['reason']}")
        return Outcome(summary, [])
    champion = served(store, Runtime())
    return Outcome(summary, [recommend(champion, user, NUM_SHOWN) for user in example_users(champion)])


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "data"
