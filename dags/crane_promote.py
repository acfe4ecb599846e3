"""### crane_promote: judge the candidate, move the alias, serve

Started by the asset `crane/candidate`, or by hand with the `run` to judge. One run at a time; the alias moves only
inside the one-slot pool `crane_promotion`.

**What it does.** `promote` re-reads the evidence from the registry, applies the gate (paired bootstrap against the
champion, baselines when there is none, guardrails) and moves the alias `champion`, with one line in the ledger.
`export` writes top-K recommendations, similar items and the ANN index of whoever is champion then, and finds them
there when nobody new is. `report` writes the HTML page of the run, promoted or refused.

**When it refuses.** The run is green: a refusal is a result. The reason is in the report, the ledger and the tags of
the version. Asset events of backfill runs are ignored.

**When it fails.** Clear the failed task: each step does nothing when its work is already done.

**Settings** (Airflow Variables, all optional): `crane_store`, `crane_project`, `crane_jobs_python`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from airflow.sdk import DAG, Asset, Param, chain, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
from deployment import DEFAULT_ARGS, job
from local_job import PROJECT, setting
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
    },
) as dag:

    @task(task_id="resolve")
    def resolve(params: dict[str, Any], triggering_asset_events: Any) -> dict[str, Any]:
        """Which run to judge: the one given, else the newest candidate that no backfill announced."""
        if params["run"]:
            store = params["store"] or setting("store", str(PROJECT / ".crane" / "store"))
            return {"flags": promote_flags(store=store, run=params["run"], overrides=params["overrides"])}
        events = [event for announced in triggering_asset_events.values() for event in announced]
        if not events:
            raise AirflowFailException("No asset event started this run: give the parameter run.")
        candidate = newest_candidate(events)
        if candidate is None:
            raise AirflowSkipException("Only backfill runs announced themselves: nothing to judge.")
        overrides = [*candidate["overrides"], *params["overrides"]]
        return {"flags": promote_flags(store=candidate["store"], run=candidate["run"], overrides=overrides)}

    chain(
        resolve(),
        job("ml.promote", flags=FLAGS),
        job("ml.export", flags=FLAGS),
        job("ml.report", flags=FLAGS),
    )
