"""Removing what nothing needs: what stays, beside running jobs, and after kills at any moment."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from crane_core.release.registry import PRUNED_TAG
from crane_core.storage.claims import Claims
from jobs import prune
from jobs.stores import open_store
from tests.worlds.jobs import last_line
from tests.worlds.mlflow_tables import copy_tables
from tests.worlds.processes import JobProcess
from tests.worlds.retention import (
    CHAIN,
    assert_whole,
    crown,
    flags,
    main,
    name,
    register,
    the_registry,
    with_refit,
    write_raw,
)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_raw(tmp_path / "raw")
    return tmp_path / "raw"


@pytest.fixture
def store(tmp_path: Path) -> str:
    copy_tables(tmp_path / "store")
    return str(tmp_path / "store")


def removed(store: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    """Prune and return what was told."""
    capsys.readouterr()
    assert prune.main(["--store", store, "--keep-days", "7", *more]) == 0
    return last_line(capsys)


def size(store: str) -> int:
    """Bytes of the artifacts, the records and the reports."""
    return sum(
        path.stat().st_size
        for path in Path(store).rglob("*")
        if path.is_file() and path.relative_to(store).parts[0] in (*CHAIN, "runs", "reports", "claims")
    )


def test_thirty_days_with_a_prune_in_each(store: str, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes, champions = [], {}
    for day in range(30):
        assert main(flags(store, raw, day, "etl.base_run=previous")) == 0
        open_store(store).storage.write(f"reports/{name(day)}.html", b"page")
        number = register(store, name(day))
        if day in (2, 5, 9):
            crown(store, number)
            champions[number] = name(day)
        told = removed(store, capsys)
        assert set(told["stages"]) <= {*CHAIN, "runs", "reports"} and told["bytes"] == sum(told["stages"].values())
        sizes.append(size(store))
    kept = assert_whole(store)
    # Seven windows and the run that the oldest of them goes on from; each champion and the run that it goes on from.
    week = [name(day) for day in range(22, 30)]
    assert kept == sorted({*week, *champions.values(), name(1), name(4), name(8)})
    # Flat once the last champion's window is behind.
    assert max(sizes[17:]) - min(sizes[17:]) < 200
    registry = the_registry(store)
    marked = {version.run_id for version in registry.versions() if version.tags.get(PRUNED_TAG)}
    assert marked == {name(day) for day in range(30)} - set(kept)
    assert len(registry.versions()) == 30
    assert sorted(open_store(store).storage.names("reports")) == [f"{run}.html" for run in kept]


def test_without_champions_the_store_is_flat_from_the_eighth_day(
    store: str, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []
    for day in range(12):
        assert main(flags(store, raw, day)) == 0
        removed(store, capsys)
        sizes.append(size(store))
    # Seconds and peak memory in the manifests have now one digit more, now one less.
    assert sizes[6] > sizes[5] + 2000 and max(sizes[7:]) - min(sizes[6:]) < 200


def test_a_dry_run_says_what_would_go_and_touches_nothing(
    store: str, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in (0, 20):
        assert main(flags(store, raw, day)) == 0
    number = register(store, name(0))
    before = size(store)
    planned = removed(store, capsys, "--dry-run")
    assert (planned["status"], planned["runs"], planned["versions"]) == ("planned", [name(0)], [number])
    assert size(store) == before and assert_whole(store) == [name(0), name(20)]
    done = removed(store, capsys)
    assert {key: done[key] for key in ("runs", "bytes", "stages")} == {
        key: planned[key] for key in ("runs", "bytes", "stages")
    }
    assert before - size(store) == done["bytes"]


def test_a_run_is_kept_with_its_refit_run(store: str, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The refit run made the model that is served; its own base is the refit run of the run's base."""
    for day in range(4):
        with_refit(flags(store, raw, day, "etl.base_run=previous"))
    crown(store, register(store, name(1)))
    # Not even the registry says so any more: the ledger alone names the champion.
    the_registry(store).set_alias("champion", None)
    with_refit(flags(store, raw, 25))
    assert open_store(store).run(f"{name(1)}.refit")["config"]["etl"]["base_run"] == f"{name(0)}.refit"
    old = [name(2), f"{name(2)}.refit", name(3), f"{name(3)}.refit"]
    assert removed(store, capsys)["runs"] == old
    kept = [name(day) for day in (0, 1, 25)]
    assert assert_whole(store) == sorted([*kept, *(f"{run}.refit" for run in kept)])


@pytest.mark.parametrize("claimed", [name(0), f"{name(0)}.refit"])
def test_a_claim_on_a_run_or_its_refit_run_keeps_both(
    store: str, raw: Path, capsys: pytest.CaptureFixture[str], claimed: str
) -> None:
    for day in (0, 30):
        with_refit(flags(store, raw, day))
    claims = Claims(open_store(store).storage)
    claims.claim(claimed)
    assert removed(store, capsys)["runs"] == []
    claims.release()
    assert removed(store, capsys)["runs"] == [name(0), f"{name(0)}.refit"]


def test_only_a_number_of_champions_is_kept(store: str, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for day in range(4):
        assert main(flags(store, raw, day)) == 0
        crown(store, register(store, name(day)))
    assert main(flags(store, raw, 25)) == 0
    assert removed(store, capsys, "--set", "promote.keep_versions=2")["runs"] == [name(0), name(1)]
    the_registry(store).set_alias("pinned", "3")
    assert removed(store, capsys, "--set", "promote.keep_versions=1")["runs"] == []
    assert assert_whole(store) == [name(2), name(3), name(25)]


def test_a_window_of_the_future_makes_no_run_old(store: str, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(store, raw, 3)) == 0
    assert main([*flags(store, raw, 3, run="ahead"), "--set", "window.end=2099-01-01"]) == 0
    # All but the future run are old now, measured from today, and not from 2099.
    assert removed(store, capsys, "--keep-days", "100000")["runs"] == []


def test_what_no_record_names_goes_unless_a_job_claims_it(
    store: str, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in (0, 1):
        assert main(flags(store, raw, day)) == 0
    artifacts = open_store(store)
    lost = artifacts.artifact(name(0), CHAIN[0]).fingerprint
    for file in artifacts.storage.names(f"runs/{name(0)}"):
        artifacts.storage.delete(f"runs/{name(0)}/{file}")
    unfinished = Path(store) / CHAIN[0] / f".{lost}.{'0' * 32}"
    unfinished.mkdir()
    claims = Claims(artifacts.storage)
    claims.claim("another", lost)
    removed(store, capsys)
    assert artifacts.find(CHAIN[0], lost) is not None and unfinished.exists()
    claims.release()
    removed(store, capsys)
    assert artifacts.find(CHAIN[0], lost) is None and not unfinished.exists()
    assert assert_whole(store) == [name(1)]


def test_a_run_under_way_is_kept_between_its_jobs(store: str, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for day in (0, 30):
        assert main(flags(store, raw, day)) == 0
    claims = Claims(open_store(store).storage)
    claims.keep(name(0))
    assert removed(store, capsys)["runs"] == []
    claims.drop(name(0))
    assert removed(store, capsys)["runs"] == [name(0)]


def test_without_days_nothing_is_removed(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune.main(["--store", store]) == 0
    assert last_line(capsys)["status"] == "skipped"
    assert prune.main(["--store", store, "--keep-days", "0"]) == 2


@pytest.mark.drill
def test_kills_at_random_moments_lose_nothing(
    store: str, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(4)
    killed = 0
    for attempt in range(20):
        first = 40 * attempt
        for day in range(first, first + 4):
            assert main(flags(store, raw, day)) == 0
        assert main(flags(store, raw, first + 30)) == 0
        job = JobProcess("jobs.prune", ["--store", store, "--keep-days", "7"], tmp_path / f"job-{attempt}")
        deadline = time.monotonic() + 60
        # The removal itself is short; before it there is the start of MLflow.
        while job.running and not open_store(store).storage.names("removal") and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.08))
        if job.running:
            os.kill(job.process.pid, signal.SIGKILL)
            killed += 1
        job.process.join()
        assert name(first + 30) in assert_whole(store)
        # What it held would expire by itself in a minute.
        for folder in ("removal", "lease"):
            for term in open_store(store).storage.names(folder):
                open_store(store).storage.delete(f"{folder}/{term}")
    assert killed >= 10
    removed(store, capsys)
    assert assert_whole(store) == [name(40 * 19 + 30)]
    hidden = [path for path in Path(store).rglob(".*") if ".scratch" not in path.parts and path.is_dir()]
    assert hidden == []


@pytest.mark.drill
def test_beside_running_jobs_nothing_they_need_is_lost(
    store: str, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of old days start again and again, whose artifacts nobody else needs, while everything old is removed."""
    assert main(flags(store, raw, 60)) == 0
    for attempt in range(20):
        # The second run finds what the first one has left, or finds it gone.
        assert main(flags(store, raw, attempt % 3, run=f"left-{attempt}")) == 0
        argv = flags(store, raw, attempt % 3, run=f"again-{attempt}")
        job = JobProcess("tests.worlds.retention", argv, tmp_path / f"job-{attempt}")
        while job.running:
            removed(store, capsys)
        assert job.wait() == 0, job.said()
        assert_whole(store)


def test_a_bucket_is_pruned_alike(s3_uri: str, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_tables(tmp_path / "registry")
    registry = ("--set", f"runtime.registry=sqlite:///{tmp_path / 'registry' / 'mlflow.db'}")
    for day in (0, 1, 20):
        assert main(flags(s3_uri, raw, day, "etl.base_run=previous")) == 0
    told = removed(s3_uri, capsys, *registry)
    assert told["runs"] == [name(0)] and set(told["stages"]) == {*CHAIN, "runs"}
    # Day 20 goes on from day 1.
    assert assert_whole(s3_uri) == [name(1), name(20)]
    storage = open_store(s3_uri).storage
    assert {stage: len(storage.names(stage)) for stage in CHAIN} == dict.fromkeys(CHAIN, 2)
    assert storage.names("claims") == []
    assert main(flags(s3_uri, raw, 0)) == 0
    assert assert_whole(s3_uri) == [name(0), name(1), name(20)]
