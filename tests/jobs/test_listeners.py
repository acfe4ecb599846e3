"""On one machine nothing that a job starts is reachable from elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from pyspark.sql import SparkSession

LOOPBACK = {"tcp": ("0100007F",), "tcp6": ("0000000000000000FFFF00000100007F", "00000000000000000000000001000000")}


def listening(pid: int) -> list[str]:
    """Addresses that a process and its descendants listen on, as the kernel writes them."""
    pids, sockets = {pid}, set()
    for path in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parent.name)):
        if path.is_file():
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) in pids:
                pids.add(int(path.parent.name))
    for each in pids:
        for entry in Path(f"/proc/{each}/fd").iterdir():
            target = str(entry.readlink()) if entry.is_symlink() else ""
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    found = []
    for kind in LOOPBACK:
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in sockets:
                found.append(f"{kind} {columns[1].partition(':')[0]}")
    return found


def test_the_spark_session_of_a_job_listens_on_the_loopback_interface(spark: SparkSession) -> None:
    assert spark.range(3).count() == 3
    addresses = listening(os.getpid())
    assert addresses, "the driver listens for its executors"
    assert [each for each in addresses if each.split()[1] not in LOOPBACK[each.split()[0]]] == []
