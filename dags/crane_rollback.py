"""### crane_rollback: make an earlier version champion again

You start it by hand with `to`: the number of a version, or `previous` for the champion before the current one.

**What it does.** `rollback` takes the same lock as a promotion, writes one line to the ledger, moves the alias
`champion` and tests the model through it. If the test fails, the current champion stays champion and the ledger says
so. `export` writes the recommendations of the champion. If that version was exported before, `export` finds its
artifact.

**A second run.** Another run with `previous` goes back one more champion. A cleared or retried task of the same run
does not: it finishes what it has begun.

`previous` passes over champions that were removed from the registry, or whose run was pruned.

**When it fails.** The last line of the log of `rollback` says what was found: no earlier champion, no such version, a
version whose run was pruned, or files that differ from the registered ones. In these cases the champion is the same as
before. `crane ledger verify` names what else somebody has changed in MLflow, and `crane ledger repair` mends it. If
`export` fails, clear it: the alias has already moved.

**Settings** (Airflow Variables, all optional): `crane_store`, `crane_project`, `crane_jobs_python`, `crane_registry`,
`crane_notifiers` (`notices.py`).
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
        """Return the flags of the rollback. The id of this DAG run tells a retry from a second request."""
        store = params["store"] or setting("store", str(PROJECT / ".crane" / "store"))
        request = crane_run_id(dag_run.run_id)
        overrides = [*deployment_overrides(), *params["overrides"]]
        flags = rollback_flags(store=store, to=params["to"], request=request, overrides=overrides)
        return {"store": store, "overrides": overrides, "flags": flags}

    @task(task_id="champion")
    def champion(resolved: dict[str, Any], gone_back: dict[str, Any]) -> dict[str, Any]:
        """Return the flags of the export, which is made from the run of the champion."""
        run, overrides = gone_back["champion_run"], resolved["overrides"]
        return {"flags": promote_flags(store=resolved["store"], run=run, overrides=overrides)}

    resolved = resolve()
    rollback = job("ml.rollback", flags=FLAGS % "resolve", on_success_callback=Notice("decision"))
    chain(resolved, rollback, champion(resolved, rollback.output), job("ml.export", flags=FLAGS % "champion"))
