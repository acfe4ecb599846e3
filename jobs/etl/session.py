"""One Spark session for the ETL jobs, local unless the configuration names a master or a Connect server."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from crane_core.config import Runtime
from crane_core.errors import DataError

logger = logging.getLogger(__name__)

LOCAL_SHUFFLE_PARTITIONS = 4
FEW_ROWS = 2_000_000
QUICK_START = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -XX:ReservedCodeCacheSize=240m -XX:MetaspaceSize=256m"
"""Halves the seconds of a job over 100,000 rows on two busy cores; the optimising compiler pays off later.

A compiler without tiers would have 48 MB for its code, which the classes of a few runs fill: then it throws code away
and compiles it again. Below `MetaspaceSize` no new class causes a full collection.
"""

THROUGHPUT = "-XX:+UseParallelGC"
"""A batch job needs throughput; the length of the collector's pauses does not matter."""


def open_session(runtime: Runtime, scratch: Path, num_rows: int) -> SparkSession:
    """The running session, or a new one.

    Args:
        runtime: master or `sc://` URL and driver memory.
        scratch: local folder for spilled blocks and the warehouse; nothing is left in the working directory.
        num_rows: rows the job will read; with few of them a local JVM is set up for a quick start.
    """
    if runtime.spark_master.startswith("sc://"):
        session = SparkSession.builder.remote(runtime.spark_master).getOrCreate()
        for key, value in _SQL.items():
            session.conf.set(key, value)
        return session
    running = SparkSession.getActiveSession()
    if running is not None:
        return running
    builder = SparkSession.builder.master(runtime.spark_master).appName("crane")
    settings = {
        **_SQL,
        **_CLASSIC,
        "spark.driver.memory": runtime.spark_memory,
        "spark.log.level": "WARN",
        "spark.sql.warehouse.dir": str(scratch.absolute() / "warehouse"),
    }
    if runtime.spark_master.startswith("local"):
        # PySpark takes the interpreter of its workers from the environment only.
        os.environ["PYSPARK_PYTHON"] = sys.executable
        settings |= {
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
            "spark.local.dir": str(_local_dir(scratch.absolute() / "spark")),
            # The only extension in Spark's own jars registers functions of its ML library, which costs 4 seconds.
            "spark.sql.extensions.test.loadFromCp": "false",
            "spark.sql.shuffle.partitions": str(LOCAL_SHUFFLE_PARTITIONS),
        }
        if num_rows <= FEW_ROWS:
            # A heap of full size needs no collection to grow.
            settings["spark.driver.extraJavaOptions"] = f"{QUICK_START} -Xms{runtime.spark_memory}"
            # Every sort, hash table and broadcast takes at least a page, by default 16 MB of a heap of 1 GB.
            settings["spark.buffer.pageSize"] = "2m"
        else:
            settings["spark.driver.extraJavaOptions"] = THROUGHPUT
    for key, value in settings.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    logger.info("session master=%s spark=%s", runtime.spark_master, session.version)
    return session


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Turn Spark's report of an unreadable file into a `DataError`.

    Footers are checked before Spark starts; this is for files damaged further in, or removed meanwhile.
    """
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        found = _UNREADABLE.search(str(error))
        if found is None:
            raise
        named = unquote(found.group(1))
        if re.match("s3a?://", named):
            path, size = named.replace("s3a://", "s3://"), "on S3"
        else:
            path = "/" + named.removeprefix("file:").lstrip("/")
            size = f"{Path(path).stat().st_size} bytes" if Path(path).is_file() else "no longer there"
        raise DataError(
            f"{path} ({size}, row count unknown) has an intact footer but its pages cannot be read.",
            "The file is damaged or was removed meanwhile: deliver it again, or remove it for good.",
        ) from error


def unreadable(path: str) -> OSError:
    """Error of a Python worker about a file, in the form that `readable` finds in the report on the driver."""
    return OSError(f"Encountered error while reading file {quote(path)} .")


def glob_escaped(path: str) -> str:
    """Path in which the characters are escaped that Spark's readers would expand."""
    return re.sub(r"([\[\]{}*?,])", r"\\\1", path)


_UNREADABLE = re.compile(r"Encountered error while reading file (\S+?)\.?\s")

# Static settings: they count from the start of a session.
_CLASSIC = {
    # An ETL run has several hundred generated classes. The default keeps 100, and compiles the others again and again.
    "spark.sql.codegen.cache.maxEntries": "2000",
    # What pages of a user interface would show. There is none here, and plans of hundreds of stages are large.
    "spark.sql.ui.retainedExecutions": "1",
    "spark.ui.retainedJobs": "1",
    "spark.ui.retainedStages": "1",
    "spark.ui.retainedTasks": "1",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}
_SQL = {
    "spark.sql.adaptive.enabled": "true",
    "spark.sql.caseSensitive": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "4096",
    "spark.sql.files.openCostInBytes": "131072",
    "spark.sql.inMemoryColumnarStorage.compressed": "false",
    "spark.sql.legacy.parquet.nanosAsLong": "true",
    "spark.sql.parquet.compression.codec": "zstd",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.sources.parallelPartitionDiscovery.threshold": "4096",
}


def _local_dir(parent: Path) -> Path:
    """Make a folder for this process, and remove those of processes that were killed on this host."""
    host = socket.gethostname()
    for entry in parent.glob(f"{host}-*"):
        pid = entry.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(entry, ignore_errors=True)
    folder = parent / f"{host}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
