"""The operator of the `spark` profile: `spark-submit` runs the driver of an ETL job here and its work on a cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException
from job_output import failure, last_object
from local_job import PROJECT, command, job_environment, jobs_python, lineage_event, setting
from other_runs import wait_for_turn


class SparkJobOperator(SparkSubmitOperator):
    """Submit `jobs.<job>` to the master of the connection `spark_default`, in client mode.

    `spark-submit` and the driver come from the jobs environment (Variables `crane_project`, `crane_jobs_python`).
    Executors need the same packages, and the store and the raw data under the same paths. The task returns nothing:
    later tasks find what they need in the store.

    Args:
        job: `etl.<stage>`.
        flags: JSON list of the flags, a template.
        part: part of a mapped stage, None for a whole stage.

    Raises:
        FinalJobError: exit code 2, 3 or 4, with which Airflow does not try again.
        AirflowException: any other exit code.
    """

    template_fields = (*SparkSubmitOperator.template_fields, "flags", "part")

    def __init__(self, *, job: str, flags: str, part: str | None = None, **kwargs: Any) -> None:
        super().__init__(name=f"crane-{job.replace('.', '-')}", spark_binary="spark-submit", **kwargs)
        self.job = job
        self.flags = flags
        self.part = part
        self.result: dict[str, Any] = {}

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        return lineage_event(self.flags, self.result)

    def execute(self, context: Context) -> None:
        wait_for_turn(context)
        project = Path(setting("project", str(PROJECT)))
        python = Path(setting("jobs_python", str(jobs_python(project))))
        environment = job_environment(python.parent)
        path = os.pathsep.join(filter(None, (str(project), environment.get("PYTHONPATH"))))
        # The hook adds these to Airflow's environment, so Airflow's own settings and secrets are overwritten with "".
        self.env_vars = dict.fromkeys(set(os.environ) - set(environment), "") | {
            "PATH": environment["PATH"],
            "PYTHONPATH": path,
            "PYSPARK_PYTHON": str(python),
        }
        self.application = str(project / "jobs" / f"{self.job.replace('.', '/')}.py")
        self._hook = self._get_hook()
        # The job's session names its master too; it must be the same one.
        master = self._hook._connection["master"]
        flags = command(self.job, self.flags, self.part)[2:]
        self.application_args = [*flags, "--set", f"runtime.spark_master={master}"]
        self._hook = self._get_hook()
        try:
            super().execute(context)
        except AirflowException as error:
            code = getattr(self._hook._submit_sp, "returncode", None)
            if code:
                raise failure(self.job, code, list(self._hook._last_submit_log_lines)) from error
            raise
        self.result = last_object(list(self._hook._last_submit_log_lines), "stage") or {}
