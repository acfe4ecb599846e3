"""What every DAG must have, and the exact shape of each."""

import json
import re
import subprocess
from datetime import timedelta

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import Asset, CronDataIntervalTimetable, CronTriggerTimetable
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.sdk.definitions.retry_policy import RetryAction
from airflow.sdk.definitions.timetables.assets import AssetTriggeredTimetable
from airflow.sdk.definitions.timetables.simple import NullTimetable
from airflow.sdk.exceptions import AirflowTaskTimeout, ParamValidationError
from conftest import DAGS, PROJECT
from deployment import JOBS, PROFILES, job
from job_output import FinalJobError
from notices import Notice

RETRAIN_EDGES = {
    ("resolve", "plan"),
    ("plan", "deliveries"),
    ("deliveries", "interactions"),
    ("plan", "knn"),
    ("interactions", "features"),
    ("features", "profiles"),
    ("profiles", "refine"),
    ("refine", "knn"),
    ("knn", "graph"),
    ("graph", "train"),
    ("interactions", "behaviour"),
    ("behaviour", "train"),
    ("train", "evaluate"),
    ("evaluate", "register"),
    ("evaluate", "live"),
    ("live", "register"),
    ("evaluate", "ship.refit"),
    ("ship.refit", "ship.wanted"),
    ("ship.wanted", "ship.interactions"),
    ("plan", "ship.knn"),
    ("ship.interactions", "ship.features"),
    ("ship.features", "ship.profiles"),
    ("ship.profiles", "ship.refine"),
    ("ship.refine", "ship.knn"),
    ("ship.knn", "ship.graph"),
    ("ship.graph", "ship.train"),
    ("ship.interactions", "ship.behaviour"),
    ("ship.behaviour", "ship.train"),
    ("ship.train", "register"),
    ("register", "tidy"),
    ("plan", "tidy"),
    ("tidy", "prune"),
    ("plan", "prune"),
}
PROMOTE_EDGES = {
    ("resolve", "ask"),
    ("ask", "judge"),
    ("judge", "approve"),
    ("approve", "promote"),
    ("ask", "promote"),
    ("promote", "export"),
    ("export", "report"),
    ("export", "restore"),
}
BACKFILL_EDGES = {
    ("resolve", "plan"),
    ("plan", "etl"),
    ("plan", "content"),
    ("plan", "last_day"),
    ("etl", "content"),
    ("content", "last_day"),
    ("last_day", "train"),
    ("train", "check"),
    ("etl", "check"),
    ("content", "check"),
}
ROLLBACK_EDGES = {
    ("resolve", "rollback"),
    ("resolve", "champion"),
    ("rollback", "champion"),
    ("champion", "export"),
}
DAG_IDS = ["crane_backfill", "crane_promote", "crane_retrain", "crane_rollback"]
POOLS = json.loads((PROJECT / "infra" / "local" / "pools.json").read_text())


def edges(dag):
    return {(task.task_id, other) for task in dag.tasks for other in task.downstream_task_ids}


def attribute(task, name):
    return task.partial_kwargs.get(name) if isinstance(task, MappedOperator) else getattr(task, name)


def test_every_file_is_one_dag_of_its_name(dags):
    ignored = {line for line in (DAGS / ".airflowignore").read_text().splitlines() if line and line[0] != "#"}
    assert {path.stem for path in DAGS.glob("*.py") if path.name not in ignored} == set(dags)


def violations(dag):
    """What a DAG and its tasks break of the house rules."""
    rules = {
        "one run at a time": dag.max_active_runs == 1,
        "no catchup": dag.catchup is False,
        "tags": "crane" in dag.tags,
        "description": bool(dag.description),
        "start in UTC": dag.start_date is not None and dag.start_date.utcoffset() == timedelta(0),
        "runbook": all(f"**{heading}" in (dag.doc_md or "") for heading in ("What it does", "When it fails")),
        "failure callback": any(isinstance(callback, Notice) for callback in _list(dag.on_failure_callback)),
        "timetable": isinstance(dag.timetable, CronDataIntervalTimetable | AssetTriggeredTimetable | NullTimetable),
    }
    for task in dag.tasks:
        delay, timeout = attribute(task, "retry_delay"), attribute(task, "execution_timeout")
        rules |= {
            f"owner of {task.task_id}": task.owner == "crane",
            f"retries of {task.task_id}": (attribute(task, "retries") or 0) >= 1,
            f"retry delay of {task.task_id}": delay >= timedelta(seconds=10),
            f"retry policy of {task.task_id}": _ends(attribute(task, "retry_policy")),
            f"backoff of {task.task_id}": attribute(task, "retry_exponential_backoff") > 1,
            f"timeout of {task.task_id}": timeout and timedelta(minutes=1) <= timeout <= timedelta(days=1),
            f"pool of {task.task_id}": attribute(task, "pool") in POOLS,
            f"past of {task.task_id}": not task.depends_on_past,
        }
    return [name for name, holds in rules.items() if not holds]


def _ends(policy):
    """Whether a policy ends a task at an error of the user, and leaves everything else to the retries."""
    if policy is None:
        return False
    found = [policy.evaluate(error, 1, 2).action for error in (FinalJobError("x"), AirflowTaskTimeout(), OSError())]
    return found == [RetryAction.FAIL, RetryAction.DEFAULT, RetryAction.DEFAULT]


def _list(value):
    return list(value) if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("dag_id", DAG_IDS)
def test_policy(dags, dag_id):
    assert violations(dags[dag_id]) == []


@pytest.mark.parametrize(
    ("rule", "where", "name", "value"),
    [
        ("one run at a time", "dag", "max_active_runs", 2),
        ("no catchup", "dag", "catchup", True),
        ("tags", "dag", "tags", {"other"}),
        ("description", "dag", "description", None),
        ("start in UTC", "dag", "start_date", None),
        ("runbook", "dag", "doc_md", "**What it does.** Everything."),
        ("failure callback", "dag", "on_failure_callback", None),
        ("timetable", "dag", "timetable", CronTriggerTimetable("0 0 * * *", timezone="UTC")),
        ("owner of etl", "etl", "owner", "airflow"),
        ("retries of etl", "etl", "retries", 0),
        ("retry delay of etl", "etl", "retry_delay", timedelta(seconds=1)),
        ("retry policy of etl", "etl", "retry_policy", None),
        ("backoff of etl", "etl", "retry_exponential_backoff", 0),
        ("timeout of etl", "etl", "execution_timeout", None),
        ("pool of etl", "etl", "pool", "default_pool"),
        ("past of etl", "etl", "depends_on_past", True),
        ("retries of plan", "plan", "retries", 0),
        ("pool of plan", "plan", "pool", "default_pool"),
    ],
)
def test_a_broken_rule_shows(rule, where, name, value):
    """On a DAG of this test's own, read anew from its file."""
    dag = DagBag(dag_folder=str(DAGS / "crane_backfill.py")).dags["crane_backfill"]
    assert violations(dag) == []
    setattr(dag if where == "dag" else dag.get_task(where), name, value)
    assert violations(dag) == [rule]


def test_scarce_things_have_one_slot(dags):
    one_slot = {"crane_compute", "crane_gpu", "crane_backfill", "crane_promotion"}
    assert {name for name, pool in POOLS.items() if pool["slots"] == 1} == one_slot
    # A pod that runs while its task is deferred still fills its place.
    assert {name for name, pool in POOLS.items() if pool["include_deferred"]} == one_slot
    pools = {(dag.dag_id, task.task_id): attribute(task, "pool") for dag in dags.values() for task in dag.tasks}
    # Whoever may move the alias, and nobody else.
    assert {task for (_, task), pool in pools.items() if pool == "crane_promotion"} == {
        "promote",
        "restore",
        "rollback",
    }
    assert [key for key, pool in pools.items() if pool == "crane_backfill"] == [("crane_backfill", "etl")]
    # Nobody waits for a machine while a person thinks.
    assert {task for (_, task), pool in pools.items() if pool not in one_slot} == {"approve", "deliveries"}
    on_gpu = {task.rpartition(".")[2] for (_, task), pool in pools.items() if pool == "crane_gpu"}
    assert on_gpu == {"behaviour", "refine", "knn", "train", "evaluate", "export", "content"}


def test_edges(dags):
    assert edges(dags["crane_retrain"]) == RETRAIN_EDGES
    assert edges(dags["crane_promote"]) == PROMOTE_EDGES
    assert edges(dags["crane_backfill"]) == BACKFILL_EDGES
    assert edges(dags["crane_rollback"]) == ROLLBACK_EDGES


def test_a_retraining_tidies_up_however_it_ends(dags):
    """A setup, a teardown of it, and everything that works in between."""
    dag = dags["crane_retrain"]
    assert {task.task_id for task in dag.tasks if task.is_setup} == {"plan"}
    teardowns = {task.task_id for task in dag.tasks if task.is_teardown}
    assert teardowns == {"tidy", "prune"}
    for each in teardowns:
        assert dag.get_task(each).trigger_rule.value == "all_done_setup_success"
        # What cannot be cleared today is cleared tomorrow: it says nothing of the model.
        assert dag.get_task(each).on_failure_fail_dagrun is False
    tidy = dag.get_task("tidy")
    between = {task.task_id for task in dag.get_task("plan").get_flat_relatives(upstream=False)} - teardowns
    assert between == set(dag.task_ids) - {"resolve", "plan"} - teardowns
    assert between <= {task.task_id for task in tidy.get_flat_relatives(upstream=True)}
    for other in set(dags) - {"crane_retrain"}:
        assert not [task.task_id for task in dags[other].tasks if task.is_setup or task.is_teardown]


def test_every_stage_runs_after_the_stages_it_reads(dags):
    """The order here and the table of the jobs' environment say the same."""
    program = (
        "import json; from crane_core.config_file import load_config; from crane_core.stages import STAGES; "
        "joint = load_config('joint', ['window.start=2026-01-01', 'window.end=2026-01-02']); "
        "print(json.dumps({name: stage.inputs(joint) for name, stage in STAGES.items()}))"
    )
    python = PROJECT / ".venv" / "bin" / "python"
    inputs = json.loads(subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout)
    dag = dags["crane_retrain"]
    for stage, reads in inputs.items():
        if stage == "ml.export":
            continue
        upstream = {task.task_id for task in dag.get_task(stage.partition(".")[2]).get_flat_relatives(upstream=True)}
        assert {name.partition(".")[2] for name in reads} <= upstream, stage
    assert set(inputs) <= set(JOBS)


def test_schedules(dags):
    retrain = dags["crane_retrain"].timetable
    assert isinstance(retrain, CronDataIntervalTimetable)
    assert (retrain.expression, str(retrain.timezone)) == ("0 0 * * *", "UTC")
    asset_condition = dags["crane_promote"].timetable.asset_condition
    assert list(asset_condition.objects) == [Asset("crane/candidate")]
    for by_hand in ("crane_backfill", "crane_rollback"):
        assert isinstance(dags[by_hand].timetable, NullTimetable)


def test_only_a_failure_takes_a_promotion_back(dags):
    rules = {task.task_id: task.trigger_rule.value for task in dags["crane_promote"].tasks}
    assert rules.pop("restore") == "one_failed"
    assert rules.pop("promote") == "none_failed_min_one_success"
    assert set(rules.values()) == {"all_success"}


def test_nobody_answering_is_a_no(dags):
    approve = dags["crane_promote"].get_task("approve")
    assert approve.defaults == ["Reject"] and approve.response_timeout <= timedelta(days=3)


def test_mapped_tasks(dags):
    mapped = {
        (dag.dag_id, task.task_id) for dag in dags.values() for task in dag.tasks if isinstance(task, MappedOperator)
    }
    assert mapped == {
        ("crane_retrain", "knn"),
        ("crane_retrain", "ship.knn"),
        *(("crane_backfill", task) for task in ("etl", "content", "train")),
    }


def test_every_job_gets_the_same_flags(dags):
    flags = {task.task_id: attribute(task, "flags") for task in dags["crane_promote"].tasks if _is_job(task)}
    # It alone is told that a schedule asks.
    assert "['promote']" in flags.pop("promote")
    assert len(set(flags.values())) == 1
    assert len({attribute(task, "flags") for task in dags["crane_backfill"].tasks if _is_job(task)}) == 1
    flags = {task.task_id: attribute(task, "flags") for task in dags["crane_retrain"].tasks if _is_job(task)}
    shipped = {task for task, value in flags.items() if "--refit" in value}
    assert shipped == {task for task in flags if task.startswith("ship.")} - {"ship.refit"}
    assert len(set(flags.values())) == 2


def test_a_model_without_a_refit_is_registered_too(dags):
    """The group is skipped then, and nothing else may be."""
    dag = dags["crane_retrain"]
    assert dag.get_task("register").trigger_rule.value == "none_failed"
    assert dag.get_task("ship.wanted").ignore_downstream_trigger_rules is False
    assert dag.get_task("register").upstream_task_ids == {"evaluate", "live", "ship.train"}


def _is_job(task):
    return "flags" in (task.partial_kwargs if isinstance(task, MappedOperator) else vars(task))


def test_every_job_of_the_table_is_used_and_has_a_module(dags):
    named = {
        attribute(task, "job") if not isinstance(task, MappedOperator) else task.partial_kwargs["job"]
        for dag in dags.values()
        for task in dag.tasks
        if _is_job(task)
    }
    assert named == set(JOBS)
    for name in JOBS:
        assert (PROJECT / "jobs" / f"{name.replace('.', '/')}.py").is_file(), name


def test_an_unknown_profile_names_the_known_ones(monkeypatch):
    monkeypatch.setattr("deployment.PROFILE", "mainframe")
    with pytest.raises(ValueError, match=re.escape(f"one of {', '.join(PROFILES)}")):
        job("plan", flags="[]")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("overrides", ["train.num_epochs"]),
        ("overrides", ["--config=x"]),
        ("overrides", ["train.num_epochs=3\n"]),
        ("overrides", ["Train.x=1"]),
        ("overrides", "train.num_epochs=3"),
        ("overrides", ["runtime.raw=" + "x" * 2000]),
        ("run", "../elsewhere"),
        ("run", ""),
        ("run", "a" * 200),
        ("run", "--store"),
        ("run", "r1\n"),
        ("store", ""),
        ("store", 3),
    ],
)
@pytest.mark.parametrize("dag_id", ["crane_retrain", "crane_promote"])
def test_params_refuse(dags, dag_id, name, value):
    with pytest.raises(ParamValidationError):
        dags[dag_id].params.get_param(name).resolve(value)


@pytest.mark.parametrize(
    ("dag_id", "name", "value"),
    [
        ("crane_backfill", "from", None),
        ("crane_backfill", "from", "2026-13-01"),
        ("crane_backfill", "from", "2026-03-01T00:00:00Z"),
        ("crane_backfill", "to", "2026-03-01\n"),
        ("crane_backfill", "to", 20260301),
        ("crane_backfill", "stages", ["ml.train"]),
        ("crane_backfill", "stages", ["etl.features", "etl.features"]),
        ("crane_backfill", "stages", "etl.features"),
        ("crane_backfill", "train", "yes"),
        ("crane_backfill", "dry_run", None),
        ("crane_rollback", "to", ""),
        ("crane_rollback", "to", "0"),
        ("crane_rollback", "to", "latest"),
        ("crane_rollback", "to", "3\n"),
        ("crane_rollback", "to", 3),
        ("crane_promote", "approval", "true"),
    ],
)
def test_params_of_the_others_refuse(dags, dag_id, name, value):
    with pytest.raises(ParamValidationError):
        dags[dag_id].params.get_param(name).resolve(value)


def test_a_backfill_shows_its_plan_first(dags):
    params = dags["crane_backfill"].params
    assert params.get_param("dry_run").resolve() is True
    assert params.get_param("train").resolve() is False
    for name in ("from", "to"):
        with pytest.raises(ParamValidationError):
            params.get_param(name).resolve()
        assert params.get_param(name).resolve("2026-02-28") == "2026-02-28"
    assert dags["crane_rollback"].params.get_param("to").resolve() == "previous"
    assert dags["crane_rollback"].params.get_param("to").resolve("12") == "12"


@pytest.mark.parametrize("value", ["yesterday", "1998-04-23T00:00:00Z\n", "1998-04", "", 893289600])
@pytest.mark.parametrize("name", ["window_start", "window_end"])
def test_windows_refuse(dags, name, value):
    with pytest.raises(ParamValidationError):
        dags["crane_retrain"].params.get_param(name).resolve(value)


def test_params_accept(dags):
    params = dags["crane_retrain"].params
    overrides = ["runtime.raw=s3://bucket/raw", "evaluate.ks=[5, 20]", "train.num_epochs=3"]
    assert params.get_param("overrides").resolve(overrides) == overrides
    assert params.get_param("run").resolve("ml-100k-1998-04-23-0a1b2c3d") == "ml-100k-1998-04-23-0a1b2c3d"
    assert params.get_param("window_end").resolve("1998-04-23T00:00:00+00:00") == "1998-04-23T00:00:00+00:00"
    for name in ("store", "config", "run", "window_start", "window_end"):
        assert params.get_param(name).resolve(None) is None
