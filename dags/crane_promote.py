"""### crane_promote: judge the candidate, move the alias, serve

Started by the asset `crane/candidate`, or by hand with the `run` to judge. One run at a time; the alias moves only
inside the one-slot pool `crane_promotion`, and under a lease in the store that also holds off other schedulers and
people at a terminal.

**What it does.** `promote` re-reads the evidence from the registry, applies the gate (paired bootstrap against the
champion, baselines when there is none, guardrails), writes one line to the ledger, moves the alias `champion` and tests
the model through it; when that test fails, the former champion is back within the same task. `export` writes top-K
recommendations, similar items and the ANN index of whoever is champion then, and finds them there when nobody new is.
`restore` runs only if something after the decision failed for good: it takes the promotion back. `report` writes the
HTML page of the run, promoted or refused.

**A person's word.** With the parameter `approval`, or the Variable `crane_approval` set to `true`, `judge` asks the
gate without writing anything, and `approve` waits up to three days for a person (Airflow's page *Required Actions*). No
answer is a no: nothing is promoted, and the candidate may be judged again. A yes does not overrule the gate.

**When it refuses.** The run is green: a refusal is a result. The reason is in the report, the ledger and the tags of
the version. Asset events of backfill runs are ignored.

**When it fails.** Clear the failed task: each step does nothing when its work is already done. After `restore`, clear
`promote` and what follows it once the cause is mended.

**Settings** (Airflow Variables, all optional): `crane_store`, `crane_project`, `crane_jobs_python`, `crane_approval`,
`crane_registry`, `crane_notifiers` (`notices.py`).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import DAG, Asset, Param, chain, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
from deployment import DEFAULT_ARGS, job
from local_job import PROJECT, deployment_overrides, setting
from notices import Notice
from windows import OVERRIDE_PATTERN, RUN_ID_PATTERN, newest_candidate, promote_flags

CANDIDATE = Asset("crane/candidate")
FLAGS = "{{ ti.xcom_pull(task_ids='resolve')['flags'] | tojson }}"


with DAG(
    dag_id="crane_promote",
    description="Gate, alias, export and report of a candidate",
    doc_md=__doc__,
    schedule=[CANDIDATE],
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

    @task(task_id="resolve")
    def resolve(params: dict[str, Any], triggering_asset_events: Any) -> dict[str, Any]:
        """Which run to judge: the one given, else the newest candidate that no backfill announced."""
        if params["run"]:
            store = params["store"] or setting("store", str(PROJECT / ".crane" / "store"))
            overrides = [*deployment_overrides(), *params["overrides"]]
            return {"flags": promote_flags(store=store, run=params["run"], overrides=overrides)}
        events = [event for announced in triggering_asset_events.values() for event in announced]
        if not events:
            raise AirflowFailException("No asset event started this run: give the parameter run.")
        candidate = newest_candidate(events)
        if candidate is None:
            raise AirflowSkipException("Only backfill runs announced themselves: nothing to judge.")
        overrides = [*candidate["overrides"], *params["overrides"]]
        return {"flags": promote_flags(store=candidate["store"], run=candidate["run"], overrides=overrides)}

    @task.branch(task_id="ask")
    def ask(params: dict[str, Any]) -> str:
        """Whether a person is asked before the alias may move."""
        wanted = params["approval"]
        if wanted is None:
            wanted = setting("approval", "false").strip().lower() == "true"
        return "judge" if wanted else "promote"

    judge = job("ml.judge", flags=FLAGS)
    approve = ApprovalOperator(
        task_id="approve",
        # No job waits for a slot that a person holds.
        pool="crane_people",
        subject="Promote version {{ ti.xcom_pull(task_ids='judge')['version'] }} of {{ dag_run.run_id }}?",
        body="The gate: {{ ti.xcom_pull(task_ids='judge')['reason'] }}",
        defaults=[ApprovalOperator.REJECT],
        response_timeout=timedelta(days=3),
    )
    promote = job(
        "ml.promote",
        flags=FLAGS,
        trigger_rule="none_failed_min_one_success",
        on_success_callback=Notice("decision"),
    )
    export = job("ml.export", flags=FLAGS)
    chain(resolve(), asked := ask(), judge, approve, promote, export, job("ml.report", flags=FLAGS))
    chain(asked, promote)
    chain(export, job("ml.restore", flags=FLAGS, trigger_rule="one_failed"))
