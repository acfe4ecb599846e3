"""What commands and jobs import before they work: the processor seconds of a short command are those of its imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.ml import export
from jobs.stores import open_store
from tests.worlds.release_runs import copy_registered, item_ids, user_ids

HEAVY = {"mlflow", "torch", "pyspark", "scipy", "sqlalchemy", "faiss", "matplotlib", "pandas"}
PROGRAM = """
import json, sys
from jobs import cli
code = cli.main(sys.argv[1:])
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Champion is version 1, exported; version 2 is candidate."""
    store = tmp_path_factory.mktemp("start-up") / "store"
    assert export.main(copy_registered(store, (0.5, 0.4), 1)[0]) == 0
    return store


def ask(store: Path, *argv: str) -> tuple[dict, set[str]]:
    """Run `crane` in an interpreter of its own; return its answer and the packages it has imported."""
    command = [sys.executable, "-c", PROGRAM, *argv, "--store", str(store), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(ended.stdout), set(json.loads(ended.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    ("argv", "allowed"),
    [
        (("recommend", "--user", user_ids()[0]), set()),
        (("similar", "--item", item_ids()[0]), set()),
        (("runs",), set()),
        # A served model is verified by the module that reads it, which imports these.
        (("ledger", "verify"), {"pandas", "scipy"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_question_imports_no_engine(store: Path, argv: tuple[str, ...], allowed: set[str]) -> None:
    answer, imported = ask(store, *argv)
    assert imported & HEAVY <= allowed
    assert "pydantic" in imported
    facts = {
        "recommend": lambda: (answer["model_version"], answer["run"]) == ("1", "run-1") and len(answer["items"]) == 10,
        "similar": lambda: answer["model_version"] == "1" and len(answer["items"]) == 5,
        "runs": lambda: [run["aliases"] for run in answer["runs"]] == [["champion"], ["candidate"]],
        "ledger": lambda: (answer["status"], answer["champion"], answer["anchored"]) == ("whole", "1", 1),
    }
    assert facts[argv[0]]()


def test_a_version_that_another_run_has_registered_is_found(store: Path) -> None:
    """Where the run that promoted a version has no export of it, the registry knows whose version it is."""
    artifacts = open_store(str(store))
    entry = artifacts.entry("run-1", "ml.export")
    assert entry is not None
    try:
        artifacts.record("run-1", "ml.export", entry | {"version": "7"})
        answer, _ = ask(store, "recommend", "--user", user_ids()[0])
    finally:
        artifacts.record("run-1", "ml.export", entry)
    assert (answer["model_version"], answer["run"]) == ("1", "run-1")


def test_the_page_of_a_run_needs_no_torch(store: Path) -> None:
    program = PROGRAM.replace("from jobs import cli", "from jobs.ml import report as cli")
    command = [sys.executable, "-c", program, "--store", str(store), "--run", "run-1"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout.splitlines()[-1])["status"] == "done"
    imported = set(json.loads(ended.stderr.splitlines()[-1]))
    assert "matplotlib" in imported and not imported & {"torch", "mlflow", "pyspark"}
