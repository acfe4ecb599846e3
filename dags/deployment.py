"""The engine, pool, time limit and operator of every job.

The operator depends on the deployment profile, which the environment variable `CRANE_PROFILE` names:

- `local` (the default): every job is a child process of its task;
- `spark`: `spark-submit` sends the Spark jobs to a cluster, the others are child processes;
- `kubernetes`: every job is a pod, a training is a TrainJob on one or more nodes, as infra/kubernetes describes them.

To add a profile, write one function that turns a job into an operator class and its arguments, and name it in
`PROFILES`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import BaseOperator, XComArg
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.sdk.definitions.retry_policy import ExceptionRetryPolicy, RetryAction, RetryRule
from job_output import FinalJobError
from local_job import LocalJobOperator


@dataclass(frozen=True)
class Job:
    """The needs of a job.

    Attributes:
        engine: `cpu`, `spark`, `gpu` (one device) or `torchrun` (all devices of the training job).
        pool: Airflow pool that limits how many such jobs run at once; infra/local/pools.json defines the pools.
        hours: execution timeout.
    """

    engine: str
    pool: str
    hours: float


JOBS = {
    "plan": Job("cpu", "crane_compute", 0.25),
    "tidy": Job("cpu", "crane_compute", 0.5),
    "prune": Job("cpu", "crane_compute", 1),
    "deliveries": Job("cpu", "crane_waiting", 0.25),
    "etl.interactions": Job("spark", "crane_compute", 4),
    "etl.features": Job("spark", "crane_compute", 4),
    "etl.profiles": Job("spark", "crane_compute", 2),
    "ml.refine": Job("gpu", "crane_gpu", 6),
    "ml.knn": Job("gpu", "crane_gpu", 6),
    "ml.graph": Job("cpu", "crane_compute", 2),
    "ml.behaviour": Job("torchrun", "crane_gpu", 24),
    "ml.train": Job("torchrun", "crane_gpu", 24),
    "ml.evaluate": Job("gpu", "crane_gpu", 4),
    "ml.live": Job("cpu", "crane_compute", 1),
    "ml.refit": Job("cpu", "crane_compute", 0.25),
    "ml.register": Job("cpu", "crane_compute", 1),
    "ml.promote": Job("cpu", "crane_promotion", 1),
    "ml.export": Job("gpu", "crane_gpu", 6),
    "ml.report": Job("cpu", "crane_compute", 1),
    "ml.judge": Job("cpu", "crane_compute", 1),
    "ml.restore": Job("cpu", "crane_promotion", 1),
    "ml.rollback": Job("cpu", "crane_promotion", 1),
    "backfill.plan": Job("cpu", "crane_compute", 0.5),
    "backfill.etl": Job("spark", "crane_backfill", 12),
    "backfill.content": Job("gpu", "crane_gpu", 24),
    # Runs on one device: a TrainJob has no parts, so its other nodes could not tell which training to join.
    "backfill.train": Job("gpu", "crane_gpu", 24),
    "backfill.check": Job("cpu", "crane_compute", 0.5),
}

DEFAULT_ARGS: dict[str, Any] = {
    "owner": "crane",
    "retries": 2,
    # Everything else is tried again, a time limit that was exceeded too.
    "retry_policy": ExceptionRetryPolicy(
        [RetryRule(FinalJobError, RetryAction.FAIL, reason="every further try would end with the same error")]
    ),
    "retry_delay": timedelta(seconds=30),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=15),
    "execution_timeout": timedelta(minutes=5),
    "pool": "crane_compute",
}
"""Arguments of every task. The entry of a job in `JOBS` replaces pool and timeout."""


def _local(name: str, engine: str) -> tuple[type[BaseOperator], dict[str, Any]]:
    """Return the operator for a child process on this machine, whatever the engine."""
    return LocalJobOperator, {"job": name}


def _spark(name: str, engine: str) -> tuple[type[BaseOperator], dict[str, Any]]:
    """Return the operator for a cluster if the engine is `spark`, else that for a child process."""
    if engine != "spark":
        return _local(name, engine)
    # Only the profile that needs a provider imports it.
    from spark_job import SparkJobOperator

    return SparkJobOperator, {"job": name}


def _kubernetes(name: str, engine: str) -> tuple[type[BaseOperator], dict[str, Any]]:
    """Return the operator for the PodTemplate of the engine, or for the TrainingRuntime if it is `torchrun`."""
    from kubernetes_job import PodJobOperator, TrainJobOperator

    if engine == "torchrun":
        return TrainJobOperator, {"job": name, "runtime": "crane-torchrun"}
    return PodJobOperator, {"job": name, "template": f"crane-{engine}"}


PROFILES: dict[str, Callable[[str, str], tuple[type[BaseOperator], dict[str, Any]]]] = {
    "local": _local,
    "spark": _spark,
    "kubernetes": _kubernetes,
}
PROFILE = os.environ.get("CRANE_PROFILE", "local")
SCHEDULE = os.environ.get("CRANE_SCHEDULE", "clock")
"""What starts `crane_retrain`: `clock`, or `delivery` for the asset that the producer of the data announces."""
CATCHUP_FROM = (
    datetime.fromisoformat(os.environ["CRANE_CATCHUP_FROM"]).replace(tzinfo=UTC)
    if os.environ.get("CRANE_CATCHUP_FROM")
    else None
)
"""First day whose scheduled run Airflow makes up where it is missing; None where missed days are only named."""


def job(name: str, **options: Any) -> BaseOperator:
    """Make the task that runs `jobs.<name>`. Its `task_id` is the last word of the name.

    Args:
        name: key of `JOBS`.
        options: arguments of the operator, among them `flags`.
    """
    operator, arguments = _resolve(name)
    return operator(**arguments, **options)


def mapped_job(name: str, parts: list[str] | XComArg, **options: Any) -> MappedOperator:
    """Make the mapped task that runs one task instance per part of a job.

    Args:
        name: key of `JOBS`.
        parts: names of the parts, or the output of an earlier task that returns them.
        options: arguments of the operator, among them `flags`.
    """
    operator, arguments = _resolve(name)
    return operator.partial(**arguments, map_index_template="{{ task.part }}", **options).expand(part=parts)


def _resolve(name: str) -> tuple[type[BaseOperator], dict[str, Any]]:
    if PROFILE not in PROFILES:
        raise ValueError(f"CRANE_PROFILE={PROFILE!r} is unknown: set it to one of {', '.join(PROFILES)}.")
    spec = JOBS[name]
    operator, arguments = PROFILES[PROFILE](name, spec.engine)
    shared = {
        "task_id": name.rpartition(".")[2],
        "pool": spec.pool,
        "execution_timeout": timedelta(hours=spec.hours),
        "doc_md": f"`python -m jobs.{name}` on the engine `{spec.engine}`",
    }
    return operator, shared | arguments
