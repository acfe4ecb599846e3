"""Days that the scheduler runs by itself, and native backfills over them."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from importlib import import_module
from pathlib import Path
from statistics import mean

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from pyspark.sql import SparkSession

from crane_core.config_file import load_config
from crane_core.errors import EXIT_OK
from crane_core.stages import STAGES
from jobs.commands.local import SHIP, retrain_steps
from tests.drills.conftest import SCHEDULED_DAYS, Deployment
from tests.worlds.services import until

DAILY = ("etl.interactions", "etl.features", "etl.profiles", "ml.refine", "ml.graph", "ml.behaviour", "ml.train")
BACKFILLED_DAYS = 5
FIRST_DAY = BACKFILLED_DAYS + 1
"""Days before today of the run by hand whose lists are in service when the schedule begins."""
LIVE = ("recall@20", "ndcg@20", "hit@20")


def ended(deployment: Deployment, dag_id: str, count: int) -> list[dict]:
    """The runs of a DAG, once so many have ended and none is under way."""

    def look() -> list[dict] | None:
        runs = deployment.airflow.runs(dag_id)
        over = [run for run in runs if run["state"] in ("success", "failed")]
        return runs if len(over) == len(runs) >= count else None

    return until(f"{count} runs of {dag_id}", look, patience=3600, every=3)


def test_a_run_by_hand_puts_a_champion_into_service(spark: SparkSession, deployment: Deployment) -> None:
    window = (f"window.start={deployment.day(FIRST_DAY)}", f"window.end={deployment.day(FIRST_DAY - 1)}")
    flags = ["--store", str(deployment.store_path), "--run", "by-hand"]
    flags += ["--config", str(deployment.root / "config.yaml"), *(word for each in window for word in ("--set", each))]
    config = load_config(str(deployment.root / "config.yaml"), list(window))
    for step in [*retrain_steps(config), "ml.promote", "ml.export"]:
        name, refit = step.removeprefix(SHIP), ["--refit"] if step.startswith(SHIP) else []
        for part in STAGES[name].parts(config) if name in STAGES else ("",):
            assert import_module(f"jobs.{name}").main([*flags, *refit, "--part", part]) == EXIT_OK, step
    assert deployment.registry.holder("champion") == "1"
    live = (deployment.store.entry("by-hand", "ml.live") or {})["live"]
    assert live["status"] == "no_export", "nobody had exported anything yet"


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
    assert [version.number for version in deployment.registry.versions()] == ["1", "2", "3", "4"]
    assert deployment.registry.holder("candidate") == "4"

    # Each candidate announced itself. Airflow starts one run for those that meet; it judges the newest of them.
    promotions = ended(deployment, "crane_promote", 1)
    assert {run["state"] for run in promotions} == {"success"}
    assert {run["run_type"] for run in promotions} == {"asset_triggered"}
    judged = until("ruling on version 4", lambda: {e.version for e in deployment.ledger.history()} & {"4"})
    assert judged
    ended(deployment, "crane_promote", len(promotions))
    # Those that were not judged have a line that says so.
    lines = {entry.version: entry.action for entry in deployment.ledger.history()}
    assert set(lines) == {"1", "2", "3", "4"} and lines["4"] != "pass"
    champion = deployment.registry.holder("champion")
    assert champion is not None
    served = deployment.store.artifact(deployment.registry.version(champion).run_id, "ml.export")
    assert served.facts["num_users"] > 0
    assert deployment.assert_whole() >= SCHEDULED_DAYS * len(DAILY)


def test_the_scheduled_days_leave_live_scores_that_equal_a_computation_by_hand(deployment: Deployment) -> None:
    """From nothing but the files of the exports and the raw log."""
    log = [
        (row["user_id"], row["item_id"], row["event_time"])
        for row in ds.dataset(deployment.root / "raw" / "interactions", partitioning="hive").to_table().to_pylist()
    ]
    registry = deployment.registry
    versions = {version.run_id: version for version in registry.versions()}
    client = MlflowClient(registry.uri, registry.uri)
    judged = {entry.run_id: entry.numbers for entry in deployment.ledger.history() if entry.action != "pass"}
    for before, run in zip(
        range(SCHEDULED_DAYS, 0, -1), deployment.airflow.runs("crane_retrain")[:SCHEDULED_DAYS], strict=True
    ):
        crane_run = deployment.airflow.result("crane_retrain", run["dag_run_id"], "resolve")["run"]
        score = (deployment.store.entry(crane_run, "ml.live") or {})["live"]
        start, end, made = (datetime.fromisoformat(score[name]) for name in ("from", "until", "window_end"))
        assert (start.date(), end.date()) == (deployment.day(before), deployment.day(before - 1))
        assert made <= start, "no list is judged on what it was made from"
        export = deployment.store.find("ml.export", score["export"])
        assert export is not None
        expected = by_hand(log, export.path, made, start, end, score["half_life"])
        assert {name: score[name] for name in ("users", "events")} == {
            name: expected.pop(name) for name in ("users", "events")
        }
        assert score["covered"] == pytest.approx(expected.pop("covered"))
        assert score["models"] == {name: pytest.approx(metrics) for name, metrics in expected.items()}
        metrics = client.get_run(versions[crane_run].mlflow_run).data.metrics
        assert metrics["live/champion/recall_at_20"] == score["models"]["champion"]["recall@20"]
        assert crane_run not in judged or judged[crane_run]["live"] == score
    assert set(judged) > {"by-hand"}


def by_hand(
    log: list[tuple[str, str, datetime]],
    export: Path,
    made: datetime,
    start: datetime,
    end: datetime,
    half_life: float | None,
) -> dict:
    """Score the lists of an export, and the most popular items of its moment, on the events from `start` to `end`."""
    popular = pq.read_table(export / "popular.parquet").sort_by("rank")["item_id"].to_pylist()
    lists: dict[str, list[str]] = {}
    for row in pq.read_table(export / "recommendations").sort_by("rank").to_pylist():
        lists.setdefault(row["user_id"], []).append(row["item_id"])
    met: dict[str, set[str]] = {}
    new: dict[str, set[str]] = {}
    counts: dict[str, float] = {}
    for user, item, time in log:
        if time < made:
            met.setdefault(user, set()).add(item)
            age = (made - time) / timedelta(days=1)
            counts[item] = counts.get(item, 0) + (1 if half_life is None else 0.5 ** (age / half_life))
        elif start <= time < end:
            new.setdefault(user, set()).add(item)
    # Sums of the same ages in another order differ in their last digits.
    order = sorted(counts, key=lambda item: (-round(counts[item], 9), item))
    length = max(len(popular), *map(len, lists.values()))
    found: dict[str, list[dict[str, float]]] = {"champion": [], "recent_popularity": []}
    for user, items in new.items():
        recent = [item for item in order if item not in met.get(user, ())][:length]
        for name, ranked in (("champion", lists.get(user, popular)), ("recent_popularity", recent)):
            gains = [1 / math.log2(place + 2) for place, item in enumerate(ranked) if item in items]
            ideal = sum(1 / math.log2(place + 2) for place in range(min(20, len(items))))
            values = (len(gains) / len(items), sum(gains) / ideal, float(bool(gains)))
            found[name].append(dict(zip(LIVE, values, strict=True)))
    means = {name: {metric: mean(row[metric] for row in rows) for metric in LIVE} for name, rows in found.items()}
    covered = mean(user in lists for user in new)
    return {"users": len(new), "events": sum(map(len, new.values())), "covered": covered, **means}


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
    assert len(deployment.registry.versions()) == 1 + BACKFILLED_DAYS

    assert {name: deployment.registry.holder(name) for name in aliases} == aliases
    assert deployment.proxy.alias_moves() == moves
    assert deployment.ledger.size() == ledger_size
    assert len(airflow.runs("crane_promote")) == promotions
    deployment.assert_whole()
