"""### crane_rollback: make an earlier version champion again

Started by hand with `to`: a version's number, or `previous`, the champion before the current one.

**What it does.** `rollback` takes the same lease as a promotion, writes one line to the ledger, moves the alias
`champion` and tests the model through it; when the test fails the champion stays who it was, and the ledger says so.
`export` then writes what the champion recommends, or finds it: a version that was exported before is served at once.

**Twice is further.** `previous` in a second run goes back one champion more. A cleared or retried task of the same run
does not: it finishes what it began.

**When it fails.** The last log line of `rollback` says what was found: no earlier champion, no such version, files that
are not what was registered. Nothing has changed then. A failed `export` is cleared; the alias is right already.

**Settings** (Airflow Variables, all optional): `crane_store`, `crane_project`, `crane_jobs_python`,
`crane_registry`, `crane_notifiers` (`notices.py`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from airflow.sdk import DAG, Param, chain, task
from deployment import DEFAULT_ARGS, job
from local_job import PROJECT, deployment_overrides, setting
from notices import Notice
from windows import OVERRIDE_PATTERN, VERSION_PATTERN, crane_run_id, promote_flags, rollback_flags

FLAGS = "{{ ti.xcom_pull(task_ids='%s')['flags'] | tojson }}"


with DAG(
    dag_id="crane_rollback",
    description="Make an earlier version champion again",
    doc_md=__doc__,
    schedule=None,
    start_date=datetime(1997, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    on_failure_callback=Notice("failure"),
    tags=["crane", "promote"],
    params={
        "to": Param("previous", type="string", pattern=VERSION_PATTERN, description="Version, or previous"),
        "store": Param(None, type=["null", "string"], minLength=1, maxLength=1024, description="Artifact store URI"),
        "overrides": Param(
            [],
            type="array",
            maxItems=100,
            items={"type": "string", "pattern": OVERRIDE_PATTERN, "maxLength": 1024},
            description="runtime.field=value",
        ),
    },
) as dag:

    @task(task_id="resolve")
    def resolve(params: dict[str, Any], dag_run: Any) -> dict[str, Any]:
        """Flags of the rollback; this run's id tells a retry from a second wish."""
        store = params["store"] or setting("store", str(PROJECT / ".crane" / "store"))
        request = crane_run_id(dag_run.run_id)
        overrides = [*deployment_overrides(), *params["overrides"]]
        flags = rollback_flags(store=store, to=params["to"], request=request, overrides=overrides)
        return {"store": store, "overrides": overrides, "flags": flags}

    @task(task_id="champion")
    def champion(resolved: dict[str, Any], gone_back: dict[str, Any]) -> dict[str, Any]:
        """Flags of the champion's export: it is made from the champion's own run."""
        run, overrides = gone_back["champion_run"], resolved["overrides"]
        return {"flags": promote_flags(store=resolved["store"], run=run, overrides=overrides)}

    resolved = resolve()
    rollback = job("ml.rollback", flags=FLAGS % "resolve", on_success_callback=Notice("decision"))
    chain(resolved, rollback, champion(resolved, rollback.output), job("ml.export", flags=FLAGS % "champion"))
