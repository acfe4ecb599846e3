"""Properties of the daily ETL: the content does not depend on how days are delivered and run."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from crane_core.config_file import load_config
from crane_core.errors import EXIT_ARTIFACT, EXIT_CONFIG, EXIT_DATA, EXIT_OK
from crane_core.raw.generator import DIRT, GeneratorSettings, generate, make_world
from crane_core.raw.importers import import_movielens
from crane_core.schema import INTERACTIONS
from crane_core.stages import STAGES
from crane_core.storage.artifacts import Artifact
from jobs.commands import paths
from jobs.commands.demo import wheel
from jobs.commands.steps import Steps
from jobs.etl import features, interactions, profiles
from jobs.etl.stages import interactions as log_stage
from jobs.stores import open_store
from tests.worlds.raw_data import at, write_day, write_items, write_log, write_vectors

pytestmark = pytest.mark.spark

JOBS = {"interactions": interactions, "features": features, "profiles": profiles}
START = date(2026, 1, 1)
NUM_DAYS = 20
GUARDED = {
    "etl__k_core": 6,
    "etl__repeats": "sum",
    "etl__max_interactions": 16,
    "etl__max_events_per_day": 6,
    "etl__drift_min_rows": 100,
}
"""All checks that look at several rows at once are on."""


def etl(store: Path, raw: Path, run: str, start: date, end: date, stages: Iterable[str] = JOBS, **settings: Any) -> int:
    """Run stages of one window in this process, and return the first exit code that is not 0."""
    chosen = {
        "window.start": start,
        "window.end": end,
        "runtime.raw": raw,
        "etl.validation_days": 2,
        "etl.test_days": 2,
        "features.standardise": "zscore",
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    flags = [flag for key, value in chosen.items() for flag in ("--set", f"{key}={value}")]
    for stage in stages:
        code = JOBS[stage].main(["--store", str(store), "--run", run, *flags])
        if code != EXIT_OK:
            return code
    return EXIT_OK


def artifact(store: Path, run: str, stage: str = "interactions") -> Artifact:
    return open_store(str(store)).artifact(run, f"etl.{stage}")


def contents(store: Path, run: str, stages: Iterable[str] = JOBS) -> list[str]:
    return [artifact(store, run, stage).manifest["content"] for stage in stages]


def ids(found: Artifact, kind: str) -> list[str]:
    table = pq.read_table(found.path / f"{kind}s").sort_by(f"{kind}_idx")
    assert table[f"{kind}_idx"].to_pylist() == list(range(table.num_rows))
    return table[f"{kind}_id"].to_pylist()


def by_name(found: Artifact) -> set[tuple[Any, ...]]:
    """The interactions under their external ids, which must not depend on the row numbers."""
    rows = pq.read_table(found.path / "interactions")
    users, items = (np.array(ids(found, kind), dtype=object) for kind in ("user", "item"))
    columns = [users[rows["user_idx"].to_numpy()], items[rows["item_idx"].to_numpy()]]
    columns += [rows[name].to_pylist() for name in ("event_time", "weight", "split")]
    return set(zip(*columns, strict=True))


@pytest.fixture(scope="module")
def movielens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MovieLens 100K in the raw layout."""
    raw = tmp_path_factory.mktemp("movielens") / "raw"
    import_movielens(wheel(paths.HOME / "downloads", Steps()), raw)
    return raw


@pytest.fixture(scope="module")
def punctual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated log in which everything arrives on its day; repeats and duplicates are in it."""
    raw = tmp_path_factory.mktemp("punctual") / "raw"
    plan = GeneratorSettings(
        4000, 150, 60, NUM_DAYS, START, 6, {"text": 4}, late_share=0, dirt_share=0, missing_share=0.1
    )
    generate(plan, raw)
    path = next((raw / "interactions" / "dt=2026-01-05").iterdir())
    table = pq.read_table(path, partitioning=None)
    doubled = table.slice(0, 20).set_column(3, "weight", pa.array([2.0] * 20, pa.float32()))
    pq.write_table(pa.concat_tables([table, table.slice(0, 10), doubled]), path)
    return raw


@pytest.fixture(scope="module")
def reference(spark: SparkSession, punctual: Path) -> Path:
    store = punctual.parent / "store"
    assert etl(store, punctual, "r", *window(3), **GUARDED) == EXIT_OK
    return store


def window(days: int, end: int = NUM_DAYS) -> tuple[date, date]:
    return START + timedelta(days=end - days), START + timedelta(days=end)


def deliver_late(source: Path, target: Path, share: float, seed: int) -> None:
    """Copy a log with some events arriving up to three days late, shuffled, a few files a day."""
    rng = np.random.default_rng(seed)
    days: dict[date, list[pa.Table]] = {}
    for folder in sorted((source / "interactions").iterdir()):
        table = pq.read_table(folder, partitioning=None)
        day = date.fromisoformat(folder.name.removeprefix("dt="))
        delay = np.where(rng.random(table.num_rows) < share, rng.integers(1, 4, table.num_rows), 0)
        delay = np.minimum(delay, (START + timedelta(days=NUM_DAYS - 1) - day).days)
        for days_late in np.unique(delay).tolist():
            rows = table.filter(pa.array(delay == days_late))
            days.setdefault(day + timedelta(days=days_late), []).append(rows)
    for day, tables in days.items():
        table = pa.concat_tables(tables)
        table = table.take(pa.array(rng.permutation(table.num_rows)))
        folder = target / "interactions" / f"dt={day}"
        folder.mkdir(parents=True)
        half = table.num_rows // 2
        pq.write_table(table.slice(0, half), folder / "b.parquet")
        pq.write_table(table.slice(half), folder / "a.parquet")
    for name in ("items", "features"):
        (target / name).symlink_to(source / name)


def test_late_events_and_other_windows_give_the_same_content(reference: Path, punctual: Path, tmp_path: Path) -> None:
    """5 % of the events are late. The window is cut into two runs, the later one first.

    The earlier one runs a second time on punctual events, without the guards: it shows that the late ones count.
    """
    late, store = tmp_path / "late", tmp_path / "store"
    deliver_late(punctual, late, 0.05, seed=1)
    expected = contents(reference, "r")
    assert etl(store, late, "second", *window(1), **GUARDED) == EXIT_OK
    assert contents(store, "second") == expected
    assert etl(store, late, "first", *window(2, NUM_DAYS - 1), ("interactions",)) == EXIT_OK
    other = tmp_path / "other"
    assert etl(other, punctual, "first", *window(1, NUM_DAYS - 1), ("interactions",)) == EXIT_OK
    assert contents(store, "first", ("interactions",)) != contents(other, "first", ("interactions",))
    assert contents(store, "second") == expected


def plant(punctual: Path, raw: Path) -> Path:
    """Copy the log and add many rows behind the cutoff of training, some behind the end. They must change nothing."""
    deliver_late(punctual, raw, 0, seed=2)
    generator = random.Random(3)
    known = [f"u{n}" for n in range(150)]
    rows: list[tuple[Any, ...]] = []
    for minute in range(600):
        user = generator.choice([*known, "p-user"])
        item = generator.choice([f"i{n}" for n in range(60)] + ["p-item"])
        rows.append((user, item, at("2026-01-18 00:00") + timedelta(minutes=minute), 7.0, None))
    rows += [("u1", f"i{n}", at("2026-01-20 23:00"), 50.0, None) for n in range(60)]
    rows += [("u2", f"i{n}", at("2026-01-21 00:00"), 50.0, None) for n in range(60)]
    write_day(raw, "2026-01-20", rows, name="planted.parquet")
    write_log(raw, [("u3", "i1", "2026-01-21 00:00")])
    return raw


def training(store: Path, run: str) -> dict[str, Any]:
    log = artifact(store, run)
    rows = pq.read_table(log.path / "interactions").to_pylist()
    return {
        "users": pq.read_table(log.path / "users").sort_by("user_idx").to_pylist(),
        "items": pq.read_table(log.path / "items").sort_by("item_idx").to_pylist(),
        "train": sorted(tuple(row.values()) for row in rows if row["split"] == 0),
    }


def derived(store: Path, run: str) -> dict[str, Any]:
    matrices, sums = (artifact(store, run, stage) for stage in ("features", "profiles"))
    return {
        "standardisation": matrices.file("text/standardisation.npz").read_bytes(),
        "features": matrices.file("text/matrix.npy").read_bytes(),
        "profiles": sums.file("text.npy").read_bytes(),
    }


@pytest.fixture(scope="module")
def planted(punctual: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(punctual, tmp_path_factory.mktemp("planted") / "raw")


def test_rows_behind_the_cutoff_change_nothing_before_it(reference: Path, planted: Path, tmp_path: Path) -> None:
    """Ids, training rows, k-core, caps, sums of repeats, standardisation and profiles."""
    store = tmp_path / "store"
    assert etl(store, planted, "planted", *window(1), **GUARDED) == EXIT_OK
    assert training(store, "planted") == training(reference, "r")
    assert derived(store, "planted") == derived(reference, "r")
    facts = artifact(store, "planted").facts
    assert facts["quarantine"]["after_cutoff"] == 60
    assert min(facts["quarantine"][reason] for reason in ("bot", "over_daily_cap", "k_core", "repeat")) > 0


@pytest.mark.parametrize(
    ("guard", "without"),
    [
        ("find_core", lambda original: lambda train, k: original(train.sparkSession.table("everything"), k)),
        ("find_bots", lambda original: lambda train, most: original(train.sparkSession.table("everything"), most)),
    ],
)
def test_without_the_guard_they_do(
    reference: Path,
    planted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    guard: str,
    without: Callable[..., Any],
) -> None:
    """With k-core or the cap over all rows instead of the training rows, the test above would fail."""
    split = log_stage.assign_split

    def remember(rows: Any, config: Any) -> Any:
        found = split(rows, config)
        found.createOrReplaceTempView("everything")
        return found

    monkeypatch.setattr(log_stage, "assign_split", remember)
    monkeypatch.setattr(log_stage, guard, without(getattr(log_stage, guard)))
    assert etl(tmp_path / "store", planted, "leaks", *window(1), ("interactions",), **GUARDED) == EXIT_OK
    assert training(tmp_path / "store", "leaks") != training(reference, "r")


def test_ids_go_on_from_a_named_run(spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers stay, new ids are appended, and an id that is gone leaves a tombstone until it comes back."""
    raw, store = tmp_path / "raw", tmp_path / "store"
    early = [("bob", "x", "2026-01-02"), ("ann", "y", "2026-01-03"), ("bob", "w", "2026-01-09")]
    write_log(raw, early)
    write_items(raw, [("x", "X"), ("z", "Z"), ("y", "Y")])
    day = ("interactions",)
    history = {"etl__history_days": 8}
    assert etl(store, raw, "one", date(2026, 1, 9), date(2026, 1, 10), day, **history) == EXIT_OK
    assert ids(artifact(store, "one"), "item") == ["x", "y", "z"]

    later = [("cat", "z", "2026-01-08"), ("aaa", "a", "2026-01-09"), ("cat", "y", "2026-01-13")]
    write_log(raw / "more", later)
    for folder in sorted((raw / "more" / "interactions").iterdir()):
        target = raw / "interactions" / folder.name
        target.mkdir(exist_ok=True)
        (folder / "part-0.parquet").rename(target / "more.parquet")
    write_items(raw, [("z", "Z"), ("b", "B")])
    span = (date(2026, 1, 13), date(2026, 1, 14))
    assert etl(store, raw, "two", *span, day, etl__base_run="one", **history) == EXIT_OK
    found = artifact(store, "two")
    states = {row["item_id"]: (row["state"], row["title"]) for row in pq.read_table(found.path / "items").to_pylist()}
    assert ids(found, "item") == ["x", "y", "z", "a", "w", "b"]
    assert states == {
        "x": ("tombstone", "X"),
        "y": ("cold", "Y"),
        "z": ("trained", "Z"),
        "w": ("trained", None),
        "a": ("trained", None),
        "b": ("cold", "B"),
    }
    assert ids(found, "user") == ["bob", "ann", "cat", "aaa"]
    assert found.facts["num_tombstones"] == {"users": 1, "items": 1}
    assert found.facts["base"] == artifact(store, "one").fingerprint
    assert ("cat", "y") in {row[:2] for row in by_name(found)}

    capsys.readouterr()
    assert etl(store, raw, "none", *span, day, etl__base_run="absent", **history) == EXIT_ARTIFACT
    assert "Run 'absent' has no artifact of etl.interactions" in capsys.readouterr().err
    back = (date(2026, 1, 8), date(2026, 1, 9))
    assert etl(store, raw, "past", *back, day, etl__base_run="one", **history) == EXIT_CONFIG
    assert "ids can only be taken from an earlier window" in capsys.readouterr().err


def test_profiles_go_on_from_a_named_run(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Yesterday's sums with today's changes equal the full recomputation, to the bit."""
    raw, store, whole = tmp_path / "raw", tmp_path / "store", tmp_path / "whole"
    plan = GeneratorSettings(1200, 60, 30, NUM_DAYS, START, 4, {"text": 5, "image": 3}, missing_share=0.2)
    generate(plan, raw)
    settings = {"features__standardise": "l2", "etl__history_days": 12}
    assert etl(store, raw, "one", *window(1, NUM_DAYS - 1), **settings) == EXIT_OK
    table = pq.read_table(raw / "features" / "text")
    vectors = [[9.0] * 5 if row == 7 else vector for row, vector in enumerate(table["vector"].to_pylist())]
    rows = list(zip(table["item_id"].to_pylist(), vectors, strict=True))[:-1]
    write_vectors(raw, "text", rows)
    settings["etl__base_run"] = "one"
    for name in ("interactions", "features"):
        assert etl(store, raw, "two", *window(1), (name,), **settings) == EXIT_OK
    shutil.copytree(store, whole)
    (whole / "runs" / "one" / "etl.profiles.json").unlink()
    capsys.readouterr()
    assert etl(store, raw, "two", *window(1), ("profiles",), **settings) == EXIT_OK
    assert etl(whole, raw, "two", *window(1), ("profiles",), **settings) == EXIT_OK
    told = re.findall(r"base run=one stale_users=(\d+) changed_items=(\d+)", capsys.readouterr().err)
    assert len(told) == 1 and told[0][1] == "2" and 0 < int(told[0][0]) < 55
    assert contents(store, "two") == contents(whole, "two")
    text = np.load(artifact(store, "two", "profiles").file("text.npy"))
    counts = np.load(artifact(store, "two", "profiles").file("text.counts.npy"))
    assert (text[counts == 0] == 0).all() and (text[counts > 0] != 0).any(axis=1).all()


def test_another_base_is_another_fingerprint(spark: SparkSession, tmp_path: Path) -> None:
    """Even under the same run id, since the content of the base enters the fingerprint."""
    raw, store = tmp_path / "raw", open_store(str(tmp_path / "store"))
    write_log(raw, [("bob", "x", "2026-01-02"), ("ann", "y", "2026-01-03"), ("bob", "w", "2026-01-09")])
    settings = ["window.start=2026-01-10", "window.end=2026-01-11", f"runtime.raw={raw}", "etl.base_run=one"]
    found = []
    for content in ("first", "second"):
        folder = tmp_path / content
        folder.mkdir()
        (folder / "users").write_text(content)
        facts = {"cutoffs": {"end": "2026-01-09T00:00:00+00:00"}}
        store.publish(folder, {"stage": "etl.interactions", "fingerprint": content, "facts": facts})
        store.record("one", "etl.interactions", {"fingerprint": content})
        found.append(STAGES["etl.interactions"].source(load_config(None, settings), store))
    assert found[0]["files"] == found[1]["files"] and found[0]["base"] != found[1]["base"]


def replay(movielens: Path, folder: Path, step: int, stages: Sequence[str] = ("interactions",), **settings: Any) -> str:
    """Seven months in windows of so many days, which arrive between runs that each go on from the one before.

    Args:
        movielens: the raw data.
        folder: where to leave the store `store`, in which the run `whole` has read everything at once.
        step: days of a window.
        stages: what to run.

    Returns:
        The last run.
    """
    raw, store = folder / "raw", folder / "store"
    (raw / "interactions").mkdir(parents=True)
    for name in ("items", "features"):
        (raw / name).symlink_to(movielens / name)
    partitions = {path.name: path for path in (movielens / "interactions").iterdir()}
    waiting = sorted(date.fromisoformat(name.removeprefix("dt=")) for name in partitions)
    # Two days of validation, two of test and one of training are the least.
    begin, last = waiting[0] + timedelta(days=5), waiting[-1] + timedelta(days=1)
    before: str | None = None
    known: dict[str, list[str]] = {"user": [], "item": []}
    for back in range((last - begin).days // step, -1, -1):
        end = last - timedelta(days=step * back)
        arrived = [day for day in waiting if day < end]
        if not arrived:
            continue
        waiting = waiting[len(arrived) :]
        for day in arrived:
            (raw / "interactions" / f"dt={day}").symlink_to(partitions[f"dt={day}"])
        run = f"until-{end}"
        assert etl(store, raw, run, arrived[0], end, stages, etl__base_run="previous", **settings) == EXIT_OK
        # What the training would leave: `previous` is a run that got as far.
        open_store(str(store)).record(run, "ml.graph", {"status": "done"})
        assert open_store(str(store)).run(run)["config"]["etl"]["base_run"] == before
        before = run
        for kind, names in known.items():
            known[kind] = ids(artifact(store, run), kind)
            assert known[kind][: len(names)] == names, "an id changed its number"
    assert before is not None
    assert etl(store, movielens, "whole", last - timedelta(days=1), last, stages, **settings) == EXIT_OK
    return before


def assert_same_log(store: Path, first: str, second: str) -> None:
    """Two runs have the same interactions, under whatever numbers, and have counted the same."""
    one, two = artifact(store, first), artifact(store, second)
    assert by_name(one) == by_name(two)
    assert all(set(ids(one, kind)) == set(ids(two, kind)) for kind in ("user", "item"))
    for name in ("num_train", "num_validation", "num_test", "num_rows_read", "quarantine", "cold"):
        assert one.facts[name] == two.facts[name]


@pytest.mark.drill
def test_movielens_in_pieces_equals_the_whole(spark: SparkSession, movielens: Path, tmp_path: Path) -> None:
    """Windows of 60 days; `tests/drills` has every single day."""
    last = replay(movielens, tmp_path, 60)
    assert_same_log(tmp_path / "store", last, "whole")


def test_generated_dirt_is_counted_to_the_row(spark: SparkSession, tmp_path: Path) -> None:
    """The generator counts the rows it spoils. The ETL finds exactly those, and the planted taste in the others."""
    plan = GeneratorSettings(6000, 200, 80, NUM_DAYS, START, 8, {"text": 4}, dirt_share=0.08)
    generate(plan, tmp_path / "raw")
    weights = {"etl__event_weights": "{view: 1, cart: 3, purchase: 5}", "etl__repeats": "max"}
    assert etl(tmp_path / "store", tmp_path / "raw", "r", *window(1), ("interactions",), **weights) == EXIT_OK
    found = artifact(tmp_path / "store", "r")
    truth = json.loads((tmp_path / "raw" / "truth" / "counts.json").read_text())
    counted = dict(found.facts["quarantine"])
    # What is spoilt to lie after its day of arrival lies after the end where the days are the last two.
    counted["after_arrival"] += counted.pop("after_cutoff", 0)
    assert {kind: counted.get(kind, 0) for kind in DIRT} == truth["dirt"]
    assert sum(truth["dirt"].values()) == 480 and truth["late"] > 200
    world = make_world(plan)
    rows = pq.read_table(found.path / "interactions")
    category = dict(zip(world.item_ids.to_pylist(), world.item_category.tolist(), strict=True))
    favourites = dict(zip(world.user_ids.to_pylist(), world.user_categories.tolist(), strict=True))
    users, items = ids(found, "user"), ids(found, "item")
    own = [
        category[items[i]] in favourites[users[u]]
        for u, i in zip(rows["user_idx"].to_pylist(), rows["item_idx"].to_pylist(), strict=True)
    ]
    assert np.mean(own) > 0.8
    assert set(pc.unique(rows["weight"]).to_pylist()) == {1.0, 3.0, 5.0}


def test_days_are_those_of_the_zone(spark: SparkSession, tmp_path: Path) -> None:
    """A row at 23:30 UTC belongs to the next day in Berlin: on time there, after its arrival in UTC."""
    raw = tmp_path / "raw"
    berlin = pa.timestamp("us", "Europe/Berlin")
    write_day(raw, "2026-01-09", [("a", "x", at("2026-01-09"), None, None), ("b", "y", at("2026-01-08 23:30"))])
    write_day(raw, "2026-01-10", [("a", "y", at("2026-01-10 10:00")), ("b", "x", at("2026-01-10 23:30"))])
    path = next((raw / "interactions" / "dt=2026-01-10").iterdir())
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.set_column(2, "event_time", table["event_time"].cast(berlin)), path)
    settings = {"etl__time_zone": "Europe/Berlin", "etl__lookback_days": 0}
    span = (date(2026, 1, 9), date(2026, 1, 20))
    assert etl(tmp_path / "store", raw, "local", *span, ("interactions",), **settings) == EXIT_OK
    found = artifact(tmp_path / "store", "local")
    assert found.facts["quarantine"] == {"after_arrival": 1}
    quality = json.loads(found.file("quality.json").read_text())
    assert quality["events_per_day"] == {"2026-01-09": 2, "2026-01-10": 1}


def test_a_day_unlike_those_before_it_warns_or_stops(
    reference: Path, punctual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    deliver_late(punctual, raw, 0, seed=4)
    settings = {"etl__drift_min_rows": 100}
    calm = json.loads(artifact(reference, "r").file("quality.json").read_text())["drift"]
    assert calm["status"] == "ok" and max(calm["index"].values()) < 0.25
    rows = [(f"u{n % 3}", f"i{n % 60}", at("2026-01-20 03:30"), 9.0, None) for n in range(400)]
    write_day(raw, "2026-01-20", rows, name="flood.parquet")
    assert etl(store, raw, "flood", *window(1), ("interactions",), **settings) == EXIT_OK
    flood = json.loads(artifact(store, "flood").file("quality.json").read_text())["drift"]
    assert flood["status"] == "warn" and flood["index"]["weight"] > 0.25 and flood["volume"] > 2
    assert "drift status=warn" in capsys.readouterr().err
    settings["etl__drift_stop"] = 0.5
    assert etl(store, raw, "stop", *window(1), ("interactions",), **settings) == EXIT_DATA
    assert "has drifted from the" in capsys.readouterr().err


def test_one_broken_day_is_not_hidden_by_years_of_good_ones(
    punctual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    deliver_late(punctual, raw, 0, seed=5)
    rows = [("u1", "i1", None, 1.0, None)] * 500
    loose = pa.schema([pa.field(field.name, field.type) for field in INTERACTIONS])
    write_day(raw, "2026-01-20", rows, loose, name="broken.parquet")
    assert etl(tmp_path / "store", raw, "r", *window(1), ("interactions",)) == EXIT_DATA
    assert "rows that arrived in the window are malformed (null_event_time 500)" in capsys.readouterr().err


def test_columns_may_come_and_go(spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """New columns are ignored and named, missing optional ones have their default, a changed type is refused."""
    raw, store = tmp_path / "raw", tmp_path / "store"
    write_log(raw, [("a", "x", "2026-01-02"), ("b", "y", "2026-01-03")])
    path = next((raw / "interactions" / "dt=2026-01-03").iterdir())
    table = pq.read_table(path, partitioning=None).select(["user_id", "item_id", "event_time"])
    table = table.append_column("price", pa.array([1.5])).append_column("USER_ID", pa.array(["other"]))
    table = table.append_column("dt", pa.array(["nonsense"]))
    pq.write_table(table, path)
    span = (date(2026, 1, 9), date(2026, 1, 10))
    assert etl(store, raw, "r", date(2026, 1, 2), span[1], ("interactions",)) == EXIT_OK
    found = artifact(store, "r")
    file = "interactions/dt=2026-01-03/part-0.parquet"
    assert found.facts["ignored_columns"] == {"USER_ID": [file], "dt": [file], "price": [file]}
    assert "ignored column=price files=1" in capsys.readouterr().err
    assert {row[:2] for row in by_name(found)} == {("a", "x"), ("b", "y")}
    pq.write_table(table.append_column("event_type", pa.array([3])), path)
    assert etl(store, raw, "typed", date(2026, 1, 2), span[1], ("interactions",)) == EXIT_DATA
    assert "column 'event_type' is int64, expected string" in capsys.readouterr().err
