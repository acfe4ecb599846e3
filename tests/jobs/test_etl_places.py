"""The ETL gives the same content on a standalone cluster, on a Connect server, and with raw data and store on S3."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import boto3
import pyspark
import pytest
from pyspark.sql import SparkSession

from crane_core.errors import EXIT_OK
from crane_core.raw.generator import GeneratorSettings, generate
from jobs.stores import open_store
from tests.worlds.etl_stages import main as run_stages
from tests.worlds.s3_faults import FaultyProxy

pytestmark = [pytest.mark.spark, pytest.mark.slow]

PROJECT = Path(__file__).parents[2]
HOME = Path(pyspark.__file__).parent
PATIENCE = 300
"""Seconds a process may take to start, on a machine that others use."""
STAGES = ("interactions", "features", "profiles")
SETTINGS = {
    "window.start": "2026-01-10",
    "window.end": "2026-01-11",
    "etl.validation_days": "2",
    "etl.test_days": "2",
    "etl.k_core": "2",
    "etl.event_weights": "{view: 1, cart: 3, purchase: 5}",
    "etl.repeats": "sum",
    "features.standardise": "zscore",
    "features.max_dim": "3",
}


def flags(store: str, raw: str, **settings: str) -> list[str]:
    chosen = {**SETTINGS, "runtime.raw": raw, **{key.replace("__", "."): value for key, value in settings.items()}}
    return ["--store", store, "--run", "r", *(flag for pair in chosen.items() for flag in ("--set", "=".join(pair)))]


def contents(store: str) -> list[str]:
    return [open_store(store).artifact("r", f"etl.{stage}").manifest["content"] for stage in STAGES]


def environment(**more: str) -> dict[str, str]:
    own = {"SPARK_HOME": str(HOME), "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    return {**os.environ, **own, "PYTHONPATH": str(PROJECT), **more}


def run(arguments: list[str], log: Path, **more: str) -> None:
    """Run the stages in a process of their own."""
    with log.open("w") as out:
        command = [sys.executable, "-m", "tests.worlds.etl_stages", *arguments]
        code = subprocess.run(command, env=environment(**more), stdout=out, stderr=out, check=False).returncode
    assert code == EXIT_OK, log.read_text()[-4000:]


@contextlib.contextmanager
def started(command: list[str], log: Path, sign: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running server, once its log shows that it is ready."""
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment(), stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while sign not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places") / "raw"
    generate(GeneratorSettings(1500, 60, 30, 10, date(2026, 1, 1), 5, {"text": 4, "image": 3}, dirt_share=0.05), folder)
    return folder


@pytest.fixture(scope="module")
def expected(spark: SparkSession, raw: Path) -> list[str]:
    """The content of every stage on `local[2]`."""
    store = str(raw.parent / "store")
    assert run_stages(flags(store, str(raw))) == EXIT_OK
    return contents(store)


@pytest.mark.drill
def test_a_cluster_of_two_workers(expected: list[str], raw: Path, tmp_path: Path) -> None:
    master = f"spark://127.0.0.1:{free_port()}"
    start = [str(HOME / "bin" / "spark-class"), "org.apache.spark.deploy.master.Master", "--host", "127.0.0.1"]
    work = [str(HOME / "bin" / "spark-class"), "org.apache.spark.deploy.worker.Worker", "--host", "127.0.0.1"]
    work += ["--cores", "1", "--memory", "1g", "--webui-port", "0"]
    with contextlib.ExitStack() as stack:
        port = master.rpartition(":")[2]
        stack.enter_context(
            started([*start, "--port", port, "--webui-port", "0"], tmp_path / "master.log", "New state: ALIVE")
        )
        for name in ("first", "second"):
            command = [*work, "--work-dir", str(tmp_path / name), master]
            stack.enter_context(started(command, tmp_path / f"{name}.log", "Successfully registered with master"))
        run(flags(str(tmp_path / "store"), str(raw), runtime__spark_master=master), tmp_path / "log")
    assert contents(str(tmp_path / "store")) == expected
    for name in ("first", "second"):
        assert list((tmp_path / name).glob("app-*/*/stderr")), f"the {name} worker did nothing"


@pytest.mark.drill
def test_a_connect_server(expected: list[str], raw: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [str(HOME / "bin" / "spark-submit"), "--master", "local[2]", "--conf", "spark.ui.enabled=false"]
    command += ["--conf", f"spark.connect.grpc.binding.port={port}"]
    command += ["--conf", f"spark.sql.warehouse.dir={tmp_path / 'warehouse'}"]
    command += ["--class", "org.apache.spark.sql.connect.service.SparkConnectServer", "spark-internal"]
    with started(command, tmp_path / "server.log", "Spark Connect server started"):
        run(flags(str(tmp_path / "store"), str(raw), runtime__spark_master=f"sc://127.0.0.1:{port}"), tmp_path / "log")
    assert contents(str(tmp_path / "store")) == expected


def test_raw_data_and_artifacts_on_s3_that_fails_at_times(
    expected: list[str], raw: Path, s3_uri: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spark has no S3 file system of its own here: its workers read through Python."""
    bucket, client = s3_uri.split("/")[2], boto3.client("s3")
    for path in sorted(raw.rglob("*.parquet")):
        client.upload_file(str(path), bucket, f"raw/{path.relative_to(raw)}")
    proxy = FaultyProxy(s3_endpoint, lambda method, path, count: "error" if count % 7 == 5 else None)
    with proxy.running():
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        run(flags(s3_uri, f"s3://{bucket}/raw", runtime__spark_master="local[2]"), tmp_path / "log")
    assert proxy.injected["error"] > 5
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    assert contents(s3_uri) == expected
