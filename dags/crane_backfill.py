"""### crane_backfill: rebuild past days

Started by hand over the days `from` to `to`, both included. It makes what is missing and never moves an alias.

**What it does.** `plan` looks at the store and logs every step of every day: `state=found` where an artifact of the
same inputs and configuration is there, by whatever run, else `state=make`. What a wanted stage reads is planned along.
`etl` (one Spark session) and `content` (refined rows, item graph) then rebuild the days that lack something, each a
mapped task and a run of its own, `backfill-{day after}-{configuration}`. `check` plans once more and fails unless
everything is there.

**First look.** `dry_run` is on unless you turn it off: read the plan in the log of `plan`, then trigger again with
`dry_run` off and everything else equal. That run makes exactly what the plan says; a day that lacks nothing has no
task.

**Training.** Only with `train`, once, on the last day: its model is registered, without an alias and without an asset
event. To promote it all the same, trigger `crane_promote` with its run.

**Load.** `etl` has the small pool `crane_backfill` to itself, so that the daily run keeps going beside it; `content`
and `train` queue for the accelerator with everybody else.

**When it fails.** The other days go on, later tasks wait. Mend the cause and clear the failed task, or trigger the same
backfill again: what is there is found.

**Settings** (Airflow Variables, all optional): `crane_store`, `crane_config`, `crane_project`, `crane_jobs_python`,
`crane_registry`, `crane_notifiers` (`notices.py`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from airflow.sdk import DAG, Param, chain, task
from airflow.sdk.exceptions import AirflowFailException
from deployment import DEFAULT_ARGS, job, mapped_job
from local_job import PROJECT, deployment_overrides, setting
from notices import Notice
from windows import DAY_PATTERN, OVERRIDE_PATTERN, backfill_flags, backfill_windows

STAGES = ["etl.interactions", "etl.features", "etl.profiles", "ml.refine", "ml.knn", "ml.graph"]
DAY: dict[str, Any] = {"type": "string", "format": "date", "pattern": DAY_PATTERN}
FLAGS = "{{ ti.xcom_pull(task_ids='resolve')['flags'] | tojson }}"


with DAG(
    dag_id="crane_backfill",
    description="Rebuild past days; never moves an alias",
    doc_md=__doc__,
    schedule=None,
    start_date=datetime(1997, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    on_failure_callback=Notice("failure"),
    tags=["crane", "backfill"],
    params={
        "from": Param(description="First day, UTC", **DAY),
        "to": Param(description="Last day, included", **DAY),
        "stages": Param(
            STAGES[:3],
            type="array",
            uniqueItems=True,
            items={"type": "string", "enum": STAGES},
            description="What to rebuild, with all it reads",
        ),
        "train": Param(False, type="boolean", description="Train, evaluate and register the last day"),
        "dry_run": Param(True, type="boolean", description="Only log the plan"),
        "store": Param(None, type=["null", "string"], minLength=1, maxLength=1024, description="Artifact store URI"),
        "config": Param(None, type=["null", "string"], minLength=1, maxLength=1024, description="Preset or YAML file"),
        "overrides": Param(
            [],
            type="array",
            maxItems=100,
            items={"type": "string", "pattern": OVERRIDE_PATTERN, "maxLength": 1024},
            description="section.field=value, the last one wins",
        ),
    },
) as dag:

    @task(task_id="resolve")
    def resolve(params: dict[str, Any]) -> dict[str, Any]:
        """The days, and the flags of every job."""
        try:
            windows = backfill_windows(params["from"], params["to"])
        except ValueError as error:
            raise AirflowFailException(str(error)) from error
        if not params["stages"] and not params["train"]:
            raise AirflowFailException("Nothing to rebuild: name stages, or train.")
        flags = backfill_flags(
            store=params["store"] or setting("store", str(PROJECT / ".crane" / "store")),
            windows=windows,
            config=params["config"] or setting("config", "") or None,
            overrides=[*deployment_overrides(), *params["overrides"]],
            stages=params["stages"],
            train=params["train"],
            dry_run=params["dry_run"],
        )
        return {"flags": flags}

    # A list of its own: a dry run, and a backfill that trains nothing, map over none.
    @task(task_id="last_day", trigger_rule="none_failed")
    def last_day(days: list[str], params: dict[str, Any]) -> list[str]:
        """The day to train, if one is to be trained."""
        return days[-1:] if params["train"] else []

    plan = job("backfill.plan", flags=FLAGS, returns="days")
    etl = mapped_job("backfill.etl", plan.output, flags=FLAGS)
    content = mapped_job("backfill.content", plan.output, flags=FLAGS)
    last = last_day(plan.output)
    train = mapped_job("backfill.train", last, flags=FLAGS)
    # On a dry run everything is skipped, and so is the check.
    check = job("backfill.check", flags=FLAGS, trigger_rule="none_failed_min_one_success")
    chain(resolve(), plan, etl, content, last, train, check)
    chain([etl, content], check)
