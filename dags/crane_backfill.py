"""### crane_backfill: rebuild past days

You start it by hand for the days `from` to `to`, both included. It makes the artifacts that are missing. It never moves
an alias.

**What it does.** `plan` logs every step of every day with its state. `state=found` means that the store has an artifact
of the same inputs and configuration, made by any run; otherwise the state is `make`. The plan includes the stages that
a wanted stage reads. `etl` (one Spark session) and `content` (refined rows, item graph) then rebuild the days that lack
something. Both have one mapped task per day. Each day is a run with the id `backfill-{day after}-{configuration}`.
`check` plans again and fails unless everything is there.

**First look.** `dry_run` is on by default. Read the plan in the log of `plan`, then trigger again with `dry_run` off
and everything else unchanged. That run makes exactly the steps of the plan. A day that lacks nothing gets no task.

**Training.** Set `train` to train a model on the last day. The model is registered without an alias and without an
asset event. To promote it, trigger `crane_promote` with its run id.

**Load.** `etl` has its own small pool `crane_backfill`, so the daily run can use its pools at the same time. `content`
and `train` wait in the pool of the accelerator like all other tasks.

**When it fails.** The other days go on; later tasks wait. Mend the cause, then clear the failed task or trigger the
same backfill again: it finds the finished steps.

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
from windows import DAY_PATTERN, OVERRIDE_PATTERN, Backfill, backfill_flags, backfill_windows

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
            description="Stages to rebuild, with those that they read",
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
        """Check the days and return the flags of every job."""
        try:
            windows = backfill_windows(params["from"], params["to"])
        except ValueError as error:
            raise AirflowFailException(str(error)) from error
        if not params["stages"] and not params["train"]:
            raise AirflowFailException("Nothing to rebuild: name a stage in stages, or set train.")
        flags = backfill_flags(
            Backfill(windows, params["stages"], params["train"], params["dry_run"]),
            store=params["store"] or setting("store", str(PROJECT / ".crane" / "store")),
            config=params["config"] or setting("config", "") or None,
            overrides=[*deployment_overrides(), *params["overrides"]],
        )
        return {"flags": flags}

    # `train` maps over this list: it is empty on a dry run and in a backfill that trains nothing.
    @task(task_id="last_day", trigger_rule="none_failed")
    def last_day(days: list[str], params: dict[str, Any]) -> list[str]:
        """Return the day to train, or no day."""
        return days[-1:] if params["train"] else []

    plan = job("backfill.plan", flags=FLAGS, returns="days")
    etl = mapped_job("backfill.etl", plan.output, flags=FLAGS)
    content = mapped_job("backfill.content", plan.output, flags=FLAGS)
    last = last_day(plan.output)
    train = mapped_job("backfill.train", last, flags=FLAGS)
    # On a dry run all tasks above are skipped, so `check` is skipped too.
    check = job("backfill.check", flags=FLAGS, trigger_rule="none_failed_min_one_success")
    chain(resolve(), plan, etl, content, last, train, check)
    chain([etl, content], check)
