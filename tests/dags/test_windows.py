"""The window, the run id and the flags of a run."""

from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace

import pytest
from windows import (
    MAX_WINDOWS,
    Backfill,
    backfill_flags,
    backfill_windows,
    crane_run_id,
    missed_interval,
    newest_candidate,
    promote_flags,
    resolve_window,
    retrain_flags,
    rollback_flags,
)

DAY = timedelta(days=1)
AFTER = datetime(2026, 3, 2, 10, 30, tzinfo=UTC)
INTERVAL = (datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 2, tzinfo=UTC))


@pytest.mark.parametrize("run_type", ["scheduled", "backfill"])
def test_runs_of_the_timetable_cover_their_interval(run_type):
    assert resolve_window(run_type, AFTER, INTERVAL) == INTERVAL


@pytest.mark.parametrize("run_type", ["scheduled", "backfill"])
def test_runs_of_the_timetable_take_no_bounds(run_type):
    with pytest.raises(ValueError, match="leave both bounds empty"):
        resolve_window(run_type, AFTER, INTERVAL, end="2026-01-01")


@pytest.mark.parametrize("run_type", ["scheduled", "backfill"])
def test_runs_of_the_timetable_need_an_interval(run_type):
    with pytest.raises(ValueError, match="without a data interval"):
        resolve_window(run_type, AFTER)


def test_a_manual_run_covers_the_bounds_given():
    window = resolve_window("manual", AFTER, INTERVAL, "1998-04-01", "1998-04-23T00:00:00+00:00")
    assert window == (datetime(1998, 4, 1, tzinfo=UTC), datetime(1998, 4, 23, tzinfo=UTC))


def test_a_missing_start_is_a_day_before_the_end():
    assert resolve_window("manual", AFTER, INTERVAL, end="1998-04-23") == (
        datetime(1998, 4, 22, tzinfo=UTC),
        datetime(1998, 4, 23, tzinfo=UTC),
    )


def test_a_start_alone_is_refused():
    with pytest.raises(ValueError, match="needs a window end"):
        resolve_window("manual", AFTER, INTERVAL, start="1998-04-23")


def test_a_manual_run_without_bounds_covers_its_interval():
    assert resolve_window("manual", AFTER, INTERVAL) == INTERVAL


@pytest.mark.parametrize("interval", [None, (AFTER, AFTER)])
@pytest.mark.parametrize("run_type", ["manual", "asset_triggered"])
def test_without_an_interval_the_last_whole_day_counts(run_type, interval):
    assert resolve_window(run_type, AFTER, interval) == INTERVAL


def test_midnight_itself_ends_the_day_before():
    assert resolve_window("asset_triggered", INTERVAL[1]) == INTERVAL


def test_bounds_in_another_zone_become_utc():
    eastern = timezone(timedelta(hours=-5))
    first, last = resolve_window("manual", AFTER.astimezone(eastern), None, end="1998-04-23T00:00:00-05:00")
    assert last == datetime(1998, 4, 23, 5, tzinfo=UTC) and last.tzinfo is UTC
    assert last - first == DAY
    # 23:00 on the first of March in New York is the second in UTC.
    late = datetime(2026, 3, 1, 23, tzinfo=eastern)
    assert resolve_window("manual", late) == INTERVAL


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="does not lie before"):
        resolve_window("manual", AFTER, None, "1998-04-23", "1998-04-23")


def test_a_date_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="month"):
        resolve_window("manual", AFTER, None, end="1998-13-40T00:00:00Z")


def test_run_ids_are_file_names():
    assert crane_run_id("scheduled__2026-03-01T00:00:00+00:00") == "scheduled__2026-03-01T00-00-00-00-00"
    assert crane_run_id("../../etc/passwd") == "etc-passwd"
    assert len(crane_run_id("a" * 500)) == 122, "room for the end of the id of a refit run"


def test_flags():
    arguments = {"store": "s3://b/p", "run": "r", "window": INTERVAL, "overrides": ["train.seed=1"]}
    assert retrain_flags(**arguments, config="demo", run_type="scheduled") == [
        *("--store", "s3://b/p", "--run", "r", "--config", "demo", "--set", "train.seed=1"),
        *("--set", "window.start=2026-03-01T00:00:00+00:00", "--set", "window.end=2026-03-02T00:00:00+00:00"),
    ]
    assert "--config" not in retrain_flags(**arguments, config=None, run_type="manual")


def test_a_person_waits_for_no_delivery_unless_asked():
    arguments = {"store": "s", "run": "r", "window": INTERVAL, "config": None}
    plain = retrain_flags(**arguments, overrides=[], run_type="manual")
    asked = retrain_flags(**arguments, overrides=["runtime.delivery=marker"], run_type="manual")
    assert "runtime.delivery=none" in plain
    # The last one wins.
    assert asked.index("runtime.delivery=none") < asked.index("runtime.delivery=marker")
    for run_type in ("scheduled", "backfill", "asset_triggered"):
        assert "runtime.delivery=none" not in retrain_flags(**arguments, overrides=[], run_type=run_type)


def test_a_partition_key_names_the_day():
    assert resolve_window("asset_triggered", AFTER, partition_key="2024-02-29") == (
        datetime(2024, 2, 29, tzinfo=UTC),
        datetime(2024, 3, 1, tzinfo=UTC),
    )
    # Not what a run without an interval would cover, and not what the interval says.
    assert resolve_window("scheduled", AFTER, INTERVAL, partition_key="2026-02-01")[0].day == 1
    with pytest.raises(ValueError, match="leave both bounds empty"):
        resolve_window("asset_triggered", AFTER, end="2026-03-02", partition_key="2026-03-01")
    with pytest.raises(ValueError, match="isoformat"):
        resolve_window("asset_triggered", AFTER, partition_key="yesterday")


def test_only_a_backfill_says_so():
    arguments = {"store": "s", "run": "r", "window": INTERVAL, "overrides": ["runtime.backfill=false"], "config": None}
    for run_type in ("scheduled", "manual", "asset_triggered"):
        assert "runtime.backfill=true" not in retrain_flags(**arguments, run_type=run_type)
    # Last, so that no override can take it back.
    assert retrain_flags(**arguments, run_type="backfill")[-2:] == ["--set", "runtime.backfill=true"]


def test_judging_takes_only_the_runtime():
    flags = promote_flags(store="s", run="r", overrides=["train.seed=1", "runtime.device=cuda"])
    assert flags == ["--store", "s", "--run", "r", "--set", "runtime.device=cuda"]


def test_a_backfill_covers_whole_days_both_ends_included():
    windows = backfill_windows("2024-02-28", "2024-03-01")
    assert [start.isoformat() for start, _ in windows] == [
        f"2024-{day}T00:00:00+00:00" for day in ("02-28", "02-29", "03-01")
    ]
    assert all(end - start == DAY for start, end in windows)
    assert len(backfill_windows("2026-03-01", "2026-03-01")) == 1


def test_backfills_over_nothing_or_too_much_are_refused():
    with pytest.raises(ValueError, match="first day 2026-03-02 lies after the last day 2026-03-01"):
        backfill_windows("2026-03-02", "2026-03-01")
    assert len(backfill_windows("2026-01-01", "2026-04-10")) == MAX_WINDOWS
    with pytest.raises(ValueError, match=f"are 101 days, at most {MAX_WINDOWS}"):
        backfill_windows("2026-01-01", "2026-04-11")


def test_backfill_flags():
    arguments = {"store": "s", "overrides": ["runtime.backfill=false"]}
    days, stages = [INTERVAL], ["etl.features"]
    window = "2026-03-01T00:00:00+00:00/2026-03-02T00:00:00+00:00"
    assert backfill_flags(Backfill(days, stages, train=True, dry_run=True), **arguments, config="demo") == [
        *("--store", "s", "--config", "demo", "--set", "runtime.backfill=false", "--set", "runtime.backfill=true"),
        *("--windows", window, "--stages", "etl.features", "--train", "--dry-run"),
    ]
    plain = backfill_flags(Backfill(days, stages, train=False, dry_run=False), **arguments, config=None)
    assert {"--config", "--train", "--dry-run"}.isdisjoint(plain)


def test_rollback_flags():
    flags = rollback_flags(store="s", to="previous", request="r", overrides=["train.seed=1", "runtime.device=cuda"])
    assert flags == ["--store", "s", "--set", "runtime.device=cuda", "--to", "previous", "--request", "r"]


def event(hour, run, run_type="scheduled", source="scheduled__x"):
    extra = {"run": run, "run_type": run_type}
    return SimpleNamespace(timestamp=AFTER + timedelta(hours=hour), source_run_id=source, extra=extra)


def test_the_newest_candidate_counts():
    assert newest_candidate([event(1, "a"), event(3, "c"), event(2, "b")])["run"] == "c"


def test_backfills_are_ignored():
    told = event(5, "told", run_type="backfill")
    named = event(6, "named", source="backfill__2026-01-01")
    assert newest_candidate([event(1, "a"), told, named])["run"] == "a"
    assert newest_candidate([told, named]) is None


def test_candidates_of_another_store_do_not_hide_those_of_this_one():
    here, there = event(1, "here"), event(2, "there")
    here.extra["store"], there.extra["store"] = "/a", "/b"
    assert newest_candidate([here, there], store="/a")["run"] == "here"
    assert newest_candidate([here, there])["run"] == "there"
    assert newest_candidate([here, there], store="/c") is None


@pytest.mark.parametrize(
    ("previous_end", "missed"),
    [
        (None, ""),
        (INTERVAL[0], ""),
        (INTERVAL[1], ""),
        (INTERVAL[0] - 2 * DAY, "2026-02-27 00:00 to 2026-03-01 00:00 UTC"),
        (INTERVAL[0] - timedelta(minutes=4), "2026-02-28 23:56 to 2026-03-01 00:00 UTC"),
    ],
)
def test_time_without_a_run_is_named(previous_end, missed):
    assert missed_interval(previous_end, INTERVAL[0]) == missed


def test_foreign_events_are_ignored():
    foreign = SimpleNamespace(timestamp=AFTER, source_run_id=None, extra={})
    assert newest_candidate([foreign]) is None
    assert newest_candidate([foreign, event(-1, "a")])["run"] == "a"
