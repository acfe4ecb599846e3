"""Ship what is fresh: the refit run from raw data to the export, and what it may not touch."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timedelta
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pyspark.sql import SparkSession

from crane_core.config import Runtime
from crane_core.config_file import load_config
from crane_core.errors import EXIT_ARTIFACT, EXIT_CONFIG, EXIT_OK
from crane_core.model_config import Choices, HeadWeights
from crane_core.refit import refit_config, refit_run
from crane_core.release.registry import open_registry
from crane_core.serving.export import write_export
from crane_core.serving.model_folder import load_model, load_recommender
from crane_core.stages import SHIPPED, STAGES, base_interactions
from crane_core.storage.artifacts import Artifact
from jobs.commands.local import SHIP, retrain_steps
from jobs.ml import refit, register
from jobs.ml.refit import refit_base
from jobs.stores import open_store
from tests.worlds.raw_data import at, write_day, write_items, write_log, write_vectors

NUM_USERS, NUM_ITEMS, NUM_DAYS = 24, 30, 20
END = "2026-01-21"
SETTINGS = (
    *("window.start=2026-01-20", "window.end=2026-01-21"),
    *("etl.validation_days=3", "etl.test_days=3", "refine.num_steps=3", "refine.embedding_dim=4", "knn.k=3"),
    *("knn.num_shards=1", "lightgcn.embedding_dim=8", "train.num_epochs=4", "train.batch_size=128"),
    *("evaluate.num_bootstrap=100", "promote.min_users=1", "promote.beats=[]", "export.k=10", "export.num_similar=3"),
    *("runtime.num_threads=1", "runtime.spark_master=local[2]"),
)
FRESH = ("late-user", "i0", "2026-01-20 23:00")
"""An event of the last day whose user nobody has met before."""
TWIN = [name for name in STAGES if name not in ("ml.register", "ml.export")]


def events() -> list[tuple[str, str, str]]:
    """One event of every user and day; the items of the last week are new, and so is a user of the test period."""
    found = []
    for day in range(NUM_DAYS):
        first, stop = (0, 20) if day < NUM_DAYS - 6 else (15, NUM_ITEMS)
        for user in range(NUM_USERS):
            item = first + (user * 5 + day * 3 + user * day) % (stop - first)
            found.append((f"u{user}", f"i{item}", f"2026-01-{day + 1:02d} {user % 24:02d}:00"))
    return [*found, ("new", "i3", "2026-01-19 12:00"), ("new", "i20", "2026-01-20 12:00")]


def write_raw(raw: Path, log: list[tuple[str, str, str]]) -> Path:
    write_log(raw, log)
    write_items(raw, [(f"i{n}", f"Item {n}") for n in range(NUM_ITEMS + 1)])
    write_vectors(raw, "text", [(f"i{n}", [float(n % 5), 1.0, float(n % 7)]) for n in range(NUM_ITEMS + 1)])
    return raw


class Run:
    """A run in a store, and its jobs in this process."""

    def __init__(self, root: Path, raw: Path, run: str = "r", *extra: str) -> None:
        self.root, self.run = root, run
        pairs = [word for each in (*SETTINGS, f"runtime.raw={raw}", *extra) for word in ("--set", each)]
        self.flags = ["--store", str(root), "--run", run, *pairs]
        self.config = load_config(None, [*SETTINGS, *extra])
        self.store = open_store(str(root))

    def go(self, *steps: str) -> None:
        for step in steps:
            name, more = step.removeprefix(SHIP), ["--refit"] if step.startswith(SHIP) else []
            part = ["--part", "0"] if name == "ml.knn" else []
            assert import_module(f"jobs.{name}").main([*self.flags, *more, *part]) == EXIT_OK, step

    def artifact(self, stage: str, refit: bool = False) -> Artifact:
        run = refit_run(self.run) if refit else self.run
        return self.store.artifact(run, STAGES[stage].labels(self.config)[0])

    def contents(self, stages: list[str], refit: bool = False) -> dict[str, str]:
        """Content checksum of each stage."""
        return {name: self.artifact(name, refit).manifest["content"] for name in stages}


@pytest.fixture(scope="module")
def shipped(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with its refit run, registered, promoted and exported."""
    root = tmp_path_factory.mktemp("refit")
    run = Run(root / "store", write_raw(root / "raw", events()))
    run.go(*retrain_steps(run.config), "ml.promote", "ml.export")
    return run


def met() -> dict[str, set[str]]:
    """Items that each user has met before the end of the window."""
    found: dict[str, set[str]] = {}
    for user, item, _ in events():
        found.setdefault(user, set()).add(item)
    return found


def test_the_export_is_fresh(shipped: Run) -> None:
    exported = shipped.store.artifact("r", "ml.export")
    lists: dict[str, set[str]] = {}
    for row in pq.read_table(exported.file("recommendations")).to_pylist():
        lists.setdefault(row["user_id"], set()).add(row["item_id"])
    assert set(lists) == set(met())
    assert all(lists[user].isdisjoint(items) for user, items in met().items())
    trained = pq.read_table(shipped.artifact("etl.interactions", refit=True).file("items"))
    states = dict(zip(trained["item_id"].to_pylist(), trained["state"].to_pylist(), strict=True))
    everything = {item for items in met().values() for item in items}
    assert {item for item, state in states.items() if state == "trained"} == everything
    # The twin knows neither the new items nor the new user.
    twin = pq.read_table(shipped.artifact("etl.interactions").file("items"))
    assert sum(state == "trained" for state in twin["state"].to_pylist()) < len(everything)


def test_the_refit_run_makes_no_choice(shipped: Run) -> None:
    twin, fresh = (shipped.artifact("ml.train", again).facts for again in (False, True))
    config = load_config(None, [], shipped.store.recorded_config("r.refit"))
    assert config.choices is not None and config.etl.split == "none"
    assert fresh["num_epochs"] == twin["best_epoch"] + 1 == config.choices.crane_epochs
    assert (fresh["best_ranking"], fresh["trust"]) == (twin["best_ranking"], twin["trust"])
    behaviour = shipped.artifact("ml.behaviour", True).facts
    assert behaviour["num_epochs"] == shipped.artifact("ml.behaviour").facts["best_epoch"] + 1
    rows = shipped.artifact("etl.interactions", True).facts
    assert (rows["num_validation"], rows["num_test"], rows["num_cold_rows"]) == (0, 0, 0)


def test_a_version_holds_both_models(shipped: Run) -> None:
    registry = open_registry(Runtime(), str(shipped.root))
    version = registry.version("1")
    assert (version.run_id, version.shipped_run) == ("r", "r.refit")
    served, twin = load_model(registry.model_folder(version)), load_model(registry.twin_folder(version))
    assert (served.facts["run"], twin.facts["run"]) == ("r.refit", "r")
    assert set(met()) == set(served.user_ids) > set(twin.user_ids)
    assert version.tags["crane.shipped.ml.train"] == shipped.artifact("ml.train", True).fingerprint
    assert version.tags["crane.artifact.ml.train"] == shipped.artifact("ml.train").fingerprint


def test_a_refit_run_with_other_choices_is_not_registered(
    shipped: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Run(shutil.copytree(shipped.root, tmp_path / "store"), shipped.root.parent / "raw")
    config = load_config(None, [], copy.store.recorded_config("r.refit"))
    assert config.choices is not None
    other = config.choices.model_copy(update={"crane_epochs": config.choices.crane_epochs + 1})
    copy.store.restart_run("r.refit", config.model_copy(update={"choices": other}))
    assert register.main(copy.flags) == EXIT_ARTIFACT
    assert "was made with other choices" in capsys.readouterr().out


def test_a_row_of_the_last_day_changes_the_shipped_model_alone(
    spark: SparkSession, shipped: Run, tmp_path: Path
) -> None:
    other = Run(tmp_path / "store", write_raw(tmp_path / "raw", [*events(), FRESH]))
    other.go(*(step for step in retrain_steps(other.config) if step != "ml.register"))
    stages = [name for name in TWIN if name not in ("etl.interactions", "ml.evaluate")]
    assert other.contents(stages) == shipped.contents(stages)
    evidence = [run.artifact("ml.evaluate") for run in (shipped, other)]
    assert evidence[0].file("per_user.parquet").read_bytes() == evidence[1].file("per_user.parquet").read_bytes()
    figures = [json.loads(each.file("metrics.json").read_text()) for each in evidence]
    # Users whom the training does not know are counted, and are no part of any model's figures.
    assert figures[0].pop("cold") != figures[1].pop("cold")
    assert figures[0] == figures[1]
    fresh = [run.contents(["ml.behaviour", "ml.train"], refit=True) for run in (shipped, other)]
    assert fresh[0]["ml.behaviour"] != fresh[1]["ml.behaviour"] and fresh[0]["ml.train"] != fresh[1]["ml.train"]


def test_without_a_refit_everything_is_as_it_was(
    shipped: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(
        shipped.root, tmp_path / "store", ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts", "ledger")
    )
    before = Run(tmp_path / "store", shipped.root.parent / "raw", "before", "etl.refit=false")
    capsys.readouterr()
    before.go(*retrain_steps(before.config))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["status"] for line in lines] == ["found"] * len(TWIN) + ["done"]
    assert lines[-1]["shipped_run"] == "before" and before.store.recorded_config("before.refit") is None
    registry = open_registry(Runtime(), str(before.root))
    version = registry.version("1")
    assert not version.has_twin and registry.twin_folder(version) == registry.model_folder(version)
    assert load_model(registry.model_folder(version)).facts["run"] == "before"
    assert refit.main(before.flags) == EXIT_OK
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["refit_run"] is None


def test_all_is_found_the_second_time(shipped: Run, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    shipped.go(*(step for step in retrain_steps(shipped.config) if step != "ml.refit"), "ml.promote", "ml.export")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["status"] for line in lines} == {"found"}
    assert len(lines) == len(TWIN) + len(SHIPPED) + 3


def test_a_refit_run_goes_on_from_a_refit_run(shipped: Run) -> None:
    later = [f"window.end={END[:-2]}22", "etl.base_run=r"]
    config = load_config(None, [*SETTINGS, *later])
    assert refit_base(config, shipped.store) == "r.refit"
    base = base_interactions(refit_config(config, None, "r.refit"), shipped.store)
    assert base is not None and base.fingerprint == shipped.artifact("etl.interactions", refit=True).fingerprint
    for none in (config.etl.going_on_from("never-refitted"), config.etl.going_on_from(None)):
        assert refit_base(config.model_copy(update={"etl": none}), shipped.store) is None


def test_a_refit_run_begins_with_its_run(shipped: Run, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--store", str(shipped.root), "--run"]
    assert register.main([*flags, "other.refit", *shipped.flags[4:]]) == EXIT_ARTIFACT
    assert "jobs.ml.refit" in json.loads(capsys.readouterr().out.splitlines()[-1])["remedy"]
    assert refit.main([*flags, "r.refit"]) == EXIT_CONFIG
    assert refit.main([*flags, "x" * 125, *shipped.flags[4:]]) == EXIT_CONFIG, "the id of its refit run is too long"
    later = shipped.config.model_copy(
        update={"window": shipped.config.window.model_copy(update={"end": at(END) + timedelta(days=1)})}
    )
    assert shipped.store.previous_run(later) == "r"


CHOSEN = Choices(
    behaviour_epochs=2,
    crane_epochs=2,
    crane_ranking="length^1",
    share=0.5,
    half_life=3.0,
    history_half_life=14.0,
    head=HeadWeights(
        edges=(0, 1, 8),
        popularity=1.0,
        channels={"model": (0, 0.5, 0.6), "recent": (0, 0.2, 0.1), "profile": (0.5, 0.3, 0), "generated": (0.2, 0, 0)},
        bias=(-1.0, 0.1, 0.2),
        num_cold=3,
    ),
)
"""Choices as a twin may have made them."""


def random_log(seed: int) -> list[tuple[str, str, datetime, datetime]]:
    """Draw user, item, time and arrival of events: repeats, late ones, new users and items on the last day.

    Some events happen or arrive after the window, and somebody meets most of the catalog.
    """
    random = np.random.default_rng(seed)
    num_users, num_items = random.integers(6, 20), random.integers(8, 25)
    end, found = at(END), []
    for _ in range(random.integers(60, 160)):
        user, item = random.zipf(1.6) % num_users, random.zipf(1.4) % num_items
        time = end - timedelta(hours=float(random.uniform(-24, 24 * NUM_DAYS)))
        found.append((f"u{user}", f"i{item}", time, time + timedelta(days=int(random.integers(0, 4)))))
    for number in range(3):
        time = end - timedelta(minutes=float(random.uniform(1, 1400)))
        found.append((f"new{number}", f"fresh{number % 2}", time, time))
        found.append((f"new{number}", f"i{number}", time, time))
    found += [("reader", f"i{item}", end - timedelta(days=2), end - timedelta(days=2)) for item in range(num_items - 1)]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_an_export_of_any_log_is_fresh(spark: SparkSession, tmp_path: Path, seed: int) -> None:
    """By the jobs of a refit run and the functions of the export: nobody is shown what they have met."""
    log = random_log(seed)
    days: dict[str, list[tuple[str, str, datetime]]] = {}
    for user, item, time, arrival in log:
        days.setdefault(f"{arrival:%Y-%m-%d}", []).append((user, item, time))
    for day, rows in days.items():
        write_day(tmp_path / "raw", day, rows)
    known = [(user, item) for user, item, time, arrival in log if time < at(END) and arrival < at(END)]
    items = sorted({item for _, item, _, _ in log})
    write_items(tmp_path / "raw", [(item, item) for item in [*items, "never-met"]])
    write_vectors(
        tmp_path / "raw", "text", [(item, [float(len(item)), float(n % 3), 1.0]) for n, item in enumerate(items)]
    )
    run = Run(tmp_path / "store", tmp_path / "raw")
    run.store.start_run("r", run.config)
    run.store.restart_run("r.refit", refit_config(run.config, CHOSEN, None))
    run.go(*(f"{SHIP}{stage}" for stage in SHIPPED))

    log_artifact, trained = (run.artifact(stage, refit=True) for stage in ("etl.interactions", "ml.train"))
    recommender = load_recommender(log_artifact, trained)
    (tmp_path / "export").mkdir()
    write_export(tmp_path / "export", recommender, run.config.export, torch.device("cpu"))
    rows = pq.read_table(tmp_path / "export" / "recommendations").to_pylist()
    exported = {(row["user_id"], row["item_id"]) for row in rows}
    assert len(exported) == len(rows) and exported.isdisjoint(known)
    assert {user for user, _ in exported} == {user for user, _ in known}
    table = pq.read_table(log_artifact.file("items"))
    states = dict(zip(table["item_id"].to_pylist(), table["state"].to_pylist(), strict=True))
    assert {item for item, state in states.items() if state == "trained"} == {item for _, item in known}
    places = {item: place for place, item in enumerate(recommender.item_ids.to_pylist())}
    warm = recommender.item_embeddings[[places[item] for _, item in known]]
    assert np.isfinite(warm).all() and (np.abs(warm).max(axis=1) > 0).all()
