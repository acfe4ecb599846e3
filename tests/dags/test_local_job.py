"""The operator that runs a job as a child process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import local_job
import pytest
from airflow.sdk.exceptions import AirflowException
from conftest import BAD_ROW
from job_output import FinalJobError
from local_job import LocalJobOperator

WAIT = "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def operator(**arguments):
    return LocalJobOperator(task_id="t", **({"job": "etl.features", "flags": "[]"} | arguments))


def test_the_command_is_an_argument_list(play, tmp_path):
    canary = tmp_path / "canary"
    flags = ["--store", "a b", "--set", f"runtime.raw=$(touch {canary}); `touch {canary}` 'x' \"y\" \\ *"]
    operator(flags=json.dumps(flags), part="2").execute({})
    assert play.calls()[0]["argv"] == [*flags, "--part", "2"]
    assert not canary.exists()


def test_a_whole_job_gets_no_part(play):
    operator(flags='["--run", "r"]').execute({})
    assert play.calls()[0]["argv"] == ["--run", "r"]


def test_it_returns_the_plain_values_of_the_last_line(play):
    play.act({"ml.promote": {"lines": ["noise", "{}"], "answer": {"decision": "promoted", "numbers": {"a": 1}}}})
    assert operator(job="ml.promote").execute({}) == {"stage": "ml.promote", "decision": "promoted"}


def test_lineage_names_what_was_read_and_made(play):
    answer = {"fingerprint": "f3", "inputs": {"ml.refine": "f1", "ml.knn.0": "f2a", "ml.knn.1": "f2b"}, "content": "c"}
    play.act({"ml.graph": {"answer": answer}})
    made = operator(job="ml.graph", flags='["--store", "/data/a store", "--run", "r"]')
    assert "inputs" not in made.execute({})
    told = made.get_openlineage_facets_on_complete(None)
    named = [[(each.namespace, each.name) for each in datasets] for datasets in (told.inputs, told.outputs)]
    store = "file:///data/a store"
    assert named == [[(store, "ml.knn/f2a"), (store, "ml.knn/f2b"), (store, "ml.refine/f1")], [(store, "ml.graph/f3")]]


def test_jobs_without_an_artifact_have_no_lineage(play):
    made = operator(job="plan", flags='["--store", "s3://b/p"]', returns="ml.knn")
    made.execute({})
    told = made.get_openlineage_facets_on_complete(None)
    assert (told.inputs, told.outputs) == ([], [])


def test_it_returns_one_value_whole(play):
    assert operator(job="plan", returns="ml.knn").execute({}) == ["0", "1", "2"]


@pytest.mark.parametrize(("code", "kind"), [(2, "configuration"), (3, "data"), (4, "artifact")])
def test_errors_of_the_user_are_final(play, code, kind):
    play.act({"etl.features": {"code": code, "error": BAD_ROW}})
    with pytest.raises(FinalJobError) as caught:
        operator().execute({})
    assert str(caught.value) == (
        f"jobs.etl.features ended with a {kind} error: "
        "DataError: items.parquet has a bad row. Remedy: Deliver it again."
    )


@pytest.mark.parametrize("code", [1, 5, 134])
def test_other_errors_are_retried(play, code):
    play.act({"etl.features": {"code": code, "error": BAD_ROW}})
    with pytest.raises(AirflowException, match=f"exit code {code}: DataError: .*bad row") as caught:
        operator().execute({})
    assert not isinstance(caught.value, FinalJobError)


def test_a_killed_job_is_retried(play):
    play.act({"etl.features": {"signal": signal.SIGKILL}})
    with pytest.raises(AirflowException, match=r"SIGKILL: the last line is '.* start stage=etl\.features'") as caught:
        operator().execute({})
    assert not isinstance(caught.value, FinalJobError)


def test_without_an_error_as_data_the_last_line_of_the_log_is_named(play):
    play.act({"etl.features": {"code": 3}})
    with pytest.raises(FinalJobError, match="data error: the last line is 'shutting down'"):
        operator().execute({})


def test_the_error_of_a_job_is_in_the_log_of_its_task(play, monkeypatch):
    seen = []
    monkeypatch.setattr(LocalJobOperator, "log", property(lambda self: _Log(seen)))
    play.act({"etl.features": {"code": 3, "error": BAD_ROW}})
    with pytest.raises(FinalJobError):
        operator().execute({})
    assert json.loads(seen[-1]) == {"stage": "etl.features", **BAD_ROW}


def test_a_silent_success_is_an_error(play):
    (play.folder / "jobs" / "etl" / "features.py").write_text("")
    with pytest.raises(AirflowException, match="printed no result"):
        operator().execute({})


def test_the_log_is_streamed_while_the_job_runs(play, monkeypatch):
    seen = []
    monkeypatch.setattr(LocalJobOperator, "log", property(lambda self: _Log(seen)))
    play.act({"etl.features": {"child": WAIT}})
    made = operator()
    thread = threading.Thread(target=_execute, args=(made, []))
    thread.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not any("start stage=etl.features" in line for line in seen):
        time.sleep(0.05)
    running = thread.is_alive()
    _wait_for(play.folder / "pids")
    made.on_kill()
    thread.join(30)
    assert running and any("start stage=etl.features" in line for line in seen)


class _Log:
    def __init__(self, lines):
        self.lines = lines

    def info(self, message, *arguments):
        self.lines.append(message % arguments)

    def warning(self, message):
        """Airflow warns that the operator runs outside of a task."""


def _execute(made, ended):
    with contextlib.suppress(AirflowException):
        made.execute({})
    ended.append("ended")


def test_airflows_settings_stay_with_airflow(play, monkeypatch):
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "secret")
    monkeypatch.setenv("AIRFLOW_CONN_PROD", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("CRANE_TEST_KEPT", "1")
    operator().execute({})
    names = play.calls()[0]["environment"]
    assert [name for name in names if "AIRFLOW" in name or name == "PYTHONPATH"] == []
    assert "CRANE_TEST_KEPT" in names


@pytest.mark.parametrize(("child", "patience"), [(WAIT, 10.0), (STUBBORN, 0.5)], ids=["willing", "stubborn"])
def test_a_kill_takes_the_whole_group(play, monkeypatch, child, patience):
    monkeypatch.setattr(local_job, "TERMINATION_SECONDS", patience)
    play.act({"etl.features": {"child": child}})
    made, ended = operator(), []
    thread = threading.Thread(target=_execute, args=(made, ended))
    thread.start()
    pids = _wait_for(play.folder / "pids")
    time.sleep(0.5)
    started = time.monotonic()
    made.on_kill()
    thread.join(30)
    assert ended == ["ended"]
    assert time.monotonic() - started < 10
    assert [pid for pid in pids if _is_running(pid)] == []


def test_a_timeout_ends_the_job(play):
    """Airflow interrupts `execute` with an exception that is no `Exception`."""

    class Interrupted(BaseException):
        pass

    def interrupt(*_):
        raise Interrupted

    play.act({"etl.features": {"child": WAIT}})
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 2.0)
    try:
        with pytest.raises(Interrupted):
            operator().execute({})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [pid for pid in _wait_for(play.folder / "pids") if _is_running(pid)] == []


def test_a_deployment_names_its_registry_once(monkeypatch):
    monkeypatch.delenv("AIRFLOW_VAR_CRANE_REGISTRY", raising=False)
    monkeypatch.setattr(local_job.Variable, "get", lambda key, default: os.environ.get(f"AIRFLOW_VAR_{key.upper()}"))
    assert local_job.deployment_overrides() == []
    monkeypatch.setenv("AIRFLOW_VAR_CRANE_REGISTRY", "http://mlflow:5000")
    assert local_job.deployment_overrides() == ["runtime.registry=http://mlflow:5000"]


def test_killing_before_the_start_does_nothing():
    operator().on_kill()


def _wait_for(path):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return [int(pid) for pid in path.read_text().split()]
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def _is_running(pid):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
        if not state.strip() or state.startswith("Z"):
            return False
        time.sleep(0.05)
    return True


def test_python_and_project_default_to_the_checkout():
    project = local_job.PROJECT
    assert (project / "dags" / "local_job.py").is_file()
    assert local_job.jobs_python(project) == project / ".venv" / "bin" / "python"
    assert sys.executable != str(local_job.jobs_python(project))
