"""What every DAG must have, and the exact shape of each."""

import json
import re
import subprocess
from datetime import timedelta

import pytest
from airflow.sdk import Asset, CronDataIntervalTimetable
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.sdk.exceptions import ParamValidationError
from conftest import DAGS, PROJECT
from deployment import JOBS, PROFILES, job

RETRAIN_EDGES = {
    ("resolve", "plan"),
    ("plan", "interactions"),
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
}
PROMOTE_EDGES = {("resolve", "promote"), ("promote", "export"), ("export", "report")}
POOLS = json.loads((PROJECT / "infra" / "local" / "pools.json").read_text())


def edges(dag):
    return {(task.task_id, other) for task in dag.tasks for other in task.downstream_task_ids}


def attribute(task, name):
    return task.partial_kwargs.get(name) if isinstance(task, MappedOperator) else getattr(task, name)


def test_every_file_is_one_dag_of_its_name(dags):
    ignored = {line for line in (DAGS / ".airflowignore").read_text().splitlines() if line and line[0] != "#"}
    assert {path.stem for path in DAGS.glob("*.py") if path.name not in ignored} == set(dags)


@pytest.mark.parametrize("dag_id", ["crane_retrain", "crane_promote"])
def test_dag_policy(dags, dag_id):
    dag = dags[dag_id]
    assert dag.max_active_runs == 1
    assert dag.catchup is False
    assert "crane" in dag.tags
    assert dag.description
    assert dag.start_date.utcoffset() == timedelta(0)
    for heading in ("What it does", "When it fails"):
        assert f"**{heading}" in dag.doc_md


@pytest.mark.parametrize("dag_id", ["crane_retrain", "crane_promote"])
def test_task_policy(dags, dag_id):
    for task in dags[dag_id].tasks:
        assert task.owner == "crane", task.task_id
        assert attribute(task, "retries") >= 1, task.task_id
        assert attribute(task, "retry_delay") >= timedelta(seconds=10), task.task_id
        assert attribute(task, "retry_exponential_backoff") > 1, task.task_id
        assert timedelta(minutes=1) <= attribute(task, "execution_timeout") <= timedelta(days=1), task.task_id
        assert attribute(task, "pool") in POOLS, task.task_id
        assert not task.depends_on_past, task.task_id


def test_scarce_things_have_one_slot(dags):
    assert {name: pool["slots"] for name, pool in POOLS.items()} == {
        "crane_compute": 1,
        "crane_gpu": 1,
        "crane_promotion": 1,
    }
    pools = {task.task_id: attribute(task, "pool") for dag in dags.values() for task in dag.tasks}
    assert pools["promote"] == "crane_promotion"
    assert [name for name, pool in pools.items() if pool == "crane_promotion"] == ["promote"]
    assert {pools[name] for name in ("behaviour", "refine", "knn", "train", "export")} == {"crane_gpu"}


def test_edges(dags):
    assert edges(dags["crane_retrain"]) == RETRAIN_EDGES
    assert edges(dags["crane_promote"]) == PROMOTE_EDGES


def test_every_stage_runs_after_the_stages_it_reads(dags):
    """The order here and the table of the jobs' environment say the same."""
    program = (
        "import json; from crane_core.pipeline import STAGES; "
        "print(json.dumps({name: stage.inputs + stage.joint_inputs for name, stage in STAGES.items()}))"
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


def test_mapped_tasks(dags):
    mapped = {task.task_id for task in dags["crane_retrain"].tasks if isinstance(task, MappedOperator)}
    assert mapped == {"knn"}


def test_every_job_gets_the_same_flags(dags):
    for dag in dags.values():
        flags = {attribute(task, "flags") for task in dag.tasks if task.task_id != "resolve" and _is_job(task)}
        assert len(flags) == 1


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
