"""From a folder of files to recommendations by title: both DAGs through Airflow, then every question a person asks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from crane_core.errors import EXIT_ARTIFACT, EXIT_DATA, EXIT_OK
from crane_core.stages import STAGES
from jobs.stores import open_store
from tests.e2e.conftest import (
    HELD_PER_USER,
    NUM_GROUPS,
    NUM_ITEMS,
    NUM_USERS,
    TRAIN_PER_USER,
    World,
    ask,
    crane,
    demo,
)

pytestmark = [pytest.mark.slow, pytest.mark.spark]

KEYS = {
    *("run", "window", "model_version", "alias", "report", "seconds"),
    *("recall@20", "ndcg@20", "lightgcn_recall@20", "recent_popularity_recall@20"),
}


def test_the_demo_ends_with_a_champion(world: World) -> None:
    assert world.first.code == EXIT_OK, world.first.err[-3000:]
    summary = world.first.json
    assert set(summary) == KEYS
    assert summary["run"].startswith("planted-2000-01-04-")
    assert summary["window"] == "2000-01-01/2000-01-04"
    assert (summary["model_version"], summary["alias"]) == ("1", "champion")
    # Two held-out items among the 14 unseen ones of a user's own group: a list of 20 that knows the groups has both.
    assert summary["recall@20"] > 0.9
    assert "<html" in Path(summary["report"]).read_text()[:200]


def test_it_shows_three_users_by_title(world: World) -> None:
    shown = [line for line in world.first.out if line.startswith("user ")]
    assert len(shown) == 3
    position = world.first.out.index(shown[0])
    assert " piece " in world.first.out[position + 1]
    assert world.first.out[0] == f"report  {world.first.json['report']}"


def test_it_shows_its_steps(world: World) -> None:
    for task in ("resolve", "interactions", "knn[1]", "train", "ship.knn[1]", "register", "promote", "report"):
        assert f"  {task} " in world.first.err, task
    assert "success seconds=" in world.first.err
    assert "Traceback" not in world.first.err


def test_a_second_demo_finds_every_stage(world: World) -> None:
    store = open_store(str(world.store))
    second = world.demo()
    assert second.code == EXIT_OK, second.err[-3000:]
    timeless = [ended.json | {"seconds": 0} for ended in (world.first, second)]
    assert timeless[0] == timeless[1]
    assert second.out[:-1] == world.first.out[:-1]
    for name, stage in STAGES.items():
        for part in ["0", "1"] if name == "ml.knn" else [""]:
            entry = store.entry(world.run, stage.label(part))
            assert entry is not None and entry["status"] == "found", (name, part)
    assert second.json["seconds"] < world.first.json["seconds"]


def test_recommendations_are_of_the_users_group(world: World) -> None:
    for user in range(0, NUM_USERS, 37):
        ended = ask("recommend", "--user", str(user), "-k", "5", "--store", world.store, "--json")
        assert ended.code == EXIT_OK and len(ended.out) == 1
        answer = ended.json
        assert (answer["user"], answer["model_version"], answer["run"]) == (str(user), "1", world.run)
        assert [item["rank"] for item in answer["items"]] == [1, 2, 3, 4, 5]
        groups = [int(item["item_id"]) % NUM_GROUPS for item in answer["items"]]
        assert groups.count(user % NUM_GROUPS) >= 4
        item = answer["items"][0]
        assert item["title"] == f"piece {item['item_id']} of group {int(item['item_id']) % NUM_GROUPS}"
        met = _met_items(world, user)
        assert met.isdisjoint(item["item_id"] for item in answer["items"])


def test_what_is_served_has_learned_from_every_event(world: World) -> None:
    store = open_store(str(world.store))
    facts = store.artifact(f"{world.run}.refit", "etl.interactions").facts
    total = NUM_USERS * (TRAIN_PER_USER + 2 * HELD_PER_USER)
    assert (facts["num_train"], facts["num_validation"], facts["num_test"]) == (total, 0, 0)
    registered = store.entry(world.run, "ml.register")
    assert registered is not None and registered["shipped_run"] == f"{world.run}.refit"
    lists = pq.read_table(store.artifact(world.run, "ml.export").file("recommendations"))
    assert len(set(lists["user_id"].to_pylist())) == NUM_USERS


def test_recommendations_for_a_person(world: World) -> None:
    ended = crane("recommend", "--user", "3", "-k", "3", "--store", world.store)
    assert ended.code == EXIT_OK and len(ended.out) == 3
    assert "piece" in ended.out[0]


def test_whoever_met_items_gets_others_of_their_group(world: World) -> None:
    ended = ask("recommend", "--items", "3", "7", "none", "--k", "5", "--store", world.store, "--json")
    assert ended.code == EXIT_OK
    assert ended.json["unknown_items"] == ["none"] and not ended.json["fallback"]
    items = [item["item_id"] for item in ended.json["items"]]
    assert {int(item) % NUM_GROUPS for item in items} == {3} and not {"3", "7"} & set(items)


def test_an_unknown_user_is_told_whom_there_is(world: World) -> None:
    ended = ask("recommend", "--user", "nobody", "--store", world.store, "--json")
    assert ended.code == EXIT_DATA
    assert ended.json["error"] == "DataError" and "'nobody'" in ended.json["found"]
    assert "Remedy:" in ended.err and "for example 0" in ended.err


def test_similar_items_are_of_the_items_group(world: World) -> None:
    ended = ask("similar", "--item", "7", "-k", "4", "--store", world.store, "--json")
    assert ended.code == EXIT_OK
    answer = ended.json
    assert answer["title"] == "piece 7 of group 3"
    ids = [item["item_id"] for item in answer["items"]]
    assert len(ids) == 4 and "7" not in ids
    assert sum(int(item) % NUM_GROUPS == 3 for item in ids) >= 3


def test_an_unknown_item_is_told_what_there_is(world: World) -> None:
    ended = ask("similar", "--item", str(NUM_ITEMS), "--store", world.store)
    assert ended.code == EXIT_DATA
    assert "for example" in ended.err


def test_runs(world: World) -> None:
    ended = ask("runs", "--store", world.store, "--json")
    assert ended.code == EXIT_OK
    (run,) = ended.json["runs"]
    assert run["run"] == world.run
    assert run["stages"] == list(STAGES)
    assert (run["model_version"], run["aliases"]) == ("1", ["candidate", "champion"])
    assert run["recall@20"] == pytest.approx(world.first.json["recall@20"])
    text = ask("runs", "--store", world.store).out
    assert world.run in text[1] and "champion" in text[1]


def test_doctor_finds_store_and_registry(world: World) -> None:
    ended = ask("doctor", "--store", world.store, "--json")
    assert ended.code == EXIT_OK, ended.out
    checks = {check["name"]: check for check in ended.json["checks"]}
    assert checks["registry"]["status"] == "ok" and "1 versions" in checks["registry"]["found"]
    assert {checks[name]["status"] for name in ("python", "java", "torch", "faiss", "airflow", "store")} == {"ok"}


def test_there_is_nothing_to_go_back_to(world: World) -> None:
    ended = crane("rollback", "--store", world.store, "--json")
    assert ended.code == EXIT_ARTIFACT
    assert "no champion before" in ended.err


def test_a_run_without_airflow_finds_the_same_stages(world: World, tmp_path: Path) -> None:
    recorded = json.loads((world.store / "runs" / world.run / "run.json").read_text())["config"]
    config = tmp_path / "same.yaml"
    config.write_text(json.dumps(recorded))
    ended = crane(
        *("run", "--store", world.store, "--run", "by-hand", "--config", config, "--until", "ml.graph", "--json"),
        *("--raw", world.home / "planted" / "raw"),
    )
    assert ended.code == EXIT_OK, ended.err
    assert ended.json["run"] == "by-hand"
    assert set(ended.json["stages"].values()) == {"found"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "planted.inter").unlink(), "0 *.inter files"),
        (lambda folder: (folder / "words_feat.npy").write_bytes(b"not numpy"), "words_feat.npy"),
    ],
)
def test_bad_data_is_named_before_airflow_starts(world: World, tmp_path: Path, spoil, message: str) -> None:
    data = shutil.copytree(world.data, tmp_path / "spoilt")
    spoil(data)
    ended = demo(data, tmp_path / "home")
    assert ended.code == EXIT_DATA
    assert message in ended.err and "Remedy:" in ended.err


def _met_items(world: World, user: int) -> set[str]:
    """Items that a user has met, whatever they are to the evaluation: held-out ones too."""
    rows = (line.split("\t") for line in (world.data / "planted.inter").read_text().splitlines()[1:])
    return {item for owner, item, _ in rows if int(owner) == user}
