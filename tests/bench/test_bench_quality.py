"""The benchmark of quality: its checks can fail, its budget cuts, and no stale trial is served."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from crane_core.dataset.interactions import Interactions
from crane_core.errors import EXIT_CONFIG, EXIT_DATA, EXIT_OK, EXIT_UNEXPECTED
from crane_core.evaluation.baselines import item_knn, popularity
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import rank_users
from crane_core.evaluation.slices import interest_entropy, slices_of_test
from crane_core.experiments import models
from crane_core.experiments.data import Dataset
from crane_core.experiments.models import Recipe, Trained
from crane_core.experiments.search import as_yaml
from crane_core.training.share import SHARES
from tests.bench import bench_quality
from tests.worlds.planted import checkerboard, planted_modalities

COLD = (0, 8)


def plant(folder: Path, with_features: bool = True) -> Path:
    """The checkerboard as a folder; the training rows of two items are taken out, so that they are cold."""
    folder.mkdir()
    interactions = checkerboard()
    lines = ["userID\titemID\tx_label"]
    for label, lists in enumerate((interactions.train, interactions.validation, interactions.test)):
        pairs = zip(lists.users().tolist(), lists.items.tolist(), strict=True)
        lines += [f"{user}\t{item}\t{label}" for user, item in pairs if label or item not in COLD]
    (folder / "log.inter").write_text("\n".join(lines))
    if with_features:
        for modality in planted_modalities(noise=0.5):
            np.save(folder / f"{modality.name}_feat.npy", modality.items)
    return folder


def flags(folder: Path, *more: str) -> list[str]:
    words = ["--data", str(folder), "--work", str(folder.parent / "work"), "--seeds", "0", "1"]
    return [*words, *more]


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_result_holds_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = plant(tmp_path / "board")
    small = ("lightgcn.embedding_dim=8", "train.num_epochs=4", "train.batch_size=64", "refine.num_steps=5")
    settings = [word for setting in (*small, "refine.embedding_dim=8") for word in ("--set", setting)]
    models = ("crane", "lightgcn_softmax", "popularity", "item_knn")
    assert bench_quality.main(flags(folder, "--models", *models, *settings)) == EXIT_OK
    found = last_line(capsys)
    assert found["seeds"] == [0, 1] and found["missing"] == []
    assert set(found["models"]) == set(models) and set(found["differences"]) == set(models[1:])
    assert found["data"]["name"] == "board" and found["versions"]["code"] == bench_quality.VERSION
    assert found["recipe"]["train"]["num_epochs"] == 4 and "--seeds 0 1" in found["command"]
    # Popularity has no random choice: its mean is that of one ranking by hand.
    dataset = bench_quality.load_dataset(folder)
    log = dataset.interactions
    users = np.arange(40)
    expected = user_metrics(rank_users(popularity(log), log.train, users, 20), log.test, users, (20,))
    for name, values in expected.items():
        interval = found["models"]["popularity"][name]
        assert interval["mean"] == pytest.approx(values.mean())
        assert interval["low"] <= interval["mean"] <= interval["high"]
        difference = found["differences"]["popularity"][name]["mean"]
        assert difference == pytest.approx(found["models"]["crane"][name]["mean"] - values.mean())
    cold_users = np.flatnonzero(np.bincount(log.test.users()[np.isin(log.test.items, COLD)], minlength=40))
    for name, model in found["models"].items():
        assert [each["validation_recall@20"] for each in model["seeds"]] == model["validation"]
        assert np.mean([each["seconds"] for each in model["seeds"]]) == pytest.approx(model["seconds"])
        for each in model["seeds"]:
            assert (each["num_epochs"] == 4 and 0 <= each["best_epoch"] < 4) is (name in ("crane", "lightgcn_softmax"))
            assert (each["trust"] in SHARES) is (name == "crane")
    items = popular_by_hand(log)
    parts = slices_of_test(log, interest_entropy(dataset.joint(Recipe().features), log.train))
    assert set(found["slices"]) == set(parts)
    for name, lists in parts.items():
        asked = np.flatnonzero(lists.counts() > 0)
        assert found["slices"][name]["users"] == len(asked)
        if len(asked):
            for metric, values in user_metrics(items[asked], lists, asked, (20,)).items():
                assert found["slices"][name]["popularity"][metric] == pytest.approx(values.mean()), name
    assert {name for name, values in found["slices"].items() if values["users"]} > {"head_items", "tail_items"}
    cold = found["cold_items"]
    assert cold["rows"] == cold["users"] == len(cold_users) > 0
    chance = np.mean([20 / (32 - length) for length in log.train.counts()[cold_users]])
    assert cold["chance"] == pytest.approx(chance)
    assert cold["models"]["item_knn"]["mean"] <= 1
    assert cold["among_cold"]["chance"] == 1.0 and set(cold["among_cold"]["models"]) == set(models)
    # To who counts co-occurrences, two items without any are the same.
    auc = cold["cold_auc"]
    assert auc["users"] == len(cold_users) and set(auc["models"]) == set(models)
    assert auc["models"]["item_knn"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert all(0 <= found["low"] <= found["mean"] <= found["high"] <= 1 for found in auc["models"].values())


def popular_by_hand(log: Interactions) -> np.ndarray:
    return rank_users(popularity(log), log.train, np.arange(log.num_users), 20)


def test_what_earlier_cells_lack_is_left_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = plant(tmp_path / "board")
    command = flags(folder, "--models", "popularity", "item_knn")
    assert bench_quality.main(command) == EXIT_OK
    whole = last_line(capsys)
    for path in (tmp_path / "work").glob("*/cells/*/users.npz"):
        if json.loads(path.with_name("cell.json").read_text())["model"] == "item_knn":
            with np.load(path) as arrays:
                kept = {
                    name: values
                    for name, values in arrays.items()
                    if name.split("/")[0] in ("validation", "test", "cold") and name != "cold/among_cold_recall@20"
                }
            np.savez(path, **kept)
    assert bench_quality.main(command) == EXIT_OK
    found = last_line(capsys)
    assert found["slices"]["head_items"]["item_knn"] is None
    assert found["slices"]["head_items"]["popularity"] == whole["slices"]["head_items"]["popularity"]
    assert found["slices"]["active_users"] == whole["slices"]["active_users"]
    assert set(found["cold_items"]["among_cold"]["models"]) == {"popularity"}
    assert found["models"] == whole["models"]


def test_the_recipe_of_a_search_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = plant(tmp_path / "board")
    (tmp_path / "best.yaml").write_text(as_yaml(Recipe(freedom={"k": 3}), "freedom"))
    command = flags(folder, "--models", "popularity", "--config", str(tmp_path / "best.yaml"), "--set", "knn.k=4")
    assert bench_quality.main(command) == EXIT_OK
    recipe = last_line(capsys)["recipe"]
    assert (recipe["freedom"]["k"], recipe["knn"]["k"]) == (3, 4)
    for text in ("[", "no mapping"):
        (tmp_path / "best.yaml").write_text(text)
        assert bench_quality.main(command) == EXIT_CONFIG
    assert bench_quality.main([*command, "--config", str(tmp_path / "absent")]) == EXIT_CONFIG


def test_a_finished_cell_is_found_and_a_stale_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = plant(tmp_path / "board"), []

    def train(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
        made.append(recipe.train.seed)
        return Trained(item_knn(dataset.interactions), 0.5, 1.5)

    monkeypatch.setitem(bench_quality.MODELS, "item_knn", train)
    again = flags(folder, "--models", "item_knn")
    assert bench_quality.main(again) == EXIT_OK
    first = last_line(capsys)
    assert bench_quality.main(again) == EXIT_OK
    assert last_line(capsys) == first and made == [0, 1]
    assert first["models"]["item_knn"]["seconds"] == 1.5
    bench_quality.main([*again, "--set", "knn.k=3"])
    assert made == [0, 1] * 2
    with (folder / "log.inter").open("a") as log:
        log.write("\n0\t31\t0")
    bench_quality.main(again)
    assert made == [0, 1] * 3
    monkeypatch.setattr(models, "VERSION", models.VERSION + 1)
    bench_quality.main(again)
    assert made == [0, 1] * 4


def test_the_budget_cuts_and_the_next_run_goes_on(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = plant(tmp_path / "board")

    def slow(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
        """Needs two attempts for seed 1, and finds what it left."""
        work.mkdir(parents=True, exist_ok=True)
        if recipe.train.seed == 1 and not (work / "checkpoint").exists():
            (work / "checkpoint").touch()
            time.sleep(60)
        return Trained(popularity(dataset.interactions), 0.0, 1.0)

    monkeypatch.setitem(bench_quality.MODELS, "lightgcn", slow)
    command = flags(folder, "--models", "popularity", "lightgcn", "--budget-minutes", "0.02")
    started = time.monotonic()
    assert bench_quality.main(command) == EXIT_OK
    assert time.monotonic() - started < 20
    found = last_line(capsys)
    assert found["seeds"] == [0] and found["missing"] == ["lightgcn seed 1"]
    assert "missing: lightgcn seed 1" in caplog.text
    assert bench_quality.main(command) == EXIT_OK
    assert last_line(capsys)["seeds"] == [0, 1]


def test_nothing_comparable_is_a_failure_without_a_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = plant(tmp_path / "board")
    assert bench_quality.main(flags(folder, "--models", "lightgcn", "--budget-minutes", "1e-6")) == EXIT_UNEXPECTED
    assert capsys.readouterr().out == ""
    assert "no seed is complete for all of lightgcn" in caplog.text


def test_features_are_asked_for_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = plant(tmp_path / "bare", with_features=False)
    assert bench_quality.main(flags(folder, "--models", "popularity", "crane")) == EXIT_DATA
    assert "DataError" in caplog.text and not (tmp_path / "work").exists()
    assert bench_quality.main(flags(folder, "--models", "popularity", "item_knn")) == EXIT_OK
    assert last_line(capsys)["differences"] == {}


def test_a_folder_without_a_test_row_is_a_data_error(tmp_path: Path) -> None:
    folder = plant(tmp_path / "board")
    rows = (folder / "log.inter").read_text().splitlines()
    (folder / "log.inter").write_text("\n".join(row for row in rows if not row.endswith("\t2")))
    assert bench_quality.main(flags(folder, "--models", "popularity")) == EXIT_DATA


@pytest.mark.parametrize("setting", ["train", "train.colour=1", "train.num_epochs=0", "etl.k_core=2"])
def test_a_wrong_setting_is_a_config_error(tmp_path: Path, setting: str) -> None:
    assert bench_quality.main(flags(plant(tmp_path / "board"), "--set", setting)) == EXIT_CONFIG


@pytest.mark.parametrize(
    "wrong", [("--num-threads", "0"), ("--budget-minutes", "0"), ("--seeds", "-1"), ("--modalities", "m0", "m0")]
)
def test_a_wrong_flag_is_a_config_error(tmp_path: Path, wrong: tuple[str, ...]) -> None:
    assert bench_quality.main(flags(plant(tmp_path / "board"), "--models", "popularity", *wrong)) == EXIT_CONFIG


def test_a_wrong_measure_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_quality.check_measure(checkerboard()) == []

    def shifted(interactions: Interactions) -> object:
        score = popularity(interactions)
        return lambda users: score(users).roll(1, dims=1)

    monkeypatch.setattr(bench_quality, "popularity", shifted)
    assert len(bench_quality.check_measure(checkerboard())) == 2
    command = flags(plant(tmp_path / "board"), "--models", "popularity")
    assert bench_quality.main(command) == EXIT_UNEXPECTED
