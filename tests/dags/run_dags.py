"""Run DAGs in one Airflow process, as told line by line on stdin.

Airflow takes ten seconds to start and to build its execution API; the runs of all tests share them. A request is a
JSON object: `runs`, a list of DAG id, logical date and configuration; `environment`, variables for these runs; `path`,
folders to import from. The answer is a line `ANSWER <JSON>` on stdout, between the lines that Airflow logs.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from airflow.dag_processing.dagbag import DagBag
from airflow.models.asset import AssetEvent
from airflow.utils.db import upgradedb
from airflow.utils.session import create_session


@contextmanager
def settings(environment: dict[str, str], path: list[str]) -> Iterator[None]:
    """Set variables of the environment and the import path, and take them back."""
    before, path_before = dict(os.environ), list(sys.path)
    os.environ.update(environment)
    sys.path[:0] = path
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        sys.path[:] = path_before


def run(dags: str, runs: list) -> dict:
    """State of each run and of its tasks by logical date, and every asset event so far."""
    bag = DagBag(dag_folder=dags)
    answer = {}
    for dag_id, date, conf in runs:
        ended = bag.dags[dag_id].test(logical_date=datetime.fromisoformat(date), run_conf=conf)
        states = {}
        for instance in ended.get_task_instances():
            states.setdefault(instance.task_id, []).append(str(instance.state))
        answer[date] = {"state": str(ended.state), "tasks": states}
    with create_session() as session:
        events = session.query(AssetEvent).all()
        answer["events"] = [{"asset": event.asset.name, "extra": event.extra} for event in events]
    return answer


def main(dags: str) -> None:
    sys.path.insert(0, dags)
    upgradedb()
    for line in sys.stdin:
        request = json.loads(line)
        with settings(request["environment"], request["path"]):
            answer = run(dags, request["runs"])
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
