"""Waiting for data under a real scheduler: late pieces, a day that never comes, and runs that a delivery starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.worlds.services import until
from tests.worlds.stand_ins import Stage, stand_ins

DAY = "2026-03-01"
LATE_SECONDS = 90
PIECES = 3


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """Runs are started by the asset `crane/delivery`."""
    with stand_ins(settings={"CRANE_SCHEDULE": "delivery"}) as made:
        made.airflow.unpause("crane_retrain", "crane_promote")
        yield made


def conf(raw: Path, deadline: datetime, run: str) -> dict[str, object]:
    """Parameters of a run of `DAY` that waits until a deadline."""
    end = datetime.fromisoformat(DAY).replace(tzinfo=UTC) + timedelta(days=1)
    hours = (deadline - end).total_seconds() / 3600
    settings = {"raw": raw, "delivery": "quiet", "delivery_quiet_minutes": 0.5, "delivery_deadline_hours": hours}
    return {
        "run": run,
        "window_end": end.isoformat(),
        "overrides": [f"runtime.{name}={value}" for name, value in settings.items()],
    }


def test_a_day_that_comes_late_and_in_pieces_runs_once_and_whole(stage: Stage, tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "interactions" / f"dt={DAY}"
    wish = conf(tmp_path / "raw", datetime.now(UTC) + timedelta(hours=1), "late")
    run_id = stage.airflow.trigger("crane_retrain", wish)
    stage.airflow.wait_for_task("crane_retrain", run_id, "deliveries", ["up_for_reschedule"])
    time.sleep(LATE_SECONDS)
    folder.mkdir(parents=True)
    for piece in range(PIECES):
        (folder / f"part-{piece}.parquet").write_bytes(b"piece")
        time.sleep(20)
    last = time.time() - 20
    assert stage.airflow.wait("crane_retrain", run_id) == "success"
    (interactions,) = (call for call in stage.calls("etl.interactions") if call["run"] == "late")
    assert interactions["begun"] > last + 30
    (task,) = stage.airflow.tasks("crane_retrain", run_id)["deliveries"]
    # Waiting is no failed try.
    assert (task["state"], task["try_number"]) == ("success", 1)
    assert f"dt={DAY} (no file)" in stage.airflow.log("crane_retrain", run_id, "deliveries")


def test_a_day_that_never_comes_fails_at_its_deadline(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "raw" / "interactions").mkdir(parents=True)
    deadline = datetime.now(UTC) + timedelta(seconds=60)
    run_id, state = stage.airflow.do("crane_retrain", conf(tmp_path / "raw", deadline, "never"))
    assert state == "failed" and datetime.now(UTC) > deadline
    heard = until("the notice", lambda: [line for line in stage.heard() if line.startswith(run_id)])
    assert f"dt={DAY} (no file)" in heard[0]
    (task,) = stage.airflow.tasks("crane_retrain", run_id)["deliveries"]
    assert (task["state"], task["try_number"]) == ("failed", 1)
    assert {call["job"] for call in stage.calls() if call["run"] == "never"} == {"plan", "deliveries", "tidy", "prune"}


def test_an_announced_day_starts_its_run_and_its_candidate_is_judged(stage: Stage) -> None:
    airflow = stage.airflow
    assert airflow.ask("POST", "/variables", {"key": "crane_config", "value": str(settings(stage))})[0] == 201
    before = {run["dag_run_id"] for run in airflow.runs("crane_retrain")}
    days = ("2026-03-05", "2026-03-06", "2026-03-07")
    for day in days:
        stage.announce("crane/delivery", partition_key=day, extra={})

    def ended() -> list[dict] | None:
        runs = [run for run in airflow.runs("crane_retrain") if run["dag_run_id"] not in before]
        return runs if len(runs) == len(days) and {run["state"] for run in runs} <= {"success", "failed"} else None

    for run in until("runs of the announced days", ended, every=3):
        assert run["state"] == "success", airflow.why("crane_retrain", run["dag_run_id"])
    windows = [
        [word for word in call["argv"] if word.startswith("window.")] for call in stage.calls("etl.interactions")[-3:]
    ]
    wanted = [
        [f"window.start={day}T00:00:00+00:00", f"window.end={day[:-1]}{int(day[-1]) + 1}T00:00:00+00:00"]
        for day in days
    ]
    assert sorted(windows) == wanted
    newest = stage.calls("etl.interactions")[-1]["run"]
    until("judgement of the newest", lambda: newest in [call["run"] for call in stage.calls("ml.promote")])


def settings(stage: Stage) -> Path:
    """Write a configuration file whose runs do not wait."""
    path = stage.folder / "config.yaml"
    path.write_text("runtime: {delivery: none}\n")
    return path
