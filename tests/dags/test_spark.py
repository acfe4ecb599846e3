"""The spark profile: ETL jobs through the real `spark-submit`, the others as in the local profile."""

import json
import subprocess
from types import SimpleNamespace

import deployment
import pytest
from conftest import BAD_ROW, PROJECT
from job_output import FinalJobError
from local_job import LocalJobOperator
from spark_job import SparkJobOperator

PYTHON = PROJECT / ".venv" / "bin" / "python"
RAW = """
import sys
from pathlib import Path
from tests.worlds.raw_data import write_items, write_log
users, items = ("ann", "bob", "cat"), ("i1", "i2", "i3")
write_log(Path(sys.argv[1]), [(u, i, f"2026-01-{10 + n:02} 10:00") for n, i in enumerate(items) for u in users])
"""
SETTINGS = ("window.start=2026-01-12", "window.end=2026-01-13", "etl.validation_days=1", "etl.test_days=1")


@pytest.fixture
def master(monkeypatch):
    connection = {"conn_type": "spark", "host": "local[1]"}
    monkeypatch.setenv("AIRFLOW_CONN_SPARK_DEFAULT", json.dumps(connection))
    monkeypatch.setenv("AIRFLOW_VAR_CRANE_JOBS_PYTHON", str(PYTHON))
    monkeypatch.setenv("AIRFLOW__DATABASE__PASSWORD", "planted-secret")
    # The driver's JVM, which spark-submit starts: the optimising compiler doubles the processor time of few rows.
    monkeypatch.setenv("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")


def task(name, **options):
    operator, arguments = deployment._spark(name, deployment.JOBS[name].engine)
    return operator(task_id="t", **arguments, **options)


def context():
    return {"ti": SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=-1, try_number=1)}


def test_only_spark_jobs_are_submitted():
    classes = {name: type(task(name, flags="[]")) for name in deployment.JOBS}
    spark = {name for name, job in deployment.JOBS.items() if job.engine == "spark"}
    assert {name for name, kind in classes.items() if kind is SparkJobOperator} == spark
    assert {name for name, kind in classes.items() if kind is LocalJobOperator} == set(classes) - spark


def test_an_etl_job_runs_on_the_master_of_the_connection(master, tmp_path):
    raw, store = tmp_path / "raw", tmp_path / "a store"
    subprocess.run([str(PYTHON), "-c", RAW, str(raw)], cwd=PROJECT, check=True)
    flags = ["--store", str(store), "--run", "r", "--set", f"runtime.raw={raw}", "--set", "runtime.spark_master=none"]
    flags += [flag for setting in SETTINGS for flag in ("--set", setting)]
    made = task("etl.interactions", flags=json.dumps(flags))
    made.execute(context())
    entry = json.loads((store / "runs" / "r" / "etl.interactions.json").read_text())
    manifest = json.loads((store / "etl.interactions" / entry["fingerprint"] / "manifest.json").read_text())
    assert manifest["facts"]["num_rows_read"] == 9
    (output,) = made.get_openlineage_facets_on_complete(None).outputs
    assert (output.namespace, output.name) == (f"file://{store}", f"etl.interactions/{entry['fingerprint']}")


def test_errors_of_the_user_are_final_and_airflows_secrets_stay(master, play, monkeypatch):
    monkeypatch.setenv("AIRFLOW_VAR_CRANE_JOBS_PYTHON", str(PYTHON))
    monkeypatch.chdir(play.folder)
    play.act({"etl.features": {"code": 3, "error": BAD_ROW}})
    with pytest.raises(FinalJobError, match=r"etl\.features ended with a data error: DataError: .*bad row"):
        task("etl.features", flags='["--run", "r 1"]').execute(context())
    (call,) = play.calls()
    assert call["argv"] == ["--run", "r 1", "--set", "runtime.spark_master=local[1]"]
    assert "planted-secret" not in json.dumps(call)
