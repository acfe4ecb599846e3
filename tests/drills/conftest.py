"""One deployment for all drills: Airflow and MLflow on PostgreSQL, and forty days of a small world with a known answer.

The drills run in the order of their files: the scheduled days come first.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from crane_core.release.ledger import Ledger
from crane_core.release.registry import Registry
from crane_core.storage.artifacts import ArtifactStore
from jobs.stores import open_store
from tests.worlds.raw_data import write_items, write_log, write_vectors
from tests.worlds.services import Airflow, Mlflow, Postgres, Proxy

NUM_GROUPS, NUM_USERS, NUM_ITEMS, NUM_DAYS = 4, 96, 96, 40
SCHEDULED_DAYS = 3
SETTINGS = {
    "etl": {"validation_days": 6, "test_days": 6},
    "refine": {"num_steps": 5, "embedding_dim": 8},
    "knn": {"k": 5, "num_shards": 2},
    "train": {"embedding_dim": 8, "num_epochs": 6, "batch_size": 512, "learning_rate": 0.02},
    "evaluate": {"num_bootstrap": 200, "ks": [5, 20]},
    "export": {"k": 10, "num_similar": 5},
    "promote": {"min_users": 20, "beats": ["popularity"]},
}
POLICY = '''
"""What a deployment of three days ago would have seen: the scheduler itself makes the runs of the days since."""

from datetime import datetime, timedelta, timezone


def dag_policy(dag):
    if dag.dag_id == "crane_retrain":
        today = datetime.now(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)
        dag.start_date = today - timedelta(days={days})
        dag.catchup = True
        for task in dag.tasks:
            task.start_date = dag.start_date
'''
HEARING = '''
"""A notifier of Airflow's kind that writes down what it is told."""

from airflow.sdk import BaseNotifier


class Hearing(BaseNotifier):
    template_fields = ("message",)

    def __init__(self, message, path):
        super().__init__()
        self.message, self.path = message, path

    def notify(self, context):
        with open(self.path, "a") as handle:
            handle.write(self.message + "\\n")
'''

_COUNTED = {"passed": ("passed",), "failed": ("failed", "error"), "skipped": ("skipped",)}
_outcomes: dict[str, int] = {}
_started = time.monotonic()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these are drills; some more are marked beside the tests they belong to."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.drill)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count all that ran, those beside other tests too."""
    for name, keys in _COUNTED.items():
        _outcomes[name] = sum(len(terminalreporter.stats.get(key, [])) for key in keys)


def pytest_unconfigure() -> None:
    """The closing line of `make drill`."""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in _outcomes.items())
    print(f"drills: {counts}, {time.monotonic() - _started:.0f} s")


def write_world(raw: Path, last: date) -> None:
    """Users and items of four groups; every other day a user takes an unseen item of the own group.

    Args:
        raw: folder to make.
        last: last day with events; the days of a backfill and of the schedule end there.
    """
    random = np.random.default_rng(11)
    group = np.arange(NUM_ITEMS) % NUM_GROUPS
    events = []
    for user in range(NUM_USERS):
        own = random.permutation(np.flatnonzero(group == user % NUM_GROUPS))
        for step, item in enumerate(own[: NUM_DAYS // 2].tolist()):
            day = last - timedelta(days=NUM_DAYS - 1 - 2 * step - user % 2)
            events.append((f"u{user}", f"i{item}", f"{day} {8 + user % 12:02d}:00"))
    write_log(raw, events)
    write_items(raw, [(f"i{item}", f"piece {item} of group {group[item]}") for item in range(NUM_ITEMS)])
    for modality, dim in (("sound", 8), ("words", 6)):
        centres = random.normal(size=(NUM_GROUPS, dim))
        vectors = (centres[group] + 0.3 * random.normal(size=(NUM_ITEMS, dim))).tolist()
        write_vectors(raw, modality, [(f"i{item}", vector) for item, vector in enumerate(vectors)])


@dataclass
class Deployment:
    """The services, and the world they work on.

    Attributes:
        today: the day the scheduler lives in; the last whole day is the one before.
    """

    root: Path
    postgres: Postgres
    mlflow: Mlflow
    proxy: Proxy
    airflow: Airflow
    today: date

    @property
    def store_path(self) -> Path:
        return self.root / "store"

    @property
    def store(self) -> ArtifactStore:
        return open_store(str(self.store_path))

    @property
    def registry(self) -> Registry:
        """The registry itself, past the proxy."""
        return Registry(f"http://127.0.0.1:{self.mlflow.port}", None, "crane")

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.store.storage, "crane")

    def day(self, before: int) -> date:
        """So many days before today."""
        return self.today - timedelta(days=before)

    def lineage(self, dag_id: str, task: str) -> list[dict[str, Any]]:
        """The OpenLineage events of a task's successful runs."""
        lines = (self.root / "lineage.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines if line]
        name = f"{dag_id}.{task}"
        return [each for each in events if each["job"]["name"] == name and each["eventType"] == "COMPLETE"]

    def heard(self) -> list[str]:
        """What the configured notifier was told."""
        path = self.root / "heard.txt"
        return path.read_text().splitlines() if path.exists() else []

    def assert_whole(self, store: ArtifactStore | None = None) -> int:
        """Every artifact of the store is complete and unchanged, the alias is where a whole ledger says; how many."""
        store = store or self.store
        verified = 0
        for run in store.run_ids():
            for name in store.storage.names(f"runs/{run}"):
                entry = json.loads(store.storage.read(f"runs/{run}/{name}") or b"")
                if "fingerprint" in entry:
                    stage = ".".join(name.split(".")[:2])
                    artifact = store.find(stage, entry["fingerprint"])
                    assert artifact is not None, (run, name)
                    artifact.verify()
                    verified += 1
        self.ledger.verify(self.registry.ledger_anchors())
        assert self.registry.holder("champion") == self.ledger.champion()
        return verified


@pytest.fixture(scope="session")
def deployment(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    # Not pytest's folder: PostgreSQL runs as somebody else and must be able to reach its own.
    root = Path(tempfile.mkdtemp(prefix="crane-drill-"))
    root.chmod(0o755)
    today = datetime.now(UTC).date()
    write_world(root / "raw", today - timedelta(days=1))
    postgres = Postgres(root / "postgres")
    stops: list[Any] = []
    try:
        postgres.start()
        stops.append(postgres.stop)
        for database in ("airflow", "mlflow"):
            postgres.create(database)
        mlflow = Mlflow(root / "mlflow", postgres.uri("mlflow", "psycopg2"))
        mlflow.start()
        stops.append(mlflow.service.stop)
        proxy = Proxy(mlflow.port)
        stops.append(proxy.stop)
        runtime = {
            "raw": str(root / "raw"),
            "registry": proxy.uri,
            "spark_master": "local[2]",
            "num_threads": 1,
            "delivery_quiet_minutes": 0,
        }
        (root / "config.yaml").write_text(yaml.safe_dump(SETTINGS | {"runtime": runtime}))
        airflow = Airflow(
            root / "airflow",
            postgres.uri("airflow", "psycopg"),
            {
                "AIRFLOW_VAR_CRANE_STORE": str(root / "store"),
                "AIRFLOW_VAR_CRANE_CONFIG": str(root / "config.yaml"),
                "AIRFLOW_VAR_CRANE_NOTIFIERS": json.dumps(
                    [
                        {
                            "class": "hearing.Hearing",
                            "on": ["failure"],
                            "arguments": {
                                "message": "{{ dag.dag_id }} {{ dag_run.run_id }} failed",
                                "path": str(root / "heard.txt"),
                            },
                        }
                    ]
                ),
                "AIRFLOW__OPENLINEAGE__TRANSPORT": json.dumps(
                    {"type": "file", "log_file_path": str(root / "lineage.jsonl"), "append": True}
                ),
                # Half a minute of silence is enough to know a server that is down.
                "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "OMP_NUM_THREADS": "1",
            },
        )
        (airflow.home / "config").mkdir()
        (airflow.home / "config" / "airflow_local_settings.py").write_text(POLICY.format(days=SCHEDULED_DAYS))
        (airflow.home / "config" / "hearing.py").write_text(HEARING)
        airflow.prepare()
        stops.append(airflow.stop)
        airflow.start()
        yield Deployment(root, postgres, mlflow, proxy, airflow, today)
    finally:
        for stop in reversed(stops):
            stop()
        if request.session.testsfailed:
            print(f"kept for inspection: {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
