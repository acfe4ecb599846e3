"""Days that the scheduler runs by itself, and native backfills over them."""

from __future__ import annotations

from datetime import timedelta

from tests.drills.conftest import SCHEDULED_DAYS, Deployment
from tests.worlds.services import until

DAILY = ("etl.interactions", "etl.features", "etl.profiles", "ml.refine", "ml.graph", "ml.behaviour", "ml.train")
BACKFILLED_DAYS = 5


def ended(deployment: Deployment, dag_id: str, count: int) -> list[dict]:
    """The runs of a DAG, once so many have ended and none is under way."""

    def look() -> list[dict] | None:
        runs = deployment.airflow.runs(dag_id)
        over = [run for run in runs if run["state"] in ("success", "failed")]
        return runs if len(over) == len(runs) >= count else None

    return until(f"{count} runs of {dag_id}", look, patience=3600, every=3)


def test_three_scheduled_days(deployment: Deployment) -> None:
    airflow, store = deployment.airflow, deployment.store
    airflow.unpause("crane_retrain", "crane_promote")
    runs = ended(deployment, "crane_retrain", SCHEDULED_DAYS)
    for run in runs:
        assert run["state"] == "success", airflow.why("crane_retrain", run["dag_run_id"])
    assert [(run["run_type"], run["state"]) for run in runs] == [("scheduled", "success")] * SCHEDULED_DAYS
    for before, run in zip(range(SCHEDULED_DAYS, 0, -1), runs, strict=True):
        start, end = (f"{deployment.day(before - later)}T00:00:00Z" for later in (0, 1))
        assert (run["data_interval_start"], run["data_interval_end"]) == (start, end)
        crane_run = airflow.result("crane_retrain", run["dag_run_id"], "resolve")["run"]
        assert store.run(crane_run)["config"]["window"] == {"start": start, "end": end}
        for stage in DAILY:
            assert store.entry(crane_run, stage)["status"] == "done", stage
        # The newest event of each day is of the day, and none is of the day after.
        latest = store.artifact(crane_run, "etl.interactions").facts
        assert latest["num_train"] > 0 and latest["num_test"] > 0
    assert [version.number for version in deployment.registry.versions()] == ["1", "2", "3"]
    assert deployment.registry.holder("candidate") == "3"

    # Each candidate announced itself. Airflow starts one run for those that meet; it judges the newest of them.
    promotions = ended(deployment, "crane_promote", 1)
    assert {run["state"] for run in promotions} == {"success"}
    assert {run["run_type"] for run in promotions} == {"asset_triggered"}
    judged = until("ruling on version 3", lambda: {e.version for e in deployment.ledger.history()} & {"3"})
    assert judged
    ended(deployment, "crane_promote", len(promotions))
    # Those that were not judged have a line that says so.
    lines = {entry.version: entry.action for entry in deployment.ledger.history()}
    assert set(lines) == {"1", "2", "3"} and lines["3"] != "pass"
    champion = deployment.registry.holder("champion")
    assert champion is not None
    served = deployment.store.artifact(deployment.registry.version(champion).run_id, "ml.export")
    assert served.facts["num_users"] > 0
    assert deployment.assert_whole() >= SCHEDULED_DAYS * len(DAILY)


def test_a_native_backfill_moves_no_alias_and_repeats_nothing(deployment: Deployment) -> None:
    airflow, store = deployment.airflow, deployment.store
    aliases = {name: deployment.registry.holder(name) for name in ("candidate", "champion")}
    moves, ledger_size = deployment.proxy.alias_moves(), deployment.ledger.size()
    promotions = len(airflow.runs("crane_promote"))
    before = {run["dag_run_id"] for run in airflow.runs("crane_retrain")}
    artifacts = {stage: set(store.storage.names(stage)) for stage in DAILY}
    first, last = deployment.day(BACKFILLED_DAYS), deployment.day(1)
    airflow.cli(
        *("backfill", "create", "--dag-id", "crane_retrain", "--reprocess-behavior", "completed"),
        *("--from-date", f"{first}T00:00:00+00:00", "--to-date", f"{last}T00:00:00+00:00"),
    )
    runs = ended(deployment, "crane_retrain", BACKFILLED_DAYS)
    assert {(run["run_type"], run["state"]) for run in runs} == {("backfill", "success")}
    assert sorted(run["data_interval_start"][:10] for run in runs) == [
        str(first + timedelta(days=day)) for day in range(BACKFILLED_DAYS)
    ]
    for run in runs:
        resolved = airflow.result("crane_retrain", run["dag_run_id"], "resolve")
        window = store.run(resolved["run"])["config"]["window"]
        assert window["start"][:10] == run["data_interval_start"][:10]
        assert "runtime.backfill=true" in resolved["flags"]
        made = "found" if run["dag_run_id"] in before else "done"
        assert {stage: store.entry(resolved["run"], stage)["status"] for stage in DAILY} == dict.fromkeys(DAILY, made)
    # Two days were missing, and exactly two more of everything is there.
    added = {stage: len(set(store.storage.names(stage)) - artifacts[stage]) for stage in DAILY}
    assert added == dict.fromkeys(DAILY, BACKFILLED_DAYS - len(before))
    assert len(deployment.registry.versions()) == BACKFILLED_DAYS

    assert {name: deployment.registry.holder(name) for name in aliases} == aliases
    assert deployment.proxy.alias_moves() == moves
    assert deployment.ledger.size() == ledger_size
    assert len(airflow.runs("crane_promote")) == promotions
    deployment.assert_whole()
