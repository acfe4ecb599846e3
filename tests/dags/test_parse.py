"""Reading the DAG files is cheap and touches neither the jobs' libraries nor the disk."""

import ast
import json
import os
import subprocess
import sys

import pytest
from conftest import DAGS

SECONDS = 2.0
OF_AIRFLOW = ("airflow.sdk", "airflow.providers.standard.", "airflow.providers.openlineage.", "openlineage.")
FILES = sorted(DAGS.glob("*.py"))

PROGRAM = """
import json, sys, time
import airflow.sdk, airflow.sdk.exceptions, airflow.sdk.definitions.mappedoperator
import airflow.providers.standard.operators.hitl
from airflow.sdk import *
for name in airflow.sdk.__all__:
    getattr(airflow.sdk, name)
sys.path.insert(0, sys.argv[1])
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
started = time.perf_counter()
import crane_retrain, crane_promote, crane_backfill, crane_rollback
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules), "opened": opened}))
"""


@pytest.fixture(scope="module")
def parsed():
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(DAGS)], capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(ended.stdout.splitlines()[-1])


def test_parsing_takes_less_than_two_seconds_beyond_airflow(parsed):
    assert parsed["seconds"] < SECONDS


def test_parsing_imports_no_engine(parsed):
    top = {name.partition(".")[0] for name in parsed["modules"]}
    assert "crane_retrain" in top
    assert top.isdisjoint({"torch", "pyspark", "mlflow", "faiss", "boto3", "pandas", "jobs", "crane_core"})
    assert top.isdisjoint({"kubernetes", "kubernetes_job", "spark_job"})


def test_parsing_reads_only_code(parsed):
    assert [
        path for path in parsed["opened"] if not path.endswith((".py", ".pyc", ".so")) and ".pyc." not in path
    ] == []


@pytest.mark.parametrize("profile", ["spark", "kubernetes"])
def test_every_dag_can_be_parsed_under_every_profile(profile):
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(DAGS)],
        env=os.environ | {"CRANE_PROFILE": profile},
        stdout=subprocess.DEVNULL,
        timeout=120,
        check=True,
    )


PROVIDERS = {
    "kubernetes_job.py": ("airflow.providers.cncf.kubernetes.", "kubernetes.client"),
    "spark_job.py": ("airflow.providers.apache.spark.",),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_are_airflows_the_standard_library_and_neighbours(path):
    allowed = {file.stem for file in FILES} | set(sys.stdlib_module_names)
    prefixes = (*OF_AIRFLOW, *PROVIDERS.get(path.name, ()))
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.partition(".")[0] in allowed or name.startswith(prefixes), name
