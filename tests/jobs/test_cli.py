"""The console script where no Airflow, Spark or registry is needed: errors, JSON, the doctor, the steps it shows."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from crane_core.config import Runtime
from crane_core.config_file import load_config
from crane_core.errors import (
    EXIT_ARTIFACT,
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_UNEXPECTED,
    ArtifactError,
    ConfigError,
    CraneError,
    DataError,
    UnexpectedError,
)
from jobs import cli
from jobs.commands import airflow, demo, doctor, local, paths
from jobs.commands.airflow import LocalAirflow
from jobs.commands.command_line import command_line
from jobs.commands.local import run_child, run_stages
from jobs.commands.steps import Steps, failure_in
from jobs.stores import open_store

WINDOW = ["window.start=2026-03-01", "window.end=2026-03-02"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "HOME", tmp_path / ".crane")
    (tmp_path / ".crane").mkdir()
    return tmp_path / ".crane"


def test_without_a_store_it_says_how_to_get_one(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "--json"]) == EXIT_CONFIG
    captured = capsys.readouterr()
    problem = json.loads(captured.out)
    assert problem["error"] == "ConfigError" and "make demo" in problem["remedy"]
    assert "Remedy:" in captured.err


@pytest.mark.parametrize("as_json", [False, True])
def test_a_reader_that_has_enough_ends_the_command_quietly(as_json: bool) -> None:
    program = (
        "import sys; from jobs import cli; "
        "cli._runs = lambda arguments: cli._result(arguments, {'x': 'y' * 10**6}, ['a line'] * 200_000); "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", program, "runs", *(["--json"] if as_json else [])]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(4)
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""


def test_errors_leave_stdout_alone_without_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recommend", "--user", "1"]) == EXIT_CONFIG
    assert capsys.readouterr().out == ""


def test_the_store_of_the_last_demo_is_the_default(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(str(home / "d" / "store"))
    store.start_run("r1", load_config(None, WINDOW))
    paths.remember(paths.Last(store.storage.uri, "r1"), home)
    assert cli.main(["runs", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run == {
        "run": "r1",
        "start": "2026-03-01T00:00:00Z",
        "end": "2026-03-02T00:00:00Z",
        "stages": [],
        "num_stages": run["num_stages"],
        "shipped_run": None,
        "model_version": None,
        "aliases": [],
        "recall@20": None,
    }


def test_runs_are_ordered_by_their_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(str(tmp_path))
    for name, month in (("a", 5), ("b", 3), ("c", 4)):
        window = [f"window.start=2026-0{month}-01", f"window.end=2026-0{month}-02"]
        store.start_run(name, load_config(None, window))
    assert cli.main(["runs", "--store", str(tmp_path), "--json"]) == 0
    assert [run["run"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["b", "c", "a"]


def test_run_ids_tell_configurations_apart_but_not_places() -> None:
    config = load_config("movielens", WINDOW)
    name = demo.run_id("ml 100k", config)
    assert name.startswith("ml-100k-2026-03-02-") and len(name.rpartition("-")[2]) == 8
    assert demo.run_id("ml 100k", load_config("movielens", [*WINDOW, "runtime.num_threads=1"])) == name
    assert demo.run_id("ml 100k", load_config("movielens", [*WINDOW, "train.seed=1"])) != name


def test_raw_data_may_lie_in_a_bucket() -> None:
    assert cli.absolute("s3://bucket/raw data") == "s3://bucket/raw data"
    assert cli.absolute("raw") == str(Path("raw").absolute())


def test_the_demo_refuses_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        demo.demo(tmp_path / "nowhere", None, [], tmp_path / "home")


def test_a_wheel_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    present.touch()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was asked"))
    assert demo.wheel(tmp_path, Steps()) == present


def test_a_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], 1, "", "no matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(CraneError, match=r"no matching distribution.*DATA="):
        demo.wheel(tmp_path, Steps())


def test_without_airflow_the_demo_points_at_setup(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make setup"):
        LocalAirflow(tmp_path, tmp_path / "log", Steps(), environment=tmp_path / "absent")


def play_airflow(folder: Path, records: list[dict[str, object]], code: int = 0) -> LocalAirflow:
    """An `airflow` program that only prints log records."""
    lines = "\n".join(["not json", *map(json.dumps, records)])
    program = folder / "bin" / "airflow"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\nexit {code}\n")
    program.chmod(0o755)
    return LocalAirflow(folder / "home", folder / "log", Steps(), environment=folder)


FAILING = [
    {"event": "[DAG TEST] starting task_id=knn map_index=1", "logger": "airflow.sdk.definitions.dag"},
    {
        "event": "2026-01-01 00:00:00,000 ERROR jobs.runner failed stage=ml.knn error=DataError message=a row "
        "is bad. Remedy: mend it.",
        "logger": "airflow.task.operators.local_job.LocalJobOperator",
    },
    {
        "event": '{"stage": "ml.knn", "error": "DataError", "found": "a row is bad.", "remedy": "mend it."}',
        "logger": "airflow.task.operators.local_job.LocalJobOperator",
    },
    {"event": "Task instance state updated", "new_state": "failed"},
    {"event": "[DAG TEST] starting task_id=late map_index=-1"},
]


def test_airflows_records_become_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CraneError) as caught:
        play_airflow(tmp_path, FAILING, code=1).run_dag("crane_retrain", {"run": "r"}, datetime(2026, 1, 1, tzinfo=UTC))
    assert caught.value.found == "Task knn[1] of crane_retrain failed: a row is bad."
    assert caught.value.remedy == "mend it."
    shown = capsys.readouterr().err
    assert "knn[1]         start" in shown
    assert "failed stage=ml.knn" in shown
    assert "knn[1]         failed seconds=" in shown
    assert "not json" in (tmp_path / "log").read_text()


def test_a_dag_that_fails_without_a_job_names_the_exception(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"event": "[DAG TEST] starting task_id=resolve map_index=-1"},
        {"event": "Task failed with exception", "exception": [{"exc_value": "A window start needs a window end."}]},
        {"event": "Task instance state updated", "new_state": "failed"},
    ]
    with pytest.raises(CraneError, match=r"Task resolve of crane_retrain failed: A window start needs a window end\."):
        play_airflow(tmp_path, records, code=1).run_dag("crane_retrain", {})


def test_a_private_airflow_ignores_other_airflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTOR", "CeleryExecutor")
    monkeypatch.setenv("AIRFLOW_CONFIG", "/etc/airflow.cfg")
    environment = play_airflow(tmp_path, []).environment()
    assert "AIRFLOW__CORE__EXECUTOR" not in environment and "AIRFLOW_CONFIG" not in environment
    assert environment["AIRFLOW_HOME"] == str(tmp_path / "home")
    assert environment["AIRFLOW__API__HOST"] == "127.0.0.1"


def test_it_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = play_airflow(tmp_path, [])
    calls: list[list[str]] = []
    monkeypatch.setattr(airflow.subprocess, "call", lambda argv, **_: calls.append(argv[1:3]) or 0)
    made.prepare()
    made.prepare()
    assert calls == [["db", "migrate"], ["pools", "import"]]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"stage": "x", "error": "DataError", "found": "found it.", "remedy": "do this."}', DataError),
        ('{"stage": "x", "error": "OSError", "found": "found it.", "remedy": "do this."}', UnexpectedError),
        ('{"stage": "x", "status": "done"}', None),
        ('{"stage": "x", "error": "DataError", "found": 3, "remedy": "do this."}', None),
        ("failed stage=x error=E message=found it. Remedy: do this.", None),
        ('["a list"]', None),
        ("exit code 1", None),
    ],
)
def test_an_error_is_read_from_the_json_line(line: str, expected: type[CraneError] | None) -> None:
    error = failure_in(line)
    assert error is None if expected is None else type(error) is expected
    if error is not None:
        assert {"stage": "x", **error.as_dict()} == json.loads(line)


def test_tracebacks_stay_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    steps = Steps()
    steps.job_line("x", "Traceback (most recent call last):")
    steps.job_line("x", "2026-01-01 00:00:00,000 INFO jobs.runner done stage=x")
    assert shown.getvalue().splitlines()[0].endswith("done stage=x")
    assert len(shown.getvalue().splitlines()) == 1


def test_a_plan_is_run_as_a_job(tmp_path: Path) -> None:
    flags = ["--store", str(tmp_path / "s"), "--run", "r", "--set", WINDOW[0], "--set", WINDOW[1]]
    answer = run_child("plan", [*flags, "--set", "knn.num_shards=3"], tmp_path / "log", Steps())
    assert answer["ml.knn"] == ["0", "1", "2"]
    assert all(isinstance(parts, list) for name, parts in answer.items() if name.startswith("ml."))


def test_a_known_run_needs_no_configuration(tmp_path: Path) -> None:
    flags = ["--store", str(tmp_path / "s"), "--run", "r"]
    settings = ["--set", WINDOW[0], "--set", WINDOW[1], "--set", "knn.num_shards=4"]
    run_child("plan", [*flags, *settings], tmp_path / "log", Steps())
    assert len(run_child("plan", flags, tmp_path / "log", Steps())["ml.knn"]) == 4
    with pytest.raises(ConfigError, match=r"knn.num_shards was 4, now 5"):
        run_child("plan", [*flags, "--set", "knn.num_shards=5"], tmp_path / "log", Steps())


@pytest.mark.parametrize(
    ("code", "kind"),
    [(EXIT_CONFIG, ConfigError), (EXIT_DATA, DataError), (EXIT_ARTIFACT, ArtifactError), (1, CraneError)],
)
def test_a_jobs_exit_code_becomes_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[CraneError]
) -> None:
    write_play(tmp_path, f"import sys; sys.exit({code})")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=f"jobs.play failed: exit code {code}") as caught:
        run_child("play", [], tmp_path / "log", Steps())
    assert type(caught.value) is kind


def test_a_jobs_error_is_told_as_the_job_told_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"stage": "play", "error": "DataError", "found": "It says: Remedy: none.", "remedy": "Mend it."}
    write_play(tmp_path, f"import sys; print('noise'); print({json.dumps(told)!r}); sys.exit(3)")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        run_child("play", [], tmp_path / "log", Steps())
    assert caught.value.found == "jobs.play failed: It says: Remedy: none."
    assert caught.value.remedy == "Mend it."


def test_an_unexpected_error_of_a_job_is_told_with_the_file_of_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_play(
        tmp_path,
        "from jobs.entry_points import run_command\nraise SystemExit(run_command('play', lambda *_: 1 / 0))\n",
    )
    (tmp_path / "jobs" / "__init__.py").write_text(f"__path__.append({str(paths.PROJECT / 'jobs')!r})")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnexpectedError) as caught:
        run_child("play", ["--store", str(tmp_path / "store")], tmp_path / "log", Steps())
    assert caught.value.as_dict()["error"] == "ZeroDivisionError"
    assert caught.value.found == "jobs.play failed: division by zero"
    assert str(tmp_path / "log") in caught.value.remedy
    assert "Traceback (most recent call last):" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(("as_json", "writable"), [(False, True), (True, True), (False, False)])
def test_an_unexpected_exception_ends_with_an_error_line_and_keeps_its_traceback(
    as_json: bool, writable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLANTED_PASSWORD", "planted-secret")
    monkeypatch.setattr(paths, "HOME", tmp_path)
    if not writable:
        (tmp_path / "logs").touch()

    def explode(text: str) -> str:
        raise RuntimeError("no way in with planted-secret")

    monkeypatch.setattr(cli, "absolute", explode)
    argv = ["run", "--store", "s", "--raw", "r", *(["--json"] if as_json else [])]
    assert cli.main(argv) == EXIT_UNEXPECTED
    output = capsys.readouterr()
    kept = (tmp_path / "logs" / "crane.log").read_text() if writable else output.err
    assert "Traceback" in kept and "planted-secret" not in kept + output.err + output.out
    assert ("Traceback" in output.err) != writable
    assert output.err.splitlines()[-2] == "crane: RuntimeError: no way in with ***"
    assert output.err.splitlines()[-1].startswith("Remedy: This is a defect of crane: report this line with the ")
    assert (str(tmp_path / "logs" / "crane.log") in output.err) == writable
    if as_json:
        told = json.loads(output.out)
        assert (told["error"], told["found"]) == ("RuntimeError", "no way in with ***")
    else:
        assert output.out == ""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["recommend", "--json"], "--user"),
        (["runs", "--json", "--stroe", "s"], "--stroe s"),
        (["plan", "--json", "--users", "many"], "many"),
        (["teleport", "--json"], "teleport"),
    ],
)
def test_wrong_flags_are_a_config_error(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == EXIT_CONFIG
    output = capsys.readouterr()
    told = json.loads(output.out)
    assert told["error"] == "ConfigError" and said in told["found"]
    assert told["remedy"].startswith("Type crane ") and "--help" in told["remedy"]
    assert output.err.splitlines()[-1] == f"Remedy: {told['remedy']}"


def test_every_part_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(local, "run_child", lambda name, flags, log, steps, label: asked.append((label, flags)) or {})
    config = load_config(None, [*WINDOW, "knn.num_shards=2"])
    run_stages(["ml.refine", "ml.knn", "ml.report"], config, ["--run", "r"], tmp_path / "log", Steps())
    assert asked == [
        ("ml.refine", ["--run", "r"]),
        ("ml.knn.0", ["--run", "r", "--part", "0"]),
        ("ml.knn.1", ["--run", "r", "--part", "1"]),
        ("ml.report", ["--run", "r"]),
    ]


def test_a_terminated_command_takes_its_job_along(tmp_path: Path) -> None:
    write_play(tmp_path, "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)")
    program = (
        "import signal; from pathlib import Path; from jobs.commands.local import run_child; "
        "from jobs.commands.steps import Steps; signal.signal(signal.SIGTERM, signal.default_int_handler); "
        "run_child('play', [], Path('log'), Steps())"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.DEVNULL)
    pid = _eventually(lambda: int((tmp_path / "pid").read_text()))
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) != 0
    _eventually(lambda: _is_gone(pid) or 1 / 0)


def test_doctor_never_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "AIRFLOW_ENVIRONMENT", tmp_path / "absent")
    monkeypatch.setattr(doctor, "HOME", tmp_path / "home")

    def explode() -> doctor.Finding:
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor, "_disk", explode)
    (tmp_path / "file").touch()
    checks = {check["name"]: check for check in doctor.diagnose(str(tmp_path / "file"), Runtime(), deep=False)}
    broken = {name for name, check in checks.items() if check["status"] == "broken"}
    assert broken == {"java", "airflow", "disk", "store", "registry"}
    assert all(check["remedy"] for check in checks.values() if check["status"] != "ok")
    assert checks["disk"]["found"] == "RuntimeError: boom"


def test_doctor_answers_as_json(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "AIRFLOW_ENVIRONMENT", home / "absent")
    assert cli.main(["doctor", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["healthy"] is False
    registry = next(check for check in answer["checks"] if check["name"] == "registry")
    assert registry["status"] == "absent"


def test_a_log_is_generated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(tmp_path / "raw"), "--rows", "500", "--days", "4", "--seed", "7", "--json"]
    assert cli.main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["num_interactions"], answer["start"], answer["end"]) == (500, "2026-01-04", "2026-01-05")
    assert len(list((tmp_path / "raw" / "interactions").iterdir())) == 4
    assert cli.main(["generate", str(tmp_path / "none"), "--rows", "0"]) == 2


def test_a_run_tells_what_the_gate_decided_and_what_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stages are not run: what they say is what a refusal of `ml.promote` says."""
    verdict = {
        "decision": "refused",
        "reason": "Refused: too few users.",
        "remedy": "Judge more users.",
        "version": "1",
    }
    done = {"status": "done"}
    monkeypatch.setattr(local, "run_child", lambda name, *_: done | (verdict if name == "ml.promote" else {}))
    argv = ["run", "--store", "s", "--raw", "r", "--start", "2026-01-01", "--end", "2026-01-02", "--promote"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "decision  refused",
        "reason    Refused: too few users.",
        "remedy    Judge more users.",
    ]
    assert cli.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {key: told[key] for key in ("decision", "reason", "remedy")} == {
        key: verdict[key] for key in list(verdict)[:3]
    }
    assert cli.main([*argv[:-1], "--json"]) == 0
    assert "decision" not in json.loads(capsys.readouterr().out)


def test_an_import_tells_the_next_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.csv").write_text("u,i,t,l\na,x,2026-01-31 20:00,train\nb,x,2026-02-01 01:00,test\n")
    (tmp_path / "items.csv").write_text("i,g\nx,Tea\n")
    columns = "columns: {user_id: u, item_id: i, event_time: t"
    mapping = f"dataset: d\ninteractions: {{files: [log.csv], {columns}}}}}\n"
    (tmp_path / "m.yaml").write_text(mapping)
    assert cli.main(["import", "mapped", str(tmp_path / "m.yaml"), str(tmp_path / "raw")]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    run = f"crane run --store STORE --raw {tmp_path}/raw --start 2026-02-01 --end 2026-02-02 --promote"
    assert told == f"next: crane encode {tmp_path}/raw or a section features in the mapping, then {run}"
    features = "features: {genre: {files: [items.csv], kind: categories, columns: {item_id: i, vector: g}}}\n"
    zoned = mapping.replace("t}}", "t, label: l}, zone: Asia/Tokyo}")
    (tmp_path / "m.yaml").write_text(zoned + features)
    assert cli.main(["import", "mapped", str(tmp_path / "m.yaml"), str(tmp_path / "second raw"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["next"]
    argv = shlex.split(told)[1:]
    parsed = command_line(cli._commands()).parse_args(argv)
    assert parsed.raw == str(tmp_path / "second raw") and parsed.promote
    assert (parsed.start, parsed.end) == ("2026-02-01T00:00:00+09:00", "2026-02-02T00:00:00+09:00")
    assert parsed.set == ["etl.split=label", "etl.time_zone=Asia/Tokyo"]


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "run",
        "runs",
        "recommend",
        "similar",
        "promote",
        "rollback",
        "ledger",
        "experiments",
        "doctor",
        "import",
        "generate",
    ],
)
def test_every_command_explains_itself_and_knows_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


def write_play(folder: Path, text: str) -> None:
    """A project whose only job is `jobs.play`."""
    (folder / "jobs").mkdir()
    (folder / "jobs" / "__init__.py").touch()
    (folder / "jobs" / "play.py").write_text(text)


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def _eventually(probe):
    deadline = time.monotonic() + 20
    while True:
        try:
            return probe()
        except (OSError, ValueError, ZeroDivisionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
