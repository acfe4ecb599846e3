"""Airflow for tests: a home of its own, no database needed to parse, settings from the environment."""

import json
import os
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
DAGS = PROJECT / "dags"
HOME = Path(tempfile.mkdtemp(prefix="crane-airflow-"))

# Airflow reads its settings when it is first imported.
os.environ.update(
    AIRFLOW_HOME=str(HOME),
    AIRFLOW__CORE__DAGS_FOLDER=str(DAGS),
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{HOME / 'airflow.db'}",
    AIRFLOW__USAGE_DATA_COLLECTION__ENABLED="False",
)
sys.path.insert(0, str(DAGS))

import pytest  # noqa: E402

ALL_JOBS = (
    "plan",
    "tidy",
    "prune",
    "deliveries",
    *(f"etl.{stage}" for stage in ("interactions", "features", "profiles")),
    *(
        f"ml.{stage}"
        for stage in ("behaviour", "refine", "knn", "graph", "train", "evaluate", "live", "refit", "register")
    ),
    *(f"ml.{stage}" for stage in ("judge", "promote", "export", "report", "restore", "rollback")),
    *(f"backfill.{stage}" for stage in ("plan", "etl", "content", "train", "check")),
)

PLAY_JOB = '''
"""A job that notes how it was called and answers as the real one would."""
import json, os, pathlib, subprocess, sys, time

name = "{name}"
here = pathlib.Path.cwd()
print("2026-01-01 00:00:00,000 INFO play start stage=" + name, file=sys.stderr)
called = {{"job": name, "argv": sys.argv[1:], "environment": sorted(os.environ)}}
with (here / "called.jsonl").open("a") as handle:
    handle.write(json.dumps(called) + "\\n")
act = json.loads((here / "act.json").read_text()).get(name, {{}})
if "child" in act:
    child = subprocess.Popen([sys.executable, "-c", act["child"]])
    (here / "pids").write_text(f"{{os.getpid()}} {{child.pid}}")
    child.wait()
if "signal" in act:
    os.kill(os.getpid(), act["signal"])
if "code" in act:
    print(f"2026-01-01 00:00:00,000 ERROR play failed stage={{name}} error=DataError found=bad row", file=sys.stderr)
    print("shutting down", file=sys.stderr, flush=True)
    if "error" in act:
        print(json.dumps({{"stage": name, **act["error"]}}))
    sys.exit(act["code"])
for line in act.get("lines", []):
    print(line)
print(json.dumps({{"stage": name, **act.get("answer", {{}})}}))
'''

ANSWERS = {
    "plan": {"ml.knn": ["0", "1", "2"]},
    "ml.refit": {"refit_run": "r1.refit"},
    "deliveries": {"complete": True, "lacking": "", "deadline": "2026-03-02T06:00:00+00:00"},
    "ml.register": {"alias": "candidate", "version": "7"},
    "ml.promote": {"decision": "refused", "numbers": {"a": 1}},
    "ml.rollback": {"champion": "3", "champion_run": "r3"},
    "backfill.plan": {"days": ["2026-03-01", "2026-03-02"], "make": 8},
}


BAD_ROW = {"error": "DataError", "found": "items.parquet has a bad row.", "remedy": "Deliver it again."}
"""Errors as data: what a failing job may print."""


class Play:
    """A project folder whose jobs only note how they were called.

    Args:
        folder: where to make it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, str] = {}
        for name in ALL_JOBS:
            path = folder / "jobs" / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(PLAY_JOB.format(name=name))
        (folder / "jobs" / "__init__.py").touch()
        self.act({})

    def act(self, acts: dict) -> None:
        """Let jobs end with a `code` and an `error`, a `signal`, an `answer`, more `lines`, or wait for a `child`."""
        answers = {name: {"answer": answer} for name, answer in ANSWERS.items()}
        (self.folder / "act.json").write_text(json.dumps(answers | acts))

    def calls(self) -> list[dict]:
        """Every call so far."""
        path = self.folder / "called.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def environment(self) -> dict[str, str]:
        """The settings that make the operator use it, and further `settings` of a test."""
        own = {"AIRFLOW_VAR_CRANE_PROJECT": str(self.folder), "AIRFLOW_VAR_CRANE_JOBS_PYTHON": sys.executable}
        return own | self.settings


@pytest.fixture
def play(tmp_path, monkeypatch):
    made = Play(tmp_path / "play")
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture(scope="session")
def dags():
    """Every DAG of the project by id; none fails to import."""
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(dag_folder=str(DAGS))
    assert bag.import_errors == {}
    return bag.dags
