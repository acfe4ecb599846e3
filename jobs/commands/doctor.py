"""Check this machine for what the pipeline needs, and tell how to mend what is missing."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crane_core.config import Runtime
from crane_core.errors import CraneError
from jobs.commands.paths import AIRFLOW_ENVIRONMENT, HOME, POOLS, PROJECT

GIGABYTE = 1 << 30
PROBE_SECONDS = 180
SETUP = f"Run make setup in {PROJECT}."


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: what was checked.
        status: `ok`, `absent` (the pipeline works without it) or `broken`.
        found: what is there.
        remedy: how to mend it, empty when it is ok.
    """

    name: str
    status: str
    found: str
    remedy: str = ""


def diagnose(store: str | None, runtime: Runtime, deep: bool) -> list[dict[str, Any]]:
    """Return the result of every check, in order; none of them raises.

    Args:
        store: artifact store, `.crane` when None.
        runtime: where the registry is.
        deep: also start Spark.
    """
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("memory", _memory),
        ("disk", _disk),
        ("java", _java),
        ("pyspark", lambda: _package("pyspark", "pyspark")),
        ("torch", lambda: _package("torch", "torch")),
        ("cuda", _cuda),
        ("faiss", lambda: _package("faiss", "faiss")),
        ("mlflow", lambda: _package("mlflow", "mlflow")),
        ("airflow", _airflow),
        ("store", lambda: _store(store)),
        ("registry", lambda: _registry(store, runtime)),
    ]
    if deep:
        checks.append(("spark", lambda: _spark(runtime)))
    return [asdict(_safely(name, check)) for name, check in checks]


def _safely(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except CraneError as error:
        return Finding(name, "broken", error.found, error.remedy)
    except Exception as error:
        return Finding(name, "broken", f"{type(error).__name__}: {error}", SETUP)


def _python() -> Finding:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return Finding("python", "ok", found)
    return Finding("python", "broken", found, "Use Python 3.11, 3.12 or 3.13: PYTHON=python3.11 make setup.")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min([total, *_cgroup_limits()])
    found = f"{limit / GIGABYTE:.1f} GiB"
    if limit >= 5.5 * GIGABYTE:
        return Finding("memory", "ok", found)
    return Finding("memory", "broken", found, "The demo wants 6 GB: end other programs, or lower runtime.spark_memory.")


def _cgroup_limits() -> Iterator[int]:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with_limit = Path(path)
        if with_limit.exists() and (text := with_limit.read_text().strip()).isdigit():
            yield int(text)


def _disk() -> Finding:
    free = shutil.disk_usage(PROJECT).free
    found = f"{free / GIGABYTE:.1f} GiB free at {PROJECT}"
    return (
        Finding("disk", "ok", found)
        if free >= 2 * GIGABYTE
        else Finding("disk", "broken", found, "Make room: the environments take 4 GiB, the demo less than 1 GiB.")
    )


def _java() -> Finding:
    program = str(Path(os.environ["JAVA_HOME"], "bin", "java")) if os.environ.get("JAVA_HOME") else "java"
    remedy = "Run make setup, or install Java 17 and point JAVA_HOME at it."
    try:
        ended = subprocess.run(
            [program, "-version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except OSError as error:
        return Finding("java", "broken", f"{program}: {error.strerror}", remedy)
    match = re.search(r'version "(\d+)[^"]*"', ended.stderr + ended.stdout)
    if match and int(match[1]) >= 17:
        return Finding("java", "ok", f"{match[0]} at {shutil.which(program) or program}")
    return Finding("java", "broken", f"{program}: {match[0] if match else 'no version'}", remedy)


def _package(name: str, module: str) -> Finding:
    return Finding(name, "ok", str(importlib.import_module(module).__version__))


def _cuda() -> Finding:
    import torch

    from jobs.ml.device import UNPROVEN

    caution = f"; {UNPROVEN}" if UNPROVEN else ""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("cuda", "ok", f"{len(names)} device(s): {', '.join(names)}{caution}")
    return Finding(
        "cuda",
        "absent",
        f"no CUDA device{caution}",
        "Nothing to do: the pipeline runs on the CPU (runtime.device=cpu).",
    )


def _airflow() -> Finding:
    python = AIRFLOW_ENVIRONMENT / "bin" / "python"
    if not python.exists():
        return Finding("airflow", "broken", f"no environment at {AIRFLOW_ENVIRONMENT}", SETUP)
    ended = subprocess.run(
        [str(python), "-c", "from importlib.metadata import version; print(version('apache-airflow'))"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PROBE_SECONDS,
    )
    if ended.returncode != 0:
        return Finding("airflow", "broken", f"{python}: {ended.stderr.strip().splitlines()[-1:]}", SETUP)
    if not POOLS.exists():
        return Finding(
            "airflow",
            "broken",
            f"{POOLS} is missing",
            "Run git checkout -- infra/local/pools.json, or clone the repository again.",
        )
    return Finding("airflow", "ok", f"{ended.stdout.strip()} in {AIRFLOW_ENVIRONMENT}")


def _store(store: str | None) -> Finding:
    from crane_core.storage import open_storage

    uri = store or str(HOME)
    if "://" not in uri:
        folder = Path(uri)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return Finding("store", "ok", f"{folder} is writable")
    storage = open_storage(uri)
    storage.write(".doctor", b"")
    return Finding("store", "ok", f"{storage.uri} is writable, {len(storage.names('runs'))} runs")


def _registry(store: str | None, runtime: Runtime) -> Finding:
    if store is None and runtime.registry is None:
        return Finding("registry", "absent", "no store yet", "Run make demo, or give --store or --registry.")
    from crane_core.release.registry import open_registry

    registry = open_registry(runtime, store or str(HOME))
    return Finding("registry", "ok", f"{registry.uri} holds {len(registry.versions())} versions of {registry.name!r}")


def _spark(runtime: Runtime) -> Finding:
    program = (
        "from pyspark.sql import SparkSession\n"
        f"builder = SparkSession.builder.master({runtime.spark_master!r}).config('spark.ui.enabled', False)\n"
        "spark = builder.getOrCreate()\n"
        "print(spark.version, spark.range(10).count())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PROBE_SECONDS,
        env=os.environ | {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"},
    )
    if ended.returncode == 0:
        return Finding("spark", "ok", f"{ended.stdout.split()[0]} starts on {runtime.spark_master}")
    last = ended.stderr.strip().splitlines()[-1:] or ["no message"]
    return Finding(
        "spark",
        "broken",
        f"{runtime.spark_master}: {last[0]}",
        "If java above is ok, give runs --set runtime.spark_master=local[2]; else install Java 17.",
    )
