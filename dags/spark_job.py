"""The operator of the `spark` profile: an ETL job through `spark-submit`, driver on this machine, work on a cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException
from local_job import FINAL_EXIT_CODES, PROJECT, command, failure, job_environment, jobs_python, setting


class SparkJobOperator(SparkSubmitOperator):
    """Submit `jobs.<job>` to the master of the connection `spark_default`, in client mode.

    `spark-submit` and the driver are those of the jobs environment (Variables `crane_project`, `crane_jobs_python`);
    executors need the same packages, and see the store and the raw data under the same paths. Nothing is returned:
    what later tasks need of an ETL job is in the store.

    Args:
        job: `etl.<stage>`.
        flags: JSON list of the flags, a template.
        part: which part of a mapped stage, "" for a whole stage.

    Raises:
        AirflowFailException: exit code 2, 3 or 4: trying again cannot help.
        AirflowException: any other exit code.
    """

    template_fields = (*SparkSubmitOperator.template_fields, "flags", "part")

    def __init__(self, *, job: str, flags: str, part: str = "", **kwargs: Any) -> None:
        super().__init__(name=f"crane-{job.replace('.', '-')}", spark_binary="spark-submit", **kwargs)
        self.job = job
        self.flags = flags
        self.part = part

    def execute(self, context: Context) -> None:
        project = Path(setting("project", str(PROJECT)))
        python = Path(setting("jobs_python", str(jobs_python(project))))
        environment = job_environment(python.parent)
        path = os.pathsep.join(filter(None, (str(project), environment.get("PYTHONPATH"))))
        # The hook adds to this process's environment: Airflow's own settings and secrets are blanked.
        self.env_vars = dict.fromkeys(set(os.environ) - set(environment), "") | {
            "PATH": environment["PATH"],
            "PYTHONPATH": path,
            "PYSPARK_PYTHON": str(python),
        }
        self.application = str(project / "jobs" / f"{self.job.replace('.', '/')}.py")
        self._hook = self._get_hook()
        # The job's session names its master itself: the same one.
        master = self._hook._connection["master"]
        flags = command(self.job, self.flags, self.part)[2:]
        self.application_args = [*flags, "--set", f"runtime.spark_master={master}"]
        self._hook = self._get_hook()
        try:
            super().execute(context)
        except AirflowException as error:
            code = getattr(self._hook._submit_sp, "returncode", None)
            if code in FINAL_EXIT_CODES:
                raise failure(self.job, code, "its last lines are above") from error
            raise
