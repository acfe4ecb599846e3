"""Runs with a base run: old rows and lists stay, and new and changed ones equal those of a build with the same keys."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from crane_core.config_file import load_config
from crane_core.dataset.modalities import Modality
from crane_core.errors import EXIT_CONFIG, EXIT_OK, EXIT_UNEXPECTED
from crane_core.graph.exact import search
from crane_core.refine.fitted import load_refiner
from crane_core.refine.refiner import project_items
from crane_core.stages import STAGES
from crane_core.storage.artifacts import ArtifactStore
from jobs import plan
from jobs.ml import graph, knn, refine
from jobs.ml.stages import refine as refine_stage
from jobs.stores import open_store

NUM_ITEMS, NUM_USERS = 120, 30
SETTINGS = [
    "refine.embedding_dim=8",
    "refine.num_steps=5",
    "refine.batch_size=16",
    "refine.num_recursions=2",
    "refine.phi=softmax",
    "refine.chunk_size=7",
    "refine.max_drift=0.9",
    "knn.k=5",
    "knn.certificate_sample=30",
    "runtime.num_threads=1",
]
ML = ("ml.refine", "ml.graph")


def flags(store: Path, run: str, day: int, *settings: str) -> list[str]:
    window = [f"window.start=2026-01-0{day}", f"window.end=2026-01-0{day + 1}"]
    return ["--store", str(store), "--run", run] + [
        flag for setting in (*SETTINGS, *window, *settings) for flag in ("--set", setting)
    ]


def publish(store: ArtifactStore, run: str, stage: str, folder: Path, facts: dict) -> None:
    fingerprint = f"{run}-{stage}"
    artifact = store.publish(folder, {"stage": stage, "part": "", "fingerprint": fingerprint, "facts": facts})
    store.record(run, stage, {"fingerprint": fingerprint, "content": artifact.manifest["content"]})


def modalities(new_items: int = 0, new_users: int = 0, changed: tuple[int, ...] = ()) -> list[Modality]:
    found = []
    for seed, name in enumerate(("image", "text")):
        generator = np.random.default_rng(seed)
        items = generator.normal(size=(NUM_ITEMS + 20, 6)).astype(np.float32)
        profiles = generator.normal(size=(NUM_USERS + 20, 6)).astype(np.float32)
        items[list(changed)] += 1
        num_users = NUM_USERS + new_users
        present = np.ones(NUM_ITEMS + new_items, dtype=bool)
        found.append(
            Modality(name, items[: len(present)], present, profiles[:num_users], np.ones(num_users, dtype=np.int32))
        )
    return found


def plant(store_path: Path, scratch: Path, run: str, content: list[Modality], base: str | None = None) -> None:
    """The artifacts of the ETL; `base` is the run whose ids go on."""
    store, folder = open_store(str(store_path)), scratch / run
    num_items, num_users = len(content[0].items), len(content[0].profiles)
    interactions = folder / "interactions"
    pairs = np.array([(user, (7 * user + step) % NUM_ITEMS) for user in range(num_users) for step in range(5)])
    splits = np.tile([0, 0, 0, 1, 2], num_users)
    columns = {"user_idx": pairs[:, 0], "item_idx": pairs[:, 1]}
    table = {name: pa.array(values, pa.int32()) for name, values in columns.items()}
    table |= {
        "split": pa.array(splits, pa.int8()),
        "weight": pa.array(np.ones(len(splits)), pa.float32()),
        "event_time": pa.array([datetime(2026, 1, 1)] * len(splits), pa.timestamp("us", "UTC")),
    }
    (interactions / "interactions").mkdir(parents=True)
    pq.write_table(pa.table(table), interactions / "interactions" / "0.parquet")
    for kind, size in (("user", num_users), ("item", num_items)):
        (interactions / f"{kind}s").mkdir()
        ids = {f"{kind}_idx": pa.array(range(size), pa.int32()), f"{kind}_id": [f"{kind}{n}" for n in range(size)]}
        pq.write_table(pa.table(ids), interactions / f"{kind}s" / "0.parquet")
    facts = {"num_users": num_users, "num_items": num_items, "base": base and f"{base}-etl.interactions"}
    publish(store, run, "etl.interactions", interactions, facts)
    features, profiles = folder / "features", folder / "profiles"
    profiles.mkdir()
    for each in content:
        (features / each.name).mkdir(parents=True)
        np.save(features / each.name / "matrix.npy", each.items)
        np.save(features / each.name / "mask.npy", each.present)
        np.save(profiles / f"{each.name}.npy", each.profiles)
        np.save(profiles / f"{each.name}.counts.npy", each.counts)
    publish(store, run, "etl.features", features, {"modalities": {each.name: {} for each in content}})
    publish(store, run, "etl.profiles", profiles, {"aggregate": "sum"})


def finish(store: Path, run: str, day: int, *settings: str) -> None:
    for job, part in ((refine, ""), (knn, "1"), (knn, "0"), (graph, "")):
        extra = ["--part", part] if part else []
        assert job.main([*flags(store, run, day, *settings), *extra]) == EXIT_OK, job.__name__


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """A store with a run `one`, and `two` with more items and users, three changed items and a changed profile."""
    store = tmp_path / "store"
    content = modalities(12, 3, (4, 50, 119))
    content[1].profiles[2] += 1
    plant(store, tmp_path, "one", modalities())
    plant(store, tmp_path, "two", content, "one")
    finish(store, "one", 1)
    finish(store, "two", 2, "etl.base_run=one")
    return store


def test_untouched_rows_stay_and_the_others_are_refined_by_the_same_keys(grown: Path) -> None:
    store = open_store(str(grown))
    one, two = (store.artifact(run, "ml.refine") for run in ("one", "two"))
    growth = two.facts["growth"]
    assert (growth["base"], growth["num_items"], growth["num_users"], growth["num_built"]) == ("one", 15, 4, NUM_ITEMS)
    assert 0 < growth["drift"] < 0.9
    config = load_config(None, ["window.start=2026-01-01", "window.end=2026-01-02", *SETTINGS])
    refiner = load_refiner([6, 6], config.refine, one.path)
    content = modalities(12, 3, (4, 50, 119))
    with torch.no_grad():
        then = project_items(refiner, modalities(), np.arange(NUM_ITEMS))
        _, expected = refiner.rca(then, project_items(refiner, content, np.arange(NUM_ITEMS + 12)))
        fused = refiner.fuse(expected)
    touched = [4, 50, 119, *range(NUM_ITEMS, NUM_ITEMS + 12)]
    for name, rows, places in (("items.npy", expected, touched), ("fused_items.npy", fused, touched)):
        before, found = (np.load(artifact.file(name)) for artifact in (one, two))
        kept = np.setdiff1d(np.arange(NUM_ITEMS), places)
        np.testing.assert_array_equal(found[kept], before[kept])
        np.testing.assert_allclose(found, rows.numpy(), atol=1e-5)
        assert np.abs(found[places[:3]] - before[places[:3]]).max() > 1e-2
    before, found = (np.load(artifact.file("users.npy")) for artifact in (one, two))
    same = np.setdiff1d(np.arange(NUM_USERS), [2])
    np.testing.assert_array_equal(found[same], before[same])
    assert len(found) == NUM_USERS + 3 and np.abs(found[[2, 30, 31, 32]]).min() > 0
    for name in ("keys-1.npy", "keys-2.npy", "anchors.npy", "anchor_items.npy", "rca.safetensors"):
        assert two.file(name).read_bytes() == one.file(name).read_bytes()


def test_features_in_half_precision_grow_to_the_same_rows_and_lists(tmp_path: Path) -> None:
    """Equal numbers in another type: every later artifact is the same."""
    found = []
    for dtype in ("float16", "float32"):
        store = tmp_path / dtype / "store"
        for run, base, content in (("one", None, modalities()), ("two", "one", modalities(12, 3, (4, 50, 119)))):
            items = [each.items.astype(np.float16).astype(dtype) for each in content]
            content = [replace(each, items=rows) for each, rows in zip(content, items, strict=True)]
            plant(store, tmp_path / dtype, run, content, base)
        finish(store, "one", 1)
        finish(store, "two", 2, "etl.base_run=one")
        kept = open_store(str(store))
        assert kept.artifact("two", "ml.refine").facts["growth"]["num_items"] == 15
        found.append([kept.artifact(run, stage).manifest["content"] for run in ("one", "two") for stage in ML])
    assert found[0] == found[1]


def test_the_lists_are_those_of_a_search_from_nothing(grown: Path) -> None:
    store = open_store(str(grown))
    rows = np.load(store.artifact("two", "ml.refine").file("fused_items.npy"))
    found = store.artifact("two", "ml.graph")
    expected = search(rows, range(len(rows)), 5)
    np.testing.assert_array_equal(np.load(found.file("neighbours.npy")), expected[0])
    np.testing.assert_array_equal(np.load(found.file("similarities.npy")), expected[1])
    parts = [store.artifact("two", f"ml.knn.{part}").facts for part in "01"]
    assert [part["num_touched"] for part in parts] == [15, 15]
    assert 15 < sum(part["num_searched"] for part in parts) < len(rows)


def test_a_third_run_grows_from_the_second_and_measures_against_the_first(grown: Path, tmp_path: Path) -> None:
    plant(grown, tmp_path, "three", modalities(20, 3, (4, 50, 119)), "two")
    finish(grown, "three", 3, "etl.base_run=two")
    store = open_store(str(grown))
    growth = store.artifact("three", "ml.refine").facts["growth"]
    assert (growth["num_items"], growth["num_users"], growth["num_built"]) == (8, 1, NUM_ITEMS)
    assert growth["drift"] > store.artifact("two", "ml.refine").facts["growth"]["drift"] > 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("refine.max_drift=0.001",), "same_settings=False"),
        (("refine.num_recursions=1",), "same_settings=False"),
        (("profiles.aggregate=mean",), "same_profiles=False"),
    ],
)
def test_what_does_not_fit_is_built_anew(
    tmp_path: Path, settings: tuple[str, ...], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    plant(store, tmp_path, "one", modalities())
    plant(store, tmp_path, "two", modalities(12), "one")
    finish(store, "one", 1)
    finish(store, "two", 2, "etl.base_run=one", *settings)
    assert told in capfd.readouterr().err
    assert "growth" not in open_store(str(store)).artifact("two", "ml.refine").facts


def test_other_features_of_the_same_width_are_built_anew(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    plant(store, tmp_path, "one", modalities())
    plant(store, tmp_path, "two", modalities(changed=tuple(range(80))), "one")
    finish(store, "one", 1)
    finish(store, "two", 2, "etl.base_run=one")
    assert "build_anew base=one {'num_items': 80" in capfd.readouterr().err
    one, two = (open_store(str(store)).artifact(run, "ml.refine") for run in ("one", "two"))
    assert "growth" not in two.facts
    assert two.file("rca.safetensors").read_bytes() != one.file("rca.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("settings", "grows"), [(("knn.num_shards=3", "knn.memory=2000000"), True), (("knn.mode=approx",), False)]
)
def test_lists_grow_while_the_settings_that_decide_them_stay(
    grown: Path, tmp_path: Path, settings: tuple[str, ...], grows: bool
) -> None:
    plant(grown, tmp_path, "three", modalities(20, 3, (4, 50, 119)), "two")
    for job, part in ((refine, []), (knn, ["--part", "0"])):
        assert job.main([*flags(grown, "three", 3, "etl.base_run=two", *settings), *part]) == EXIT_OK
    assert ("num_touched" in open_store(str(grown)).artifact("three", "ml.knn.0").facts) == grows


@pytest.mark.parametrize(("stage", "job"), [("ml.refine", refine), ("ml.graph", knn)])
def test_what_another_version_left_is_not_grown_from(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, job: ModuleType
) -> None:
    plant(grown, tmp_path, "three", modalities(20, 3, (4, 50, 119)), "two")
    assert job is refine or refine.main(flags(grown, "three", 3, "etl.base_run=two")) == EXIT_OK
    monkeypatch.setitem(STAGES, stage, replace(STAGES[stage], version=99))
    part = [] if job is refine else ["--part", "0"]
    assert job.main([*flags(grown, "three", 3, "etl.base_run=two"), *part]) == EXIT_OK
    found = open_store(str(grown)).artifact("three", ".".join(["ml.refine" if job is refine else "ml.knn", *part[1:]]))
    assert not {"growth", "num_touched"} & set(found.facts)


def test_another_number_of_neighbours_measures_another_drift(grown: Path, tmp_path: Path) -> None:
    store = open_store(str(grown))
    content = modalities(12, 3, (4, 50, 119))
    content[1].profiles[2] += 1
    plant(grown, tmp_path, "again", content, "one")
    assert refine.main(flags(grown, "again", 2, "etl.base_run=one", "knn.k=60")) == EXIT_OK
    two, again = (store.artifact(run, "ml.refine") for run in ("two", "again"))
    assert again.fingerprint != two.fingerprint
    assert again.facts["growth"]["drift"] != two.facts["growth"]["drift"]


def test_past_the_bound_everything_is_built_anew(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the first attempt dies between the fit and the rows."""
    store, bound = tmp_path / "store", "refine.max_drift=0.001"
    plant(store, tmp_path, "one", modalities())
    plant(store, tmp_path, "two", modalities(20), "one")
    plant(store, tmp_path, "alone", modalities(20))
    finish(store, "one", 1, bound)
    with monkeypatch.context() as patch:
        patch.setattr(refine_stage, "refine_to_files", lambda *given: 1 / 0)
        assert refine.main(flags(store, "two", 2, bound, "etl.base_run=one")) == EXIT_UNEXPECTED
    finish(store, "two", 2, bound, "etl.base_run=one")
    finish(store, "alone", 2, bound)
    assert "build_anew drift=" in capfd.readouterr().err
    one, two, alone = (open_store(str(store)).artifact(run, "ml.refine") for run in ("one", "two", "alone"))
    assert two.manifest["content"] == alone.manifest["content"]
    assert len(np.load(two.file("anchor_items.npy"))) == NUM_ITEMS + 20
    assert two.file("rca.safetensors").read_bytes() != one.file("rca.safetensors").read_bytes()


def test_previous_is_the_run_of_the_latest_earlier_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "store"
    store = open_store(str(path))
    for run, day in (("a", 1), ("c", 3), ("b", 2), ("unfinished", 4), ("later", 7)):
        assert plan.main(flags(path, run, day)) == EXIT_OK
        if run != "unfinished":
            store.record(run, "ml.graph", {"fingerprint": "x"})
    assert plan.main(flags(path, "today", 5, "etl.base_run=previous")) == EXIT_OK
    assert store.recorded_config("today")["etl"]["base_run"] == "c"
    store.record("unfinished", "ml.graph", {"fingerprint": "x"})
    assert plan.main(flags(path, "today", 5, "etl.base_run=previous")) == EXIT_OK, "a run keeps what it started with"
    assert store.recorded_config("today")["etl"]["base_run"] == "c"
    assert plan.main(flags(path, "first", 1, "etl.base_run=previous")) == EXIT_OK
    assert store.recorded_config("first")["etl"]["base_run"] is None
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stage"] == "plan"


def test_a_backfill_goes_on_from_the_day_before_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "store"
    store = open_store(str(path))
    backfill = ("etl.base_run=previous", "runtime.backfill=true")
    assert plan.main(flags(path, "lonely", 5, *backfill)) == EXIT_CONFIG
    assert "there is none before it" in capsys.readouterr().out
    for run, day in (("a", 3), ("b", 4)):
        assert plan.main(flags(path, run, day)) == EXIT_OK
        store.record(run, "ml.graph", {"fingerprint": "x"})
    assert plan.main(flags(path, "fifth", 5, *backfill)) == EXIT_OK
    assert store.recorded_config("fifth")["etl"]["base_run"] == "b"
    capsys.readouterr()
    assert plan.main(flags(path, "sixth", 6, *backfill)) == EXIT_CONFIG
    error = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "b, ends at" in error["found"] and "Backfill the day before" in error["remedy"]
    assert store.recorded_config("sixth") is None
    # The daily run goes on from the last day there is.
    assert plan.main(flags(path, "sixth", 6, "etl.base_run=previous")) == EXIT_OK
    assert store.recorded_config("sixth")["etl"]["base_run"] == "b"
