"""### crane_retrain: from raw data to a registered candidate

It runs daily at midnight UTC over the day that has ended, `[start, end)`. One DAG run is active at a time.

**What it does.** `resolve` sets the window, the run id and the flags. `plan` checks the configuration and returns the
shards of the kNN search. The stages follow in order: `knn` has one mapped task per shard, and `behaviour` runs in
parallel to the stages that prepare the content. `evaluate` measures the model on rows that it has not seen. The group
`ship` then makes the model that will be served: `refit` starts the run `RUN.refit` with the choices of the evaluated
model, and the same stages bring it up to `train` with every row before `window.end`. `etl.refit=false` skips the group.
Each stage finds its artifact in the store or makes it, so if you clear
a task or the whole run, only missing artifacts are made. `register` registers the model version, gives it the alias
`candidate` and sends an event of the asset `crane/candidate`, which starts `crane_promote`. `tidy` is the teardown of
`plan`: however the run ends, it deletes what no job has used for `runtime.scratch_days` from the scratch folder.

**By hand.** Trigger it with `window_end` to build another window; without `window_start` the window is one day. `run`
sets the run id, `config` names a preset or a file, `overrides` sets single fields (`train.num_epochs=20`).

**Day on day.** With `etl.base_run=previous` and `refine.max_drift=0.05` in the configuration, a run keeps the ids of
the run before it and refines and searches only new and changed items.

**Backfill.** `airflow backfill create --dag-id crane_retrain --from-date ... --to-date ...`. A backfill run registers
its model. It moves no alias and sends no event.

**When it fails.** Airflow does not retry a task that ends with a configuration, data or artifact error. The last line
of its log says what was found and what to do. Airflow retries all other failures with growing pauses; a training goes
on from its last checkpoint. Mend the cause, then clear the failed task.

**Settings** (Airflow Variables, all optional): `crane_store`, `crane_config`, `crane_project`, `crane_jobs_python`,
`crane_registry`, `crane_notifiers` (`notices.py`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from airflow.sdk import (
    DAG,
    Asset,
    AssetAlias,
    BaseOperator,
    Context,
    CronDataIntervalTimetable,
    Param,
    TaskGroup,
    XComArg,
    chain,
    task,
)
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
# The outlet is an alias, so the asset gets an event only if `announce` adds one.
ANNOUNCEMENT = AssetAlias("crane/announcement")
INSTANT: dict[str, Any] = {"type": ["null", "string"], "format": "date-time", "pattern": INSTANT_PATTERN}
FLAGS = "{{ ti.xcom_pull(task_ids='resolve')['flags'] | tojson }}"
SHIP_FLAGS = "{{ (ti.xcom_pull(task_ids='resolve')['flags'] + ['--refit']) | tojson }}"


def announce(context: Context, registered: dict[str, Any]) -> None:
    """Send the asset event if the registered version is the candidate."""
    if registered["alias"] != "candidate":
        return
    resolved = context["ti"].xcom_pull(task_ids="resolve")
    extra = {key: resolved[key] for key in ("store", "run", "run_type", "overrides")} | {
        "version": registered["version"]
    }
    if registered.get("registry"):
        # The configuration file may be the only one to name it, and the judging jobs do not read that file.
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
        """Return the window, run id and flags of this run."""
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

    def trained(shards: XComArg, flags: str) -> tuple[BaseOperator, BaseOperator]:
        """Return the first and the last task of a model: the stages from the raw data to `train`."""
        chain(
            interactions := job("etl.interactions", flags=flags),
            job("etl.features", flags=flags),
            job("etl.profiles", flags=flags),
            job("ml.refine", flags=flags),
            mapped_job("ml.knn", shards, flags=flags),
            job("ml.graph", flags=flags),
            train := job("ml.train", flags=flags),
        )
        # The behavioural view needs no content, so it trains in parallel to the stages that prepare the content.
        chain(interactions, job("ml.behaviour", flags=flags), train)
        return interactions, train

    plan = job("plan", flags=FLAGS, returns="ml.knn")
    interactions, train = trained(plan.output, FLAGS)
    evaluate = job("ml.evaluate", flags=FLAGS)
    # With `etl.refit=false` the group is skipped and the evaluated model is registered.
    register = job(
        "ml.register", flags=FLAGS, outlets=[ANNOUNCEMENT], post_execute=announce, trigger_rule="none_failed"
    )
    chain(resolve(), plan, interactions)
    chain(train, evaluate, register, job("tidy", flags=FLAGS).as_teardown(setups=plan))
    with TaskGroup("ship"):

        @task.short_circuit(task_id="wanted", ignore_downstream_trigger_rules=False)
        def wanted(refit: dict[str, Any]) -> bool:
            """Skip the group if there is no refit run."""
            return refit["refit_run"] is not None

        refit = job("ml.refit", flags=FLAGS)
        first, last = trained(plan.output, SHIP_FLAGS)
        chain(evaluate, refit, wanted(refit.output), first)
        chain(last, register)
