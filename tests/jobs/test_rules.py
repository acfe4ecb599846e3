"""Rules of what may be shown, from a run's configuration to what a shop reads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from crane_core.config import Runtime
from crane_core.errors import EXIT_DATA, EXIT_OK
from crane_core.release.local_registry import read_registry
from crane_core.serving.model_folder import load_model
from crane_core.storage.artifacts import Artifact, ArtifactStore
from jobs import cli
from jobs.ml import evaluate, export, promote, register, report
from jobs.stores import open_store
from tests.worlds.release_runs import NUM_ITEMS, NUM_USERS, copy_registered, item_ids, make_run, ship, user_ids

RULES = (
    "export.rules={available: true, repeat_categories: [category-3], max_per_category: 2}",
    "export.rules.boosts={category: {category-1: 3}}",
)
HIDDEN = {f"item-{n}" for n in range(NUM_ITEMS) if n % 9 in (4, 5)}


def category(item: str) -> str:
    return f"category-{int(item.removeprefix('item-')) % 7}"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[ArtifactStore, list[str]]:
    """A store whose champion was made with rules, with its refit run."""
    folder = tmp_path_factory.mktemp("rules") / "store"
    copy_registered(folder, (), 0)
    argv = ship(make_run(folder, "run-1", settings=RULES), 0.3)
    for job in (register, promote, export, report):
        assert job.main(argv) == EXIT_OK
    return open_store(str(folder)), argv


@pytest.fixture
def ask(shop: tuple[ArtifactStore, list[str]], capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def answer(*words: str) -> dict[str, Any]:
        code = cli.main(["recommend", *words, "--store", shop[0].storage.uri, "--json"])
        return {"code": code, **json.loads(capsys.readouterr().out.splitlines()[-1])}

    return answer


def lists_of(exported: Artifact) -> dict[str, list[str]]:
    table = pq.read_table(exported.file("recommendations")).to_pandas()
    return table.groupby("user_id")["item_id"].apply(list).to_dict()


def had(store: ArtifactStore) -> dict[str, set[str]]:
    """Return what each user has, by the interactions of the shipped model."""
    rows = pq.read_table(store.artifact("run-1.refit", "etl.interactions").file("interactions")).to_pandas()
    found: dict[str, set[str]] = {}
    for user, item in zip(rows["user_idx"], rows["item_idx"], strict=True):
        found.setdefault(user_ids()[user], set()).add(item_ids()[item])
    return found


def test_the_export_obeys_and_counts_them(shop: tuple[ArtifactStore, list[str]]) -> None:
    store, _ = shop
    exported = store.artifact("run-1", "ml.export")
    lists, own = lists_of(exported), had(store)
    assert len(lists) == NUM_USERS
    again = 0
    for user, items in lists.items():
        assert HIDDEN.isdisjoint(items)
        assert max(Counter(map(category, items)).values()) <= 2
        bought = own[user].intersection(items)
        assert {category(item) for item in bought} <= {"category-3"}
        again += len(bought)
    assert again > 0
    facts = exported.facts
    counts = facts["rules"]["counts"]
    assert facts["rules"]["at"] == "2026-03-01T00:00:00+00:00"
    assert counts["left_out"] == {"sold_out": 10, "no_longer": 10} and counts["items_shown"] == NUM_ITEMS - 20
    assert counts["boosted"] == {"category": {"category-1": 13}} and counts["bought_again"] == 13
    assert counts["had"] == sum(category(item) != "category-3" for items in own.values() for item in items)
    assert counts["max_per_category"] > 0
    assert facts["num_short_lists"] == sum(len(items) < 10 for items in lists.values())
    popular = pq.read_table(exported.file("popular.parquet"))["item_id"].to_pylist()
    assert HIDDEN.isdisjoint(popular) and max(Counter(map(category, popular)).values()) == 2


def test_the_files_say_when_an_item_may_be_shown(shop: tuple[ArtifactStore, list[str]]) -> None:
    exported = shop[0].artifact("run-1", "ml.export")
    rows = pq.read_table(exported.file("eligibility.parquet")).to_pylist()
    assert {row["item_id"] for row in rows} == {f"item-{n}" for n in range(NUM_ITEMS) if n % 9 != 4}
    ends = {row["item_id"]: row["until"] for row in rows if row["until"]}
    assert {int(item[5:]) % 9 for item in ends} == {5} and {row["from"] for row in rows} == {None}
    assert {end.isoformat() for end in ends.values()} == {"2026-03-01T00:00:00+00:00"}
    items = pq.read_table(exported.file("items.parquet"))
    assert items.column_names == ["item_id", "title", "category", "in_stock", "available_until"]


def test_the_served_model_gives_the_exported_lists(shop: tuple[ArtifactStore, list[str]]) -> None:
    """It was tested against its probe when it was promoted, too."""
    store, _ = shop
    config = store.recorded_config("run-1")
    assert config is not None and config["export"]["rules"]["max_per_category"] == 2
    lists = lists_of(store.artifact("run-1", "ml.export"))
    models = [load_model(path.parent) for path in Path(store.storage.uri).rglob("model.json")]
    model = next(each for each in models if each.facts["run"] == "run-1.refit")
    told = model.predict(pd.DataFrame({"user_id": list(lists)}), {"k": 10})
    assert dict(zip(told["user_id"], told["item_ids"], strict=True)) == lists
    popular = pq.read_table(store.artifact("run-1", "ml.export").file("popular.parquet"))["item_id"].to_pylist()
    assert model.predict(pd.DataFrame({"user_id": ["nobody"]}), {"k": 10})["item_ids"][0] == popular


def test_the_evaluation_has_figures_with_and_without_them(shop: tuple[ArtifactStore, list[str]]) -> None:
    store, _ = shop
    metrics = json.loads(store.artifact("run-1", "ml.evaluate").file("metrics.json").read_text())
    without, ruled = (each["models"]["crane"]["recall@20"]["mean"] for each in (metrics, metrics["rules"]))
    gain = metrics["rules"]["differences"]["crane"]["recall@20"]["mean"]
    assert gain == pytest.approx(ruled - without) and gain < 0
    assert metrics["rules"]["counts"]["left_out"] == {"sold_out": 10, "no_longer": 10}
    # Two of each of seven categories: nobody can have a list of 50.
    assert metrics["rules"]["short_lists"] == metrics["users"]
    page = (Path(store.storage.uri) / "reports" / "run-1.html").read_text()
    assert "lists that obey export.rules" in page


def test_recommend_in_a_category(shop: tuple[ArtifactStore, list[str]], ask: Callable[..., dict[str, Any]]) -> None:
    store, _ = shop
    user, own = user_ids()[5], had(store)[user_ids()[5]]
    answer = ask("--user", user, "--category", "category-1", "-k", "50")
    found = [row["item_id"] for row in answer["items"]]
    everything = {f"item-{n}" for n in range(NUM_ITEMS) if n % 7 == 1}
    # All of the category that can be had and that the user does not have: the bound per category is for mixed lists.
    assert set(found) == everything - HIDDEN - own and answer["code"] == EXIT_OK
    scores = [row["score"] for row in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    mixed = [item for item in lists_of(store.artifact("run-1", "ml.export"))[user] if category(item) == "category-1"]
    assert mixed == found[: len(mixed)]
    # What is bought again is shown although it is had.
    again = ask("--user", user, "--category", "category-3", "-k", "50")
    assert {row["item_id"] for row in again["items"]} == {f"item-{n}" for n in range(NUM_ITEMS) if n % 7 == 3} - HIDDEN


def test_what_recommend_cannot_find_is_named(ask: Callable[..., dict[str, Any]]) -> None:
    wrong = ask("--user", user_ids()[0], "--category", "none")
    assert wrong["code"] == EXIT_DATA and "category 'none'" in wrong["found"] and "category-0" in wrong["remedy"]
    stranger = ask("--user", "nobody", "--category", "category-1")
    assert stranger["code"] == EXIT_DATA and "'nobody' has no recommendations" in stranger["found"]


def test_other_rules_make_another_version_and_no_other_training(tmp_path: Path) -> None:
    copy_registered(tmp_path / "store", (0.5,), 1)
    store = open_store(str(tmp_path / "store"))
    argv = [*make_run(tmp_path / "store", "run-2", settings=RULES)]
    assert register.main(argv) == EXIT_OK
    one, two = (store.entry(run, "ml.train")["content"] for run in ("run-1", "run-2"))  # type: ignore[index]
    assert one == two
    entries = [store.entry(run, "ml.register") for run in ("run-1", "run-2")]
    assert [entry and entry["version"] for entry in entries] == ["1", "2"]
    assert evaluate.main(argv) == EXIT_OK
    config = store.run("run-2")["config"]
    assert len(read_registry(Runtime(), store.storage.uri).versions()) == 2 and config["export"]["rules"]["available"]
