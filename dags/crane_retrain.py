"""### crane_retrain: from raw data to a registered candidate

Daily at midnight UTC, over the day that ended (`[start, end)`), one run at a time.

**What it does.** `resolve` fixes the window, the run id and the flags; `plan` checks the configuration and tells
how many shards there are; then the stages in order, `knn` mapped over its shards and `behaviour` beside the stages
that prepare the content. Each stage leaves an artifact in the store or finds it there, so clearing a task, or the
whole run, repeats only what is missing. `register` leaves a model version with the alias `candidate` and announces it
with the asset `crane/candidate`, which starts `crane_promote`. `tidy`, the teardown of `plan`, clears from the scratch
folder what no job has used for `runtime.scratch_days`, however the run ends.

**By hand.** Trigger with `window_end` (and `window_start`, else one day) to rebuild another window, `run` to name the
run, `config` for a preset or file, `overrides` for single fields (`train.num_epochs=20`).

**Day on day.** With `etl.base_run=previous` and `refine.max_drift=0.05` in the configuration a run keeps the ids of the
run before it and refines and searches new and changed items alone.

**Backfill.** `airflow backfill create --dag-id crane_retrain --from-date ... --to-date ...`. A backfill run registers
its model but moves no alias and announces nothing.

**When it fails.** A task that ends with a configuration, data or artifact error is not retried: its last log line
says what was found and what to do. Everything else is retried with growing pauses; training goes on from its last
checkpoint. Mend the cause, clear the failed task.

**Settings** (Airflow Variables, all optional): `crane_store`, `crane_config`, `crane_project`, `crane_jobs_python`,
`crane_registry`, `crane_notifiers` (`notices.py`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from airflow.sdk import DAG, Asset, AssetAlias, Context, CronDataIntervalTimetable, Param, chain, task
from airflow.sdk.exceptions import AirflowFailException
from deployment import DEFAULT_ARGS, job, mapped_job
from local_job import PROJECT, deployment_overrides, setting
from notices import Notice
from windows import (
    INSTANT_PATTERN,
    OVERRIDE_PATTERN,
    RUN_ID_PATTERN,
    crane_run_id,
    resolve_window,
    retrain_flags,
    runtime_only,
)

CANDIDATE = Asset("crane/candidate")
# An alias as outlet: the asset gets an event only when `announce` adds one.
ANNOUNCEMENT = AssetAlias("crane/announcement")
INSTANT: dict[str, Any] = {"type": ["null", "string"], "format": "date-time", "pattern": INSTANT_PATTERN}
FLAGS = "{{ ti.xcom_pull(task_ids='resolve')['flags'] | tojson }}"


def announce(context: Context, registered: dict[str, Any]) -> None:
    """Emit the asset event when the registered version became the candidate."""
    if registered["alias"] != "candidate":
        return
    resolved = context["ti"].xcom_pull(task_ids="resolve")
    extra = {key: resolved[key] for key in ("store", "run", "run_type", "overrides")} | {
        "version": registered["version"]
    }
    if registered.get("registry"):
        # It may stand in the configuration file alone, which the judging jobs do not read.
        extra["overrides"] = [*resolved["overrides"], f"runtime.registry={registered['registry']}"]
    context["outlet_events"][ANNOUNCEMENT].add(CANDIDATE, extra=extra)


with DAG(
    dag_id="crane_retrain",
    description="Raw interactions and item features to a registered candidate model",
    doc_md=__doc__,
    schedule=CronDataIntervalTimetable("0 0 * * *", timezone="UTC"),
    start_date=datetime(1997, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    on_failure_callback=Notice("failure"),
    tags=["crane", "train"],
    params={
        "store": Param(None, type=["null", "string"], minLength=1, maxLength=1024, description="Artifact store URI"),
        "config": Param(None, type=["null", "string"], minLength=1, maxLength=1024, description="Preset or YAML file"),
        "run": Param(None, type=["null", "string"], pattern=RUN_ID_PATTERN, description="Run id"),
        "window_start": Param(None, description="First instant, UTC", **INSTANT),
        "window_end": Param(None, description="First instant after the window, UTC", **INSTANT),
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
    def resolve(params: dict[str, Any], dag_run: Any) -> dict[str, Any]:
        """Window, run id and flags of this run."""
        interval = (dag_run.data_interval_start, dag_run.data_interval_end)
        run_type = dag_run.run_type.value
        try:
            window = resolve_window(
                run_type,
                dag_run.run_after,
                interval if None not in interval else None,
                params["window_start"],
                params["window_end"],
            )
        except ValueError as error:
            raise AirflowFailException(str(error)) from error
        store = params["store"] or setting("store", str(PROJECT / ".crane" / "store"))
        config = params["config"] or setting("config", "") or None
        run = params["run"] or crane_run_id(dag_run.run_id)
        overrides = [*deployment_overrides(), *params["overrides"]]
        flags = retrain_flags(
            store=store, run=run, window=window, config=config, overrides=overrides, run_type=run_type
        )
        return {
            "store": store,
            "run": run,
            "run_type": run_type,
            "overrides": runtime_only(overrides),
            "flags": flags,
        }

    plan = job("plan", flags=FLAGS, returns="ml.knn")
    chain(
        resolve(),
        plan,
        interactions := job("etl.interactions", flags=FLAGS),
        job("etl.features", flags=FLAGS),
        job("etl.profiles", flags=FLAGS),
        job("ml.refine", flags=FLAGS),
        mapped_job("ml.knn", plan.output, flags=FLAGS),
        job("ml.graph", flags=FLAGS),
        train := job("ml.train", flags=FLAGS),
        job("ml.evaluate", flags=FLAGS),
        job("ml.register", flags=FLAGS, outlets=[ANNOUNCEMENT], post_execute=announce),
        job("tidy", flags=FLAGS).as_teardown(setups=plan),
    )
    # The behavioural view needs no content: it trains beside the stages that prepare it.
    chain(interactions, job("ml.behaviour", flags=FLAGS), train)
