"""The other runs of a DAG, as Airflow tells a running task: the turn of a backfill, the end of the last interval.

Airflow bounds the runs of a backfill apart from all others, and ten of them start at once. Here each waits for the
backfill runs of earlier days, and each of its jobs waits while another run is at work. So the days of a backfill come
one after the other, oldest first, and the daily run waits for one stage of a backfill at most.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk.exceptions import AirflowRescheduleException

logger = logging.getLogger(__name__)

BACKFILL, SCHEDULED = "backfill", "scheduled"
POLL = timedelta(seconds=30)
MAX_RUNS = 200
FAR_FUTURE = datetime(9000, 1, 1, tzinfo=UTC)
WAITING_TASK = "deliveries"
"""Task of a run in which it waits for data and lets a backfill go on."""


def wait_for_turn(context: Any) -> None:
    """Let a job of a backfill run wait without a slot while an earlier day of a backfill or another run is at work.

    Jobs of other runs go on at once.

    Raises:
        AirflowRescheduleException: Airflow starts the task again after `POLL`; this is no failed try.
    """
    run = context.get("dag_run")
    if run is None or _type(run) != BACKFILL:
        return
    others = [other for other in _runs(run.dag_id, FAR_FUTURE, "running") if other.run_id != run.run_id]
    earlier = [each for each in others if _type(each) == BACKFILL and each.logical_date < run.logical_date]
    at_work = [each for each in others if _type(each) != BACKFILL and _is_at_work(context["ti"], each)]
    # A run without a logical date is in no list, but it counts.
    undated = context["ti"].get_dr_count(dag_id=run.dag_id, states=["running"]) - len(others) - 1
    if earlier or at_work or undated > 0:
        logger.info(
            "waiting earlier_days=%s other_runs=%s undated=%d",
            *([each.run_id for each in group] for group in (earlier, at_work)),
            max(0, undated),
        )
        raise AirflowRescheduleException(datetime.now(UTC) + POLL)


def last_interval_end(run: Any) -> datetime | None:
    """Return the end of the data interval of the run before this one, None before the first.

    Args:
        run: a scheduled run. Runs by hand may cover any window, so they do not count.
    """
    for before in _runs(run.dag_id, run.logical_date, None):
        if _type(before) in (SCHEDULED, BACKFILL):
            return before.data_interval_end
    return None


def _is_at_work(instance: Any, run: Any) -> bool:
    states = instance.get_task_states(dag_id=run.dag_id, run_ids=[run.run_id]).get(run.run_id, {})
    return WAITING_TASK not in states or states[WAITING_TASK] in ("success", "skipped")


def _runs(dag_id: str, before: datetime, state: str | None) -> Iterator[Any]:
    """Yield the runs of a DAG with a logical date before an instant, the newest first."""
    from airflow.sdk.execution_time import task_runner
    from airflow.sdk.execution_time.comms import GetPreviousDagRun

    for _ in range(MAX_RUNS):
        request = GetPreviousDagRun(dag_id=dag_id, logical_date=before, state=state)
        found = task_runner.SUPERVISOR_COMMS.send(request).dag_run
        if found is None:
            return
        yield found
        before = found.logical_date


def _type(run: Any) -> str:
    return getattr(run.run_type, "value", run.run_type)
