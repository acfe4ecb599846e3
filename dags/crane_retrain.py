"""### crane_retrain: from raw data to a registered candidate

It runs daily at midnight UTC over the day that has ended, `[start, end)`. With the environment variable
`CRANE_SCHEDULE=delivery` of the DAG processor the producer of the data starts it instead. One DAG run is active at a
time; the runs of backfills come beside it.

**What it does.** `resolve` sets the window, the run id and the flags. `plan` checks the configuration and returns the
shards of the kNN search. `deliveries` waits for the data. The stages follow in order: `knn` has one mapped task per
shard, and `behaviour` runs in parallel to the stages that prepare the content. `evaluate` measures the model on rows
that it has not seen. The group `ship` then makes the model that will be served: `refit` starts the run `RUN.refit` with
the choices of the evaluated model, and the same stages bring it up to `train` with every row before `window.end`.
`etl.refit=false` skips the group. Each stage finds its artifact in the store or makes it, so if you clear a task or the
whole run, only missing artifacts are made. `register` registers the model version, gives it the alias `candidate` and
sends an event of the asset `crane/candidate`, which starts `crane_promote`. `tidy` is the teardown of `plan`: however
the run ends, it deletes what no job has used for `runtime.scratch_days` from the scratch folder. Then `prune` removes
the runs and artifacts that nothing needs, if `runtime.keep_days` is set (`jobs/prune.py` says what is kept).

**Deliveries.** A scheduled run waits until the partition `dt=` of each day that ends within its window is complete: its
files have not changed for `runtime.delivery_quiet_minutes`, or, with `runtime.delivery=marker`, it holds the file
`_SUCCESS` (`runtime.delivery_marker`). The task looks once a minute and takes no slot in between. It fails
`runtime.delivery_deadline_hours` after the window's end with the name of what is missing, and calls the notifiers with
the occasion `undelivered`. Deliver it, then clear the task; or go on without it, by a run by hand. A run by hand does
not wait, unless an override sets `runtime.delivery`; a backfill run looks, and fails at once if a day is missing.
`interactions` stops where the last day has far fewer events than a day of its kind (`etl.completeness_stop`).

**Started by the delivery.** With `CRANE_SCHEDULE=delivery` an event of the asset `crane/delivery` with the partition
key `2026-01-31` starts the run for that day, UTC. No key is lost while a run is active. Announce a day with

    curl -X POST .../api/v2/assets/events -d '{"asset_id": N, "partition_key": "2026-01-31", "extra": {}}'

or with a task of the producer's DAG (`outlet_events[Asset("crane/delivery")].add_partitions(["2026-01-31"])`).
`crane_promote` then follows keyed candidates only: after a retraining by hand, start it by hand. Native backfills do
not work on such a DAG: announce the days, or use `crane_backfill`.

**By hand.** Trigger it with `window_end` to build another window; without `window_start` the window is one day. `run`
sets the run id, `config` names a preset or a file, `overrides` sets single fields (`train.num_epochs=20`).

**Day on day.** With `etl.base_run=previous` and `refine.max_drift=0.05` in the configuration, a run keeps the ids of
the run before it and refines and searches only new and changed items.

**Missed days.** A run that lasts over several midnights, or a paused DAG, leaves days without a run. The next scheduled
run says so in the log of `resolve`, calls the notifiers with the occasion `missed`, and names the days in its report.
Its own model has learned from these days too, since it reads the history. To make them up, create a backfill. With
the environment variable `CRANE_CATCHUP_FROM=YYYY-MM-DD` of the DAG processor Airflow makes up every day since then by
itself, one after the other.

**Backfill.** Type

    airflow backfill create --dag-id crane_retrain --from-date 2026-01-01 --to-date 2026-01-05 --max-active-runs 1

for the days 2026-01-01 to 2026-01-05. A backfill run registers its model. It moves no alias and sends no event. Its
jobs wait, without a slot, for the backfill runs of earlier days and for any other run of this DAG that is at work. So
its days are built oldest first, and the daily run waits for one stage at most. Without `--max-active-runs 1` the order
is the same, but ten runs wait at once. With `etl.base_run=previous` a backfill run goes on from the run that ends where
its own window begins. Where there is none, it is refused: backfill the day before first, or begin a new numbering with
`--dag-run-conf '{"overrides": ["etl.base_run=null"]}'`. If you cancel a backfill, set its runs that do not end to
failed: later ones wait for them.

**When it fails.** Airflow does not retry a task that ends with a configuration, data or artifact error. The last line
of its log says what was found and what to do. Airflow retries all other failures with growing pauses; a training goes
on from its last checkpoint. Mend the cause, then clear the failed task.

**Settings** (Airflow Variables, all optional): `crane_store`, `crane_config`, `crane_project`, `crane_jobs_python`,
`crane_registry`, `crane_notifiers` (`notices.py`).
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import (
    DAG,
    Asset,
    AssetAlias,
    BaseOperator,
    Context,
    CronDataIntervalTimetable,
    Param,
    PartitionedAssetTimetable,
    TaskGroup,
    XComArg,
    chain,
    task,
)
from airflow.sdk.exceptions import AirflowFailException, AirflowRescheduleException
from deployment import CATCHUP_FROM, DEFAULT_ARGS, SCHEDULE, job, mapped_job
from local_job import PROJECT, deployment_overrides, setting
from notices import Notice
from other_runs import last_interval_end
from windows import (
    INSTANT_PATTERN,
    OVERRIDE_PATTERN,
    RUN_ID_PATTERN,
    crane_run_id,
    missed_interval,
    resolve_window,
    retrain_flags,
    runtime_only,
)

logger = logging.getLogger(__name__)

CANDIDATE = Asset("crane/candidate")
# The producer of the data announces a day by an event with the partition key YYYY-MM-DD.
DELIVERY = Asset("crane/delivery")
SCHEDULES = {
    "clock": lambda: CronDataIntervalTimetable("0 0 * * *", timezone="UTC"),
    "delivery": lambda: PartitionedAssetTimetable(assets=DELIVERY),
}
DELIVERY_POLL = timedelta(minutes=1)
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


def wait_for_data(context: Context, found: dict[str, Any]) -> None:
    """Let the task `deliveries` look again after `DELIVERY_POLL`, without a slot meanwhile, until all is there.

    Raises:
        AirflowRescheduleException: something is still missing, and the deadline has not passed.
    """
    if not found["complete"]:
        logger.info("waiting for=%s until=%s", found["lacking"], found["deadline"])
        raise AirflowRescheduleException(datetime.now(UTC) + DELIVERY_POLL)


def tell_missed(context: Context) -> None:
    """Call the notifiers if there was no run for the time before this run's interval."""
    missed = context["ti"].xcom_pull(task_ids="resolve")["missed"]
    if missed:
        Notice("missed")({**context, "missed": missed})


with DAG(
    dag_id="crane_retrain",
    description="Raw interactions and item features to a registered candidate model",
    doc_md=__doc__,
    schedule=SCHEDULES[SCHEDULE](),
    start_date=CATCHUP_FROM or datetime(1997, 1, 1, tzinfo=UTC),
    catchup=CATCHUP_FROM is not None,
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

    @task(task_id="resolve", on_success_callback=tell_missed)
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
                dag_run.partition_key,
            )
        except ValueError as error:
            raise AirflowFailException(str(error)) from error
        missed = missed_interval(last_interval_end(dag_run), window[0]) if run_type == "scheduled" else ""
        if missed:
            logger.warning("missed interval=%s: no run was made for it", missed)
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
            "missed": missed,
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
    deliveries = job("deliveries", flags=FLAGS, post_execute=wait_for_data, on_failure_callback=Notice("undelivered"))
    interactions, train = trained(plan.output, FLAGS)
    evaluate = job("ml.evaluate", flags=FLAGS)
    # With `etl.refit=false` the group is skipped and the evaluated model is registered.
    register = job(
        "ml.register", flags=FLAGS, outlets=[ANNOUNCEMENT], post_execute=announce, trigger_rule="none_failed"
    )
    chain(resolve(), plan, deliveries, interactions)
    tidy, prune = (job(name, flags=FLAGS).as_teardown(setups=plan) for name in ("tidy", "prune"))
    chain(train, evaluate, job("ml.live", flags=FLAGS), register, tidy, prune)
    chain(evaluate, register)
    with TaskGroup("ship"):

        @task.short_circuit(task_id="wanted", ignore_downstream_trigger_rules=False)
        def wanted(refit: dict[str, Any]) -> bool:
            """Skip the group if there is no refit run."""
            return refit["refit_run"] is not None

        refit = job("ml.refit", flags=FLAGS)
        first, last = trained(plan.output, SHIP_FLAGS)
        chain(evaluate, refit, wanted(refit.output), first)
        chain(last, register)
