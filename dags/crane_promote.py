"""### crane_promote: judge the candidate, move the alias, serve

The asset `crane/candidate` starts it, and it judges the newest candidate, whichever started it. You can also start it
by hand with the `run` to judge. One DAG run is active at a time. The alias moves only under a lock in the store, so one
process at a time changes it, whether it belongs to this Airflow, to another one or to a person at a terminal. The tasks
that move it share the pool `crane_promotion`, which has one slot.

**What it does.** `promote` reads the evidence from the registry again and applies the gate: a paired bootstrap against
the champion (against the baselines if there is no champion), and the guardrails. It writes one line to the ledger,
moves the alias `champion` and tests the model through the alias. If that test fails, the same task makes the former
champion champion again. `export` writes the top-K recommendations, the similar items and the ANN index of the current
champion, or finds them if they exist. `restore` takes the promotion back; it runs only if a task after the decision has
failed and has no retry left. `report` writes the HTML page of the run, whether the model was promoted or refused.

**Approval.** To ask a person first, set the parameter `approval` or set the Variable `crane_approval` to `true`.
`judge` then applies the gate without writing anything, and `approve` waits up to three days for an answer on Airflow's
page *Required Actions*. No answer counts as a refusal: nothing is promoted, and you can judge the candidate again. An
approval does not overrule the gate.

**When several candidates wait.** While a run is active, for example because it waits for an approval, further
candidates start one run together. That run judges the newest of them. The ledger gets a line of the action `pass` for
each older candidate that nobody has judged. To judge such a candidate all the same, start this DAG with its `run`. A
version that was rolled back is promoted again only by hand.

**When it refuses.** The run is green, because a refusal is a result. The report, the ledger and the tags of the version
give the reason. The DAG ignores asset events of backfill runs.

**When the champion is gone.** If its version was removed in MLflow, `promote` first makes the last earlier champion
that is whole champion again, by a line in the ledger. If its files or evidence were removed or changed, the candidate
is judged as a first champion is, against the baselines, and the line says why.

**When it fails.** Clear the failed task. A task whose work is already done does nothing. After `restore`, mend the
cause, then clear `promote` and the tasks after it.

**Settings** (Airflow Variables, all optional): `crane_store`, `crane_project`, `crane_jobs_python`, `crane_approval`,
`crane_registry`, `crane_notifiers` (`notices.py`).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import DAG, Asset, Param, PartitionedAssetTimetable, chain, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
from deployment import DEFAULT_ARGS, SCHEDULE, job
from local_job import PROJECT, deployment_overrides, setting
from notices import Notice
from windows import OVERRIDE_PATTERN, RUN_ID_PATTERN, newest_candidate, promote_flags

CANDIDATE = Asset("crane/candidate")
FLAGS = "{{ ti.xcom_pull(task_ids='resolve')['flags'] | tojson }}"
MAX_EVENTS = 100
"""Newest announcements to look at: so many stores at most share one Airflow."""


with DAG(
    dag_id="crane_promote",
    description="Gate, alias, export and report of a candidate",
    doc_md=__doc__,
    # The events of a run with a partition key carry the key, and start only a DAG that listens for keys.
    schedule=PartitionedAssetTimetable(assets=CANDIDATE) if SCHEDULE == "delivery" else [CANDIDATE],
    start_date=datetime(1997, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    on_failure_callback=Notice("failure"),
    tags=["crane", "promote"],
    params={
        "store": Param(None, type=["null", "string"], minLength=1, maxLength=1024, description="Artifact store URI"),
        "run": Param(None, type=["null", "string"], pattern=RUN_ID_PATTERN, description="Run to judge, by hand"),
        "overrides": Param(
            [],
            type="array",
            maxItems=100,
            items={"type": "string", "pattern": OVERRIDE_PATTERN, "maxLength": 1024},
            description="runtime.field=value; the rest of the configuration is the run's own",
        ),
        "approval": Param(
            None, type=["null", "boolean"], description="Ask a person; crane_approval decides when unset"
        ),
    },
) as dag:

    @task(task_id="resolve", inlets=[CANDIDATE])
    def resolve(params: dict[str, Any], triggering_asset_events: Any, inlet_events: Any) -> dict[str, Any]:
        """Return the flags of the given run, else of the newest candidate that is not from a backfill."""
        if params["run"]:
            store = params["store"] or setting("store", str(PROJECT / ".crane" / "store"))
            overrides = [*deployment_overrides(), *params["overrides"]]
            flags = promote_flags(store=store, run=params["run"], overrides=overrides)
            return {"flags": flags, "promote": flags}
        events = [event for announced in triggering_asset_events.values() for event in announced]
        if not events:
            raise AirflowFailException(
                "No asset event started this: set the parameter run to the id of the run to judge."
            )
        started_by = newest_candidate(events)
        if started_by is None:
            raise AirflowSkipException("All asset events are from backfill runs: nothing to judge.")
        # Airflow hands over the events up to the first one that waited; newer ones start no run of their own.
        announced = inlet_events[CANDIDATE].ascending(False).limit(MAX_EVENTS)
        candidate = newest_candidate([*events, *announced], store=started_by["store"]) or started_by
        overrides = [*candidate["overrides"], *params["overrides"]]
        flags = promote_flags(store=candidate["store"], run=candidate["run"], overrides=overrides)
        return {"flags": flags, "promote": [*flags, "--announced"]}

    @task.branch(task_id="ask")
    def ask(params: dict[str, Any]) -> str:
        """Choose the branch: `judge` if a person is to be asked before the alias moves, else `promote`."""
        wanted = params["approval"]
        if wanted is None:
            wanted = setting("approval", "false").strip().lower() == "true"
        return "judge" if wanted else "promote"

    judge = job("ml.judge", flags=FLAGS)
    approve = ApprovalOperator(
        task_id="approve",
        # A pool of its own, so that no job waits for a slot while a person thinks.
        pool="crane_people",
        subject="Promote version {{ ti.xcom_pull(task_ids='judge')['version'] }} of {{ dag_run.run_id }}?",
        body="The gate: {{ ti.xcom_pull(task_ids='judge')['reason'] }}",
        defaults=[ApprovalOperator.REJECT],
        response_timeout=timedelta(days=3),
    )
    promote = job(
        "ml.promote",
        flags=FLAGS.replace("flags", "promote"),
        trigger_rule="none_failed_min_one_success",
        on_success_callback=Notice("decision"),
    )
    export = job("ml.export", flags=FLAGS)
    chain(resolve(), asked := ask(), judge, approve, promote, export, job("ml.report", flags=FLAGS))
    chain(asked, promote)
    chain(export, job("ml.restore", flags=FLAGS, trigger_rule="one_failed"))
