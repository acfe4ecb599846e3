"""Spark's `etl.interactions` beside DuckDB doing the same work on the same raw files, in the same run.

    python -m tests.bench.bench_etl --rows 5000000

A log is generated, the job runs as its command line does, then DuckDB judges, deduplicates, splits and numbers the
same files, counts what drift is measured by, and writes the same tables. The two are compared row by row, by external
ids, numbers, quarantine counts and the rows on both sides of the drift, before anything is reported. `--cores 1 2`
repeats the job on each number of cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crane_core.config import RunConfig
from crane_core.raw.generator import EVENT_SHARES, GeneratorSettings, generate
from jobs.stores import open_store

WEIGHTS = dict(zip(EVENT_SHARES, (1.0, 3.0, 5.0), strict=True))
POLL_SECONDS = 0.2
PEER_SECONDS = 3600


def main() -> None:
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="bench-etl-") as folder:
        work = Path(folder)
        raw = arguments.raw or work / "raw"
        plan = GeneratorSettings(
            num_rows=arguments.rows,
            num_users=max(100, arguments.rows // 20),
            num_items=max(50, min(arguments.rows // 100, 1_000_000)),
            modalities={"text": 4},
        )
        generated = measure(lambda: generate(plan, raw))
        config = RunConfig.model_validate(
            {
                "window": {"start": plan_end(plan, 1), "end": plan_end(plan, 0)},
                "etl": {"event_weights": WEIGHTS},
                "runtime": {"raw": str(raw), "spark_memory": arguments.spark_memory},
            }
        )
        runs: dict[int, dict[str, float]] = {}
        for cores in arguments.cores:
            store = work / f"store-{cores}"
            flags = ["--store", str(store), "--run", "bench", "--set", f"runtime.spark_master=local[{cores}]"]
            tree = config.model_dump(mode="json", include={"window", "etl", "runtime"})
            for section, fields in tree.items():
                for name, value in fields.items():
                    if name != "spark_master" and value is not None:
                        flags += ["--set", f"{section}.{name}={json.dumps(value)}"]
            command = [sys.executable, "-m", "jobs.etl.interactions", *flags]
            runs[cores] = measure_command(command)
        most = max(arguments.cores)
        mine = open_store(str(work / f"store-{most}")).artifact("bench", "etl.interactions")
        contents = {
            open_store(str(work / f"store-{cores}")).artifact("bench", "etl.interactions").manifest["content"]
            for cores in arguments.cores
        }
        assert len(contents) == 1, "the content depends on the number of cores"
        peer_out = work / "duckdb"
        peer_out.mkdir()
        peer_command = [sys.executable, "-m", "tests.bench.etl_duckdb", str(raw), str(peer_out), str(most)]
        peer_command += [arguments.peer_memory, config.model_dump_json(include={"window", "etl"})]
        peer = measure_command(peer_command)
        differences = compare(mine.path, mine.facts, peer_out)
        assert not any(differences.values()), f"the results differ: {differences}"
    seconds = {cores: run["seconds"] for cores, run in runs.items()}
    report: dict[str, Any] = {
        "rows": arguments.rows,
        "rows_per_second": round(arguments.rows / seconds[most]),
        "peak_bytes": runs[most]["peak_bytes"],
        "peer": "duckdb",
        "peer_rows_per_second": round(arguments.rows / peer["seconds"]),
        "peer_peak_bytes": peer["peak_bytes"],
        "seconds_over_peer": round(seconds[most] / peer["seconds"], 2),
        "cpu_seconds": round(runs[most]["cpu_seconds"], 1),
        "peer_cpu_seconds": round(peer["cpu_seconds"], 1),
        "seconds": {str(cores): round(value, 1) for cores, value in seconds.items()},
        "same_rows": True,
        "command": " ".join(["python -m tests.bench.bench_etl", *sys.argv[1:]]),
        "device": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}",
        "versions": {name: version(name) for name in ("pyspark", "duckdb", "pyarrow")},
    }
    if arguments.raw is None:
        report["generated_rows_per_second"] = round(arguments.rows / generated["seconds"])
    if len(seconds) > 1:
        report["scaling"] = round(seconds[min(seconds)] / seconds[most], 2)
    print(json.dumps(report))


def plan_end(plan: GeneratorSettings, days_before: int) -> str:
    from datetime import timedelta

    return str(plan.start + timedelta(days=plan.num_days - days_before))


def measure(work: Callable[[], Any]) -> dict[str, float]:
    started = time.monotonic()
    work()
    return {"seconds": time.monotonic() - started}


def measure_command(command: list[str]) -> dict[str, float]:
    """Seconds, processor seconds and the peak of the memory that a process and all below it hold together."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    peak = 0
    ticks: dict[int, int] = {}
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(POLL_SECONDS):
            held = 0
            for pid in descendants(process.pid):
                with contextlib.suppress(OSError, IndexError):
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    ticks[pid] = int(fields[11]) + int(fields[12])
                    held += int(fields[21]) * resource.getpagesize()
            peak = max(peak, held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait(timeout=PEER_SECONDS)
    seconds = time.monotonic() - started
    stop.set()
    watcher.join()
    assert code == 0, f"{' '.join(command)} ended with {code}"
    return {"seconds": seconds, "cpu_seconds": sum(ticks.values()) / os.sysconf("SC_CLK_TCK"), "peak_bytes": peak}


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                for child in (task / "children").read_text().split():
                    found += descendants(int(child))
    return found


def compare(mine: Path, facts: dict[str, Any], peer: Path) -> dict[str, Any]:
    """Rows that are in one of the two results only, per table, and reasons counted differently."""
    import duckdb

    connection = duckdb.connect()
    connection.execute("set timezone = 'UTC'")
    found: dict[str, Any] = {}
    for table in ("users", "items", "interactions"):
        columns = {
            "users": "user_idx, user_id",
            "items": "item_idx, item_id, title",
            "interactions": "user_idx, item_idx, event_time, weight, split",
        }[table]
        left, right = (f"select {columns} from '{side / table}/*.parquet'" for side in (mine, peer))
        for name, first, second in (("spark", left, right), ("duckdb", right, left)):
            row = connection.execute(f"select count(*) from ({first} except all {second})").fetchone()
            assert row is not None
            found[f"{table} only in {name}"] = row[0]
    counted = dict(
        connection.execute(f"select reason, count(*) from '{peer}/quarantine/*.parquet' group by 1").fetchall()
    )
    drift = json.loads((mine / "quality.json").read_text())["drift"]
    for name, is_day in (("rows", True), ("reference_rows", False)):
        for column in ("hour", "activity"):
            query = f"select sum(rows)::bigint from '{peer}/drift/*.parquet'"
            row = connection.execute(f"{query} where is_day = {is_day} and {column} is not null").fetchone()
            found[f"drift {name} by {column}"] = 0 if row == (drift[name],) else {"spark": drift[name], "duckdb": row}
    found["quarantine"] = {} if counted == facts["quarantine"] else {"spark": facts["quarantine"], "duckdb": counted}
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--cores", type=int, nargs="+", default=[2])
    parser.add_argument("--raw", type=Path, help="folder of the log; kept, and used again by an equal bench")
    parser.add_argument("--work", type=Path, help="folder for everything else; removed at the end")
    parser.add_argument("--spark-memory", default="3g", help="heap of the JVM")
    parser.add_argument("--peer-memory", default="4GB", help="DuckDB's limit")
    return parser


if __name__ == "__main__":
    main()
