"""The entry points of all jobs: flags, the last line on stdout, exit codes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crane_core import errors
from crane_core.errors import EXIT_CONFIG, EXIT_OK, EXIT_UNEXPECTED, CraneError
from jobs.entry_points import run_job
from jobs.logs import redacted, shown
from jobs.runner import Job, Result, run_stage
from jobs.stores import open_store
from tests.worlds.jobs import flags, last_line, write_rows

SECRET = 'planted secret "quoted"'
UNEXPECTED = (ZeroDivisionError, KeyError, OSError, ValueError, RecursionError, MemoryError)
KINDS = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, CraneError)]


@given(
    kind=st.sampled_from([*KINDS, *UNEXPECTED]),
    found=st.sampled_from(["", f" {SECRET}", "\nRemedy: s3://user:planted@host/"]).flatmap(
        lambda end: st.text(max_size=50).map(lambda text: text + end)
    ),
    remedy=st.text(max_size=50),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
def test_every_exception_leaves_one_json_line_last(
    kind, found: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_SECRET", SECRET)
    expected = issubclass(kind, CraneError)
    error = kind(found, remedy) if expected else kind(found)

    def fail(arguments, config, store):
        print("noise")
        raise error

    code = run_job("ml.register", fail, flags(tmp_path))
    output = capsys.readouterr()
    told = json.loads(output.out.splitlines()[-1])
    assert list(told) == ["stage", "error", "found", "remedy"]
    assert "planted" not in output.out + output.err
    assert told["stage"] == "ml.register"
    if expected:
        assert code == kind.exit_code
        assert told == {"stage": "ml.register", **shown(error)}
    else:
        assert (code, told["error"]) == (EXIT_UNEXPECTED, kind.__name__)
        assert told["found"] == redacted(str(error).strip() or repr(error))
        assert "traceback" in told["remedy"] and "stderr" in told["remedy"] and "Traceback" in output.err
    lines = [line for line in output.err.split("\n") if " ERROR jobs." in line]
    assert len(lines) == 1 and f"failed stage=ml.register error={told['error']} message=" in lines[0]


@pytest.mark.parametrize(
    ("more", "code", "expected"),
    [
        (["--set", "etl.k_core=0"], EXIT_CONFIG, "etl.k_core"),
        (["--part", "7"], EXIT_CONFIG, "Stage etl.interactions has no part '7'"),
        (["--config", "absent.yaml"], EXIT_CONFIG, "cannot be read"),
        (["--set", "knn.k=3"], EXIT_CONFIG, "was started with another configuration: knn.k was 10, now 3"),
    ],
)
def test_wrong_flags_exit_with_2(
    tmp_path: Path, more: list[str], code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage("etl.interactions", write_rows, argv=flags(tmp_path))
    assert run_stage("etl.interactions", write_rows, argv=flags(tmp_path, *more)) == code
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [([], "--store, --run"), (["--store", "s", "--run", "r", "--prat", "0"], "--prat 0"), (["--set"], "--set")],
    ids=str,
)
def test_missing_flags_exit_with_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("etl.interactions", write_rows, argv=argv) == EXIT_CONFIG
    told = last_line(capsys)
    assert (told["stage"], told["error"]) == ("etl.interactions", "ConfigError")
    assert said in told["found"] and "python -m jobs.etl.interactions" in told["remedy"]


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_stage("etl.interactions", write_rows, argv=["--help"])
    assert caught.value.code == EXIT_OK and "--store" in capsys.readouterr().out


def test_jobs_without_artifact_record_what_they_return(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(arguments, config, store):
        return {"status": "done", "forced": arguments.force, "k": config.knn.k}

    argv = flags(tmp_path, "--force", "--set", "knn.k=3")
    assert run_job("ml.register", work, argv, lambda parser: parser.add_argument("--force", action="store_true")) == 0
    told = last_line(capsys)
    usage = {name: told[name] for name in ("seconds", "peak_bytes")}
    assert usage["seconds"] >= 0 and usage["peak_bytes"] > 0
    assert told == {
        **usage,
        "stage": "ml.register",
        "part": "",
        "run": "r",
        "status": "done",
        "forced": True,
        "k": 3,
    }
    entry = open_store(str(tmp_path)).entry("r", "ml.register")
    assert entry == {**usage, "status": "done", "forced": True, "k": 3}
    again = ["--store", str(tmp_path), "--run", "r", "--force"]
    assert run_job("ml.register", work, again, lambda parser: parser.add_argument("--force", action="store_true")) == 0
    assert last_line(capsys)["k"] == 3


def test_results_go_to_stdout_and_logs_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(job: Job) -> Result:
        logging.getLogger("jobs.test").info("step rows=%d", 3)
        return write_rows(job)

    run_stage("etl.interactions", work, argv=flags(tmp_path))
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 1 and json.loads(output.out)
    assert "INFO jobs.test step rows=3" in output.err
