"""The experiments: what is planned, what is found again, what a kill costs, what the page and the search say."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml

from crane_core.config import Phi, load_config
from crane_core.dataset.interactions import ItemLists
from crane_core.errors import EXIT_CONFIG, EXIT_DATA, ArtifactError, ConfigError, DataError, TrainingError
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import rank_users
from crane_core.experiments import models as harness
from crane_core.experiments import trials as cells_module
from crane_core.experiments.cost import Measurements, SameWeights, catalog_sizes, fit_power_law, measure_growth
from crane_core.experiments.data import Dataset, load_dataset
from crane_core.experiments.models import MODELS, Recipe, Trained, train_crane
from crane_core.experiments.plans import NAMES, changed, load_recipe, plan
from crane_core.experiments.report import render
from crane_core.experiments.search import SPACES, Search, as_yaml
from crane_core.experiments.study import Budget, Study, chosen
from crane_core.experiments.summary import Measured, answer, by_diversity, finite, rows
from crane_core.experiments.trials import Cell, Cells, PeakMemory
from jobs import cli
from tests.worlds.planted import checkerboard

FAST = ["refine.num_steps=2", "refine.embedding_dim=8", "train.num_epochs=2", "train.embedding_dim=8"]
RECIPE = load_recipe(None, FAST)
NO_BOUND = Budget(None)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def dataset() -> Dataset:
    """Features that tell the groups apart in one modality and nothing in the other."""
    interactions = checkerboard()
    generator = np.random.default_rng(0)
    groups = np.arange(interactions.num_items) // 8
    telling = np.eye(4, 6)[groups] + 0.1 * generator.normal(size=(interactions.num_items, 6))
    features = {"telling": telling, "noise": generator.normal(size=(interactions.num_items, 5))}
    return Dataset("board", interactions, {name: matrix.astype(np.float32) for name, matrix in features.items()})


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Dataset, Recipe]]:
    """The trainings that were done, by a model that ranks at random by its seed and learns nothing."""
    done: list[tuple[Dataset, Recipe]] = []

    def train(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
        done.append((dataset, recipe))
        return Trained(random_scores(dataset, recipe.train.seed), 0.5, 1.25, {"content_seconds": 0.25})

    monkeypatch.setitem(cells_module.MODELS, "crane", train)
    return done


def random_scores(dataset: Dataset, seed: int) -> Callable[[np.ndarray], torch.Tensor]:
    interactions = dataset.interactions
    shape = (interactions.num_users, interactions.num_items)
    scores = torch.from_numpy(np.random.default_rng(seed).random(shape, dtype=np.float32))
    return lambda users: scores[torch.from_numpy(users.astype(np.int64))].clone()


def study(
    dataset: Dataset, folder: Path, recipe: Recipe = RECIPE, seeds: tuple[int, ...] = (0,), **changes: Any
) -> Study:
    settings: dict[str, Any] = {"budget": NO_BOUND, "show": lambda *_: None} | changes
    return Study(dataset, recipe, seeds, Cells(folder), **settings)


class TestPlans:
    def test_each_experiment_holds_the_recipe_itself_once(self) -> None:
        experiments = plan(RECIPE, ["a", "b"])
        assert tuple(experiments) == NAMES
        for experiment in experiments.values():
            defaults = [variant for variant in experiment.variants if changed(RECIPE, variant.changes) == RECIPE]
            assert len(defaults) == (0 if experiment.name == "cost" else 1), experiment.name
            labels = [variant.label for variant in experiment.variants]
            assert len(set(labels)) == len(labels), experiment.name

    def test_what_is_varied(self) -> None:
        experiments = plan(RECIPE, ["a", "b"])

        def values(name: str, field: str) -> list[Any]:
            return [variant.changes.get(field) for variant in experiments[name].variants]

        assert values("training", "train.mode") == ["staged", "joint", "joint"]
        assert values("training", "train.joint_start") == [None, "fitted", "scratch"]
        assert values("rca", "refine.num_recursions") == [0, 1, 2, 3, 4, 5]
        assert values("neighbours", "knn.k") == [5, 10, 15, 20]
        assert values("profiles", "profiles.aggregate") == ["sum", "mean"]
        assert values("phi", "refine.phi") == list(get_args(Phi))
        assert values("modalities", "features.modalities") == [None, ("a",), ("b",)]
        assert {*values("contrast", "train.contrast_weight")} == {None, 0.0, 1e-4, 1e-2, 1e-1}

    def test_another_default_joins_the_grid(self) -> None:
        recipe = load_recipe(None, ["knn.k=7", "train.contrast_weight=0.05"])
        experiments = plan(recipe, ["a"])
        assert [variant.label for variant in experiments["neighbours"].variants][:3] == ["k = 5", "k = 7", "k = 10"]
        assert experiments["contrast"].variants[0].label.startswith("β = 0.05")
        assert len(experiments["modalities"].variants) == 1

    def test_unknown_names_and_sections_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"'phy'.*training, rca, neighbours.*search"):
            chosen(["phy"])
        with pytest.raises(ConfigError, match="no section 'export'"):
            load_recipe(None, ["export.k=3"])
        with pytest.raises(ConfigError, match=r"knn\.k"):
            load_recipe(None, ["knn.k=0"])
        assert chosen(["search", "rca"]) == ["rca", "search"]
        assert "search" not in chosen(None)

    def test_a_preset_is_a_recipe(self) -> None:
        assert load_recipe("paper", []).train.semantic_items == "content"


class TestCells:
    def test_it_is_made_once_and_found_again(self, dataset: Dataset, tmp_path: Path, trainings: list) -> None:
        made = Cells(tmp_path).cell(dataset, "crane", RECIPE, 3)
        found = Cells(tmp_path).cell(dataset, "crane", RECIPE, 3)
        assert len(trainings) == 1 and trainings[0][1] == RECIPE.with_seed(3)
        assert found.key == made.key and (found.seconds, found.facts) == (1.25, {"content_seconds": 0.25})
        assert found.steering == 0.5
        assert list(found.test) == ["users", *(f"{kind}@{k}" for k in (5, 10, 20, 50) for kind in ("recall", "ndcg"))]
        assert np.array_equal(found.test["users"], np.arange(40))
        for name, values in made.test.items():
            assert np.array_equal(values, found.test[name])
        assert len(made.cold["users"]) == len(made.cold["cold_auc"]) == 0
        assert sorted(made.more) == ["head_items", "tail_items"] and made.part("alone") is None
        assert not list((tmp_path / "work").glob("[!.]*"))

    def test_cold_items_are_measured_apart(self, dataset: Dataset, tmp_path: Path, trainings: list) -> None:
        interactions = dataset.interactions
        train = interactions.train.where(~np.isin(interactions.train.items, (0, 1, 2)))
        colder = replace(dataset, interactions=replace(interactions, train=train))
        made = Cells(tmp_path).cell(colder, "crane", RECIPE, 3)
        users = np.flatnonzero([np.isin(interactions.test.rows(np.array([u]))[1], (0, 1, 2)).any() for u in range(40)])
        assert np.array_equal(made.cold["users"], users) and len(users) > 0
        scores, tests = random_scores(colder, 3)(np.arange(40)), interactions.test.items
        assert (made.cold["among_cold_recall@20"] == 1).all(), "there are three"
        for user, auc, recall in zip(users, made.cold["cold_auc"], made.cold["recall@20"], strict=True):
            own = scores[user, tests[user]]
            assert auc == np.mean([float(own > scores[user, other]) for other in {0, 1, 2} - {tests[user]}])
            assert recall == made.test["recall@20"][user], "the only item of the user's test is cold"

    def test_nothing_stale_is_served(self, dataset: Dataset, tmp_path: Path, trainings: list, monkeypatch) -> None:
        cells = Cells(tmp_path)
        cells.cell(dataset, "crane", RECIPE, 0)
        features = dataset.features | {"noise": dataset.features["noise"] + np.float32(1e-6)}
        interactions = dataset.interactions
        dropped = interactions.train.where(np.arange(len(interactions.train.items)) > 0)
        others: list[tuple[Dataset, str, Recipe, int]] = [
            (replace(dataset, features=features), "crane", RECIPE, 0),
            (
                replace(dataset, features={"renamed" if n == "noise" else n: m for n, m in dataset.features.items()}),
                "crane",
                RECIPE,
                0,
            ),
            (replace(dataset, interactions=replace(interactions, train=dropped)), "crane", RECIPE, 0),
            (dataset.without_test(), "crane", RECIPE, 0),
            (dataset, "crane", changed(RECIPE, {"knn.k": 11}), 0),
            (dataset, "crane", RECIPE, 1),
            (dataset, "lightgcn", RECIPE, 0),
        ]
        for other in others:
            assert cells.find(*other) is None
        assert cells.find(replace(dataset, name="moved"), "crane", RECIPE, 0), "the name is no content"
        monkeypatch.setattr(harness, "VERSION", harness.VERSION + 1)
        assert cells.find(dataset, "crane", RECIPE, 0) is None

    def test_a_contrast_of_both_kinds_has_a_version_of_its_own(self, dataset, tmp_path, monkeypatch) -> None:
        both, cells = changed(RECIPE, {"train.contrast_negatives": "both_kinds"}), Cells(tmp_path)
        now = [cells.key(dataset, "crane", recipe, 0) for recipe in (RECIPE, both)]
        monkeypatch.setattr(cells_module, "version_of", lambda _: harness.VERSION)
        before = [cells.key(dataset, "crane", recipe, 0) for recipe in (RECIPE, both)]
        assert now[0] == before[0] and now[1] != before[1]

    @pytest.mark.parametrize("name", ["users.npz", "cell.json"])
    def test_a_damaged_cell_is_named_and_made_again(
        self, dataset: Dataset, tmp_path: Path, trainings: list, caplog, name: str
    ) -> None:
        cells = Cells(tmp_path)
        cell = cells.cell(dataset, "crane", RECIPE, 0)
        path = tmp_path / "cells" / cell.key / name
        whole = path.read_bytes()
        middle = len(whole) // 2
        for number, damaged in enumerate((b"", whole[:100], whole[:middle] + bytes(64) + whole[middle + 64 :], b"[]")):
            path.write_bytes(damaged)
            caplog.clear()
            assert cells.find(dataset, "crane", RECIPE, 0) is None
            assert f"damaged cell={path.parent}" in caplog.text
            again = cells.cell(dataset, "crane", RECIPE, 0)
            assert len(trainings) == 2 + number and np.array_equal(again.test["recall@20"], cell.test["recall@20"])

    def test_an_unknown_model_is_refused(self, dataset: Dataset, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="crane, crane_joint, lightgcn"):
            Cells(tmp_path).cell(dataset, "oracle", RECIPE, 0)

    def test_view_and_content_are_made_once(self, dataset: Dataset, tmp_path: Path, monkeypatch) -> None:
        epochs: list[str] = []
        whole = harness.Trainer._train_epoch
        monkeypatch.setattr(
            harness.Trainer, "_train_epoch", lambda self: epochs.append(type(self.model).__name__) or whole(self)
        )
        prepared: list[Recipe] = []
        prepare = harness.prepare_content
        monkeypatch.setattr(harness, "prepare_content", lambda d, recipe: prepared.append(recipe) or prepare(d, recipe))
        cells = Cells(tmp_path)
        first = cells.cell(dataset, "crane", RECIPE, 0)
        assert len(prepared) == 1
        cells.cell(dataset, "crane", changed(RECIPE, {"train.contrast_weight": 0.1}), 0)
        assert len(prepared) == 1, "the content does not depend on the training"
        cells.cell(dataset.without_test(), "lightgcn", RECIPE, 0)
        assert epochs == ["LightGCN"] * 2 + ["Crane"] * 4
        cells.cell(dataset, "crane", changed(RECIPE, {"train.learning_rate": 0.1, "knn.k": 3}), 0)
        assert len(prepared) == 2
        assert epochs[6:] == ["LightGCN"] * 2 + ["Crane"] * 2
        alone = train_crane(dataset, RECIPE.with_seed(0), tmp_path / "elsewhere" / "work")
        assert alone.validation == first.steering, "found or made, they are the same bit for bit"

    def test_memory_is_that_of_the_work(self) -> None:
        before = PeakMemory()
        held = np.ones(40_000_000, dtype=np.uint8)
        del held
        assert before.peak() >= 35_000_000
        assert PeakMemory().peak() < 20_000_000


KILLED = """
import os, signal, sys
from pathlib import Path
from crane_core.experiments import models as harness
from jobs import cli

whole, left = harness.Trainer._train_epoch, [int(sys.argv[1])]

def train_epoch(self):
    whole(self)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

harness.Trainer._train_epoch = train_epoch
sys.exit(cli.main(sys.argv[2:]))
"""


HOLDING = """
import sys, time
from pathlib import Path
from crane_core.experiments.data import held

with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path, dataset: Dataset) -> Path:
    """The dataset as a folder in MMRec layout."""
    target = tmp_path / "board"
    target.mkdir()
    interactions = dataset.interactions
    lines = ["userID\titemID\tx_label"]
    for label, split in enumerate((interactions.train, interactions.validation, interactions.test)):
        lines += [f"{user}\t{item}\t{label}" for user, item in zip(split.users(), split.items, strict=True)]
    (target / "board.inter").write_text("\n".join(lines) + "\n")
    for name, matrix in dataset.features.items():
        np.save(target / f"{name}_feat.npy", matrix)
    return target


def flags(folder: Path, out: Path, *more: str) -> list[str]:
    settings = [part for value in FAST for part in ("--set", value)]
    return ["experiments", "--data", str(folder), "--out", str(out), "--json", *settings, *more]


class TestCommand:
    @pytest.mark.slow
    def test_killed_between_epochs_and_cells_it_goes_on(self, folder: Path, tmp_path: Path, capsys) -> None:
        only = ["--only", "profiles", "--seeds", "0", "1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for epochs in (3, 2):
            argv = [sys.executable, "-c", KILLED, str(epochs), *flags(folder, tmp_path / "killed", *only)]
            ended = subprocess.run(argv, env=environment, capture_output=True)
            assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        assert len(list((tmp_path / "killed" / "cells").glob("[!.]*"))) == 1
        for out in ("killed", "whole"):
            assert cli.main(flags(folder, tmp_path / out, *only)) == 0
        lines = capsys.readouterr()
        killed, whole = map(json.loads, lines.out.splitlines())
        assert "found=1 to_make=1" in lines.err, "the cell that was done is found"
        assert whole["complete"] and killed["complete"]
        assert killed["experiments"] == whole["experiments"], "bit for bit what an undisturbed run finds"

    @pytest.mark.slow
    def test_the_page_and_the_last_line(self, folder: Path, tmp_path: Path) -> None:
        argv = [
            sys.executable,
            "-m",
            "jobs.cli",
            *flags(folder, tmp_path / "out", "--only", "modalities", "--seeds", "0"),
        ]
        ended = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert ended.returncode == 0, ended.stderr
        (line,) = ended.stdout.splitlines()
        result = json.loads(line)
        page = Path(result["report"]).read_text()
        assert result["experiments"]["modalities"]["answer"] in page
        assert "all: noise + telling" in page and "<svg" in page
        assert not re.search(r'(src|href)="(?!#)|url\(http|@import', page), "it loads nothing"
        assert "left=" in ended.stderr and "validation_recall@20=" in ended.stderr
        results = json.loads(Path(result["results"]).read_text())
        table = results["experiments"]["modalities"]["table"]
        assert [row["label"] for row in table] == ["all: noise + telling", "noise", "telling"]
        curves = results["experiments"]["modalities"]["curves"]
        assert [len(curves[row["label"]]) for row in table] == [2, 2, 2], "an entry for each epoch"
        assert "Gradient norm: contrast" in page and "Effective rank" in page
        assert set(table[1]["profile_spread"]) == {"noise"}
        assert table[0]["difference"] is None and table[1]["difference"]["recall@20"]["low"] <= 0

    def test_without_a_budget_left_the_page_says_what_is_missing(self, folder: Path, tmp_path: Path, capsys) -> None:
        argv = flags(folder, tmp_path / "out", "--budget-minutes", "0", "--only", "neighbours", "cost", "search")
        assert cli.main(argv) == 0
        result = json.loads(capsys.readouterr().out)
        assert not result["complete"] and len(result["missing"]) == 12 + len(get_args(Phi)) + 4
        page = Path(result["report"]).read_text()
        assert "No answer yet: 0 of 4 variants are measured." in page
        assert "neighbours: k = 5, seed 2" in page and "search: 30 of 30 trials" in page

    def test_problems_end_with_their_code(self, folder: Path, tmp_path: Path, capsys) -> None:
        assert cli.main(flags(folder, tmp_path / "out", "--only", "rca", "phy")) == EXIT_CONFIG
        assert "modalities, search" in json.loads(capsys.readouterr().out)["remedy"]
        for path in folder.glob("*_feat.npy"):
            path.unlink()
        assert cli.main(flags(folder, tmp_path / "out")) == EXIT_DATA
        assert "no item features" in json.loads(capsys.readouterr().out)["message"]

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--seeds", "0", "-1"), "-1 is no seed"),
            (("--seeds", str(2**31)), "is no seed"),
            (("--set", "train.seed=-1"), "train.seed"),
            (("--threads", "0"), "--threads 0"),
            (("--set", "features.modalities=[noise, telling, noise]"), "names noise more than once"),
        ],
        ids=str,
    )
    def test_a_wrong_flag_is_a_config_error(self, folder: Path, tmp_path: Path, capsys, more, said: str) -> None:
        assert cli.main(flags(folder, tmp_path / "out", *more)) == EXIT_CONFIG
        assert said in json.loads(capsys.readouterr().out)["message"]
        assert not list(tmp_path.glob("out/cells/*"))

    @pytest.mark.parametrize("below", ["", "out"])
    def test_a_file_is_no_folder_for_results(self, folder: Path, tmp_path: Path, capsys, below: str) -> None:
        (tmp_path / "taken").write_text("mine")
        assert cli.main(flags(folder, tmp_path / "taken" / below)) == EXIT_CONFIG
        assert str(tmp_path / "taken") in json.loads(capsys.readouterr().out)["message"]
        assert (tmp_path / "taken").read_text() == "mine"


class TestStudy:
    def test_shared_cells_are_trained_once_and_the_first_seed_first(
        self, dataset: Dataset, tmp_path: Path, trainings: list
    ) -> None:
        names = ["rca", "neighbours", "profiles", "modalities"]
        study(dataset, tmp_path, seeds=(0, 1)).run(names, 0)
        assert len(trainings) == 2 * (1 + 5 + 3 + 1 + 2)
        assert [recipe.train.seed for _, recipe in trainings] == [0] * 12 + [1] * 12
        assert trainings[0][1] == RECIPE.with_seed(0), "the default first"

    def test_what_needs_no_training_is_measured_after_the_first_seed(
        self, dataset, tmp_path, trainings, monkeypatch
    ) -> None:
        monkeypatch.setattr("crane_core.experiments.study.catalog_sizes", lambda _: [64])
        said: list[str] = []
        study(dataset, tmp_path, seeds=(0, 1), show=lambda what, _: said.append(what)).run(["profiles", "cost"], 0)
        assert said == ["cells"] * 3 + ["cost"] * len(get_args(Phi)) + ["cells"] * 3

    def test_a_budget_that_ends_leaves_the_rest(self, dataset: Dataset, tmp_path: Path, trainings: list) -> None:
        class Two(Budget):
            def allows(self, seconds: float) -> bool:
                return len(trainings) < 2

        results = study(dataset, tmp_path, budget=Two(None)).run(["neighbours"], 0)
        found = results["experiments"]["neighbours"]
        assert results["missing"] == ["neighbours: k = 15, seed 0", "neighbours: k = 20, seed 0"]
        assert "2 of 4 variants are not measured yet" in found["answer"]
        assert "not measured" in render(results | {"seconds": 1.0})

    def test_features_and_seeds_are_needed(self, dataset: Dataset, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no item features"):
            study(replace(dataset, features={}), tmp_path)
        with pytest.raises(DataError, match="no features audio"):
            study(dataset, tmp_path, changed(RECIPE, {"features.modalities": ("audio",)}))
        with pytest.raises(ConfigError, match="No seed"):
            study(dataset, tmp_path, seeds=())

    @pytest.mark.slow
    def test_forms_and_growth_are_measured_once(self, dataset: Dataset, tmp_path: Path, trainings, monkeypatch) -> None:
        sizes = [64, 128, 256]
        monkeypatch.setattr("crane_core.experiments.study.catalog_sizes", lambda _: sizes)
        monkeypatch.setattr("crane_core.experiments.cost.os.getloadavg", lambda: (7.5, 1.0, 1.0))
        monkeypatch.setattr("crane_core.experiments.cost.os.cpu_count", lambda: 2)
        first = study(dataset, tmp_path).run(["phi", "cost"], 0)
        again = study(dataset, tmp_path).run(["phi", "cost"], 0)
        assert first == again and first["missing"] == []
        growth, forms = first["experiments"]["cost"], first["experiments"]["phi"]["forms"]
        for phi in get_args(Phi):
            assert [point["items"] for point in growth["points"][phi]] == sizes
            assert growth["laws"][phi]["seconds"]["exponent"] == pytest.approx(
                fit_power_law(sizes, [point["seconds"] for point in growth["points"][phi]]).exponent
            )
        assert growth["answer"].startswith("Time grows for softmax as items^")
        assert [form["phi"] for form in forms] == list(get_args(Phi))
        page = render(first | {"seconds": 1.0})
        assert growth["answer"] in page and "Exponent of time" in page and "softmax in float64" in page
        assert page.count("load 7.5 on 2 cores") == 2

    @pytest.mark.parametrize("damaged", [b"", b"{", b"[1]", b"{}", b"\xff"])
    def test_a_damaged_measurement_is_named_and_taken_again(self, tmp_path: Path, caplog, damaged: bytes) -> None:
        measurements = Measurements(Cells(tmp_path))
        first = measurements.take(lambda: {"seconds": 1.0}, "x")
        (path,) = tmp_path.glob("measurements/*.json")
        path.write_bytes(damaged)
        assert measurements.find("x") is None and f"damaged measurement={path}" in caplog.text
        assert measurements.take(lambda: {"seconds": 2.0}, "x")["seconds"] == 2.0
        assert measurements.find("x")["cores"] == first["cores"]


class TestCost:
    @pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
    def test_a_known_power_law(self, exponent: float) -> None:
        sizes = [1000, 2000, 4000, 8000]
        law = fit_power_law(sizes, [3e-6 * size**exponent for size in sizes])
        assert law is not None
        assert law.exponent == pytest.approx(exponent) and law.constant == pytest.approx(3e-6)
        assert law.r_squared == pytest.approx(1)

    def test_noise_shows_in_the_fit_and_too_little_is_none(self) -> None:
        generator = np.random.default_rng(0)
        sizes = np.geomspace(1000, 64000, 7)
        law = fit_power_law(sizes, sizes**1.5 * np.exp(0.2 * generator.normal(size=7)))
        assert law is not None and law.exponent == pytest.approx(1.5, abs=0.15) and 0.9 < law.r_squared < 1
        assert fit_power_law([1, 2, 4], [1.0, 0.0, 2.0]) is None

    def test_sizes_reach_beyond_the_catalog(self) -> None:
        assert catalog_sizes(7050) == [1024, 2048, 4096, 8192, 16384, 32768]
        assert catalog_sizes(10) == [1024, 2048, 4096, 8192, 16384]

    def test_linear_takes_less_than_softmax(self) -> None:
        linear, softmax = (measure_growth(phi, 3000, 2, RECIPE)["seconds"] for phi in ("linear", "softmax"))
        assert linear < softmax

    def test_exact_forms_err_by_rounding_alone(self, dataset: Dataset) -> None:
        weights = SameWeights(dataset, RECIPE)
        for phi in ("softmax", "tanh", "linear"):
            found = weights.measure(phi)
            assert found["against"] == phi and found["error"] < 1e-4 and found["rows"] == 72

    def test_a_form_that_forgets_shows_its_error(self, dataset: Dataset, monkeypatch) -> None:
        weights = SameWeights(dataset, RECIPE)
        monkeypatch.setattr("crane_core.experiments.cost.EXACT", ("softmax",))
        found = weights.measure("linear")
        assert found["against"] == "softmax" and found["error"] > 0.01


def cell(test: np.ndarray, validation: float = 0.5) -> Cell:
    """A cell with one test metric per user."""

    def table(values: np.ndarray) -> dict[str, np.ndarray]:
        return {"users": np.arange(len(values)), "recall@20": values, "ndcg@20": values / 2}

    return Cell("", table(np.full(10, validation)), table(test), table(np.empty(0)), validation, 1.0, 1, {})


class TestAnswers:
    def test_crane_alone_stands_beside_the_fused_model(self, dataset: Dataset, tmp_path: Path, monkeypatch) -> None:
        def train(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
            seed = recipe.train.seed
            return Trained(random_scores(dataset, seed), 0.5, 1.0, {}, random_scores(dataset, 10 + seed))

        monkeypatch.setitem(cells_module.MODELS, "crane", train)
        results = study(dataset, tmp_path, seeds=(0, 1)).run(["profiles"], 0)
        row = results["experiments"]["profiles"]["table"][0]
        users, expected = np.arange(40), []
        for seed in (10, 11):
            ranked = rank_users(random_scores(dataset, seed), dataset.interactions.train, users, 20)
            expected.append(user_metrics(ranked, dataset.interactions.test, users, (20,))["ndcg@20"].mean())
        assert row["test_alone"]["ndcg@20"]["mean"] == pytest.approx(np.mean(expected))
        assert f"{np.mean(expected):.4f}" in render(results | {"seconds": 1.0})
        for path in tmp_path.glob("cells/*/users.npz"):
            with np.load(path) as arrays:
                kept = {name: values for name, values in arrays.items() if not name.startswith("alone")}
            np.savez(path, **kept)
        earlier = study(dataset, tmp_path, seeds=(0, 1)).run(["profiles"], 0)
        assert earlier["experiments"]["profiles"]["table"][0] == row | {"test_alone": None}
        assert f"{np.mean(expected):.4f}" not in render(earlier | {"seconds": 1.0})

    def test_means_over_seeds_and_paired_differences(self) -> None:
        base = np.random.default_rng(0).random(200)
        default = Measured("d", True, {0: cell(base), 1: cell(base + 0.2)}, [])
        better = Measured("b", False, {0: cell(base + 0.1, 0.6), 1: cell(base + 0.3, 0.6)}, [])
        table = rows([default, better])
        assert table[0]["test"]["recall@20"]["mean"] == pytest.approx(base.mean() + 0.1)
        assert table[0]["by_seed"] == pytest.approx([base.mean(), base.mean() + 0.2])
        gain = table[1]["difference"]["recall@20"]
        assert (gain["mean"], gain["low"], gain["high"]) == pytest.approx((0.1, 0.1, 0.1))
        assert answer(table) == (
            "Validation prefers b (+0.1000 Recall@20 against the default); on test it differs by +0.1000 [+0.1000, "
            "+0.1000], better by more than chance. By more than chance in test Recall@20, better than the default: b."
        )

    def test_a_difference_is_over_shared_seeds(self) -> None:
        base = np.full(50, 0.5)
        default = Measured("d", True, {0: cell(base), 1: cell(base + 0.4)}, [])
        partial = Measured("p", False, {0: cell(base - 0.1)}, [1])
        table = rows([default, partial])
        assert table[1]["difference"]["recall@20"]["mean"] == pytest.approx(-0.1)
        assert table[1]["missing"] == [1] and "worse than the default: p" in answer(table)

    def test_chance_is_said_to_be_chance(self) -> None:
        generator = np.random.default_rng(0)
        variants = [Measured(str(i), i == 0, {0: cell(generator.random(300), 0.5)}, []) for i in range(3)]
        text = answer(rows(variants))
        assert text == (
            "Validation prefers the default, 0. No variant differs from the default by more than chance in test "
            "Recall@20. Chance is that of the users alone: one seed says nothing of that of training."
        )

    def test_without_the_default_there_is_no_answer(self) -> None:
        table = rows([Measured("d", True, {}, [0]), Measured("b", False, {0: cell(np.ones(5))}, [])])
        assert answer(table) == "No answer yet: 1 of 2 variants are measured." and table[1]["difference"] is None

    def test_thirds_by_diversity(self) -> None:
        entropy = np.array([0.0, 0.1, 0.5, 0.6, 1.0, 1.1, np.nan])
        default = Measured("sum", True, {0: cell(np.zeros(7))}, [])
        mean = Measured("mean", False, {0: cell(np.array([0, 0, 0, 0, 1.0, 1.0, 1.0]))}, [])
        table = by_diversity([default, mean], entropy, np.arange(7))
        assert [third["users"] for third in table] == [2, 2, 2]
        assert [third["differences"]["mean"]["recall@20"]["mean"] for third in table] == [0, 0, 1]
        assert [third["median_items"] for third in table] == [0.5, 2.5, 4.5]

    def test_json_has_no_nan(self) -> None:
        assert finite({"a": [float("nan"), 1.0, (float("inf"),)]}) == {"a": [None, 1.0, [None]]}


class TestSearch:
    @pytest.fixture
    def landscape(self, monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
        """A model whose validation recall depends on `knn.k` alone; it diverges at a large edge dropout."""
        done: list[Recipe] = []

        def train(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
            done.append(recipe)
            if recipe.train.edge_dropout > 0.3:
                raise TrainingError("The loss is not finite.", "Lower it.")
            held_out = dataset.interactions.validation
            num_users = round(held_out.num_users * recipe.knn.k / 20)

            def score(users: np.ndarray) -> torch.Tensor:
                scores = torch.zeros(len(users), dataset.interactions.num_items)
                positions, items = held_out.rows(users)
                served = users[positions] < num_users
                sign = torch.from_numpy(np.where(served, 1.0, -1.0).astype(np.float32))
                scores[torch.from_numpy(positions), torch.from_numpy(items.astype(np.int64))] = sign
                return scores

            return Trained(score, 0.0, 1.0)

        monkeypatch.setitem(cells_module.MODELS, "crane", train)
        return done

    def test_the_first_trial_is_the_recipe_and_the_best_is_found(self, dataset, tmp_path, landscape) -> None:
        search = Search(dataset, RECIPE, 0, Cells(tmp_path))
        search.run(12, NO_BOUND.allows, lambda _: None)
        assert landscape[0] == RECIPE.with_seed(0)
        trials = search.record()
        values = [trial["validation_recall@20"] for trial in trials]
        assert len(trials) == 12 and set(trials[0]["parameters"]) == set(SPACES["crane"])
        best = search.best()
        assert best is not None and best.knn.k == trials[int(np.argmax(values))]["parameters"]["knn.k"] > RECIPE.knn.k
        assert all(("error" in t) == (t["parameters"]["train.edge_dropout"] > 0.3) for t in trials)
        assert any("error" in trial and trial["validation_recall@20"] == 0 for trial in trials)

    @pytest.mark.slow
    def test_in_pieces_and_after_a_kill_it_tries_the_same(self, dataset, tmp_path, landscape, monkeypatch) -> None:
        whole = Search(dataset, RECIPE, 0, Cells(tmp_path / "whole"))
        whole.run(6, NO_BOUND.allows, lambda _: None)
        train = cells_module.MODELS["crane"]

        def killed(*_: Any) -> Trained:
            raise KeyboardInterrupt

        pieces = Cells(tmp_path / "pieces")
        for upto in (0, 3, 6):
            monkeypatch.setitem(cells_module.MODELS, "crane", train)
            Search(dataset, RECIPE, 0, pieces).run(upto, NO_BOUND.allows, lambda _: None)
            monkeypatch.setitem(cells_module.MODELS, "crane", killed)
            with pytest.raises(KeyboardInterrupt):
                Search(dataset, RECIPE, 0, pieces).run(upto + 1, NO_BOUND.allows, lambda _: None)
        last = Search(dataset, RECIPE, 0, pieces)
        assert last.record() == whole.record()
        states = [trial.state.name for trial in last.study.get_trials(deepcopy=False)]
        assert sorted(states) == ["COMPLETE"] * 6 + ["FAIL"] * 3, "no trial is left running"

    @pytest.mark.parametrize("test", ["absent", "garbage"])
    def test_it_never_sees_the_test_split(self, dataset, tmp_path, landscape, test: str) -> None:
        interactions = dataset.interactions
        garbage = ItemLists.from_pairs(np.arange(40), np.full(40, 31), 40)
        other = (
            dataset.without_test()
            if test == "absent"
            else replace(dataset, interactions=replace(interactions, test=garbage))
        )
        found = []
        for name, each in (("real", dataset), (test, other)):
            search = Search(each, RECIPE, 0, Cells(tmp_path / name))
            assert not len(search.dataset.interactions.test.items)
            search.run(5, NO_BOUND.allows, lambda _: None)
            found.append((search.record(), search.best(), search.study.study_name))
        assert found[0] == found[1]

    @pytest.mark.slow
    def test_a_search_with_real_trainings_ends_in_a_configuration(self, folder: Path, tmp_path: Path, capsys) -> None:
        argv = flags(folder, tmp_path / "out", "--only", "search", "--trials", "2", "--seeds", "0")
        assert cli.main(argv) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["complete"]
        window = ["window.start=2026-01-01", "window.end=2026-01-02"]
        config = load_config(result["best"], window)
        assert config.train.num_epochs == 2 and config.refine.embedding_dim == 8
        page = Path(result["report"]).read_text()
        assert "All trials, best first" in page and "learning rate" in page
        assert cli.main(argv) == 0
        assert "trial=" not in capsys.readouterr().err, "both trials are found"

    @pytest.mark.parametrize("model", SPACES)
    def test_a_space_holds_fields_its_model_reads(self, dataset, tmp_path, model: str) -> None:
        recipe = changed(RECIPE, {"train.num_negatives": 4, "refine.num_steps": 1})
        # One user with fewer items than the others, or it would make no difference how users weigh.
        train = dataset.interactions.train
        fewer = replace(dataset.interactions, train=train.where(np.arange(len(train.items)) > 2))
        dataset = replace(dataset, interactions=fewer)
        users = np.arange(40)
        expected = MODELS[model](dataset, recipe, tmp_path / "as it is").score(users)
        for number, (path, distribution) in enumerate(SPACES[model].items()):
            section, _, name = path.partition(".")
            own = recipe.model_dump()[section][name]
            ends = getattr(distribution, "choices", None) or (distribution.low, distribution.high)
            other = changed(recipe, {path: next(end for end in ends if end != own)})
            found = MODELS[model](dataset, other, tmp_path / str(number)).score(users)
            assert not torch.equal(found, expected), f"{model} does not read {path}"

    @pytest.mark.slow
    def test_a_search_of_another_model_is_a_search_of_its_own(self, folder: Path, tmp_path: Path, capsys) -> None:
        for path in folder.glob("*_feat.npy"):
            path.unlink()
        for model in ("lightgcn", "bpr_mf"):
            more = ("--only", "search", "--trials", "2", "--seeds", "0", "--model", model)
            assert cli.main(flags(folder, tmp_path / "out", *more)) == 0
            result = json.loads(capsys.readouterr().out)
            assert result["complete"] and result["best"] == str(tmp_path / "out" / "search" / model / "best.yaml")
            (found,) = json.loads(Path(result["results"]).read_text())["experiments"].values()
            assert [set(trial["parameters"]) for trial in found["trials"]] == [set(SPACES[model])] * 2
            assert f"Search for a better recipe of {model}" in Path(result["report"]).read_text()
        cells = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*/cell.json")]
        assert {each["model"] for each in cells} == {"lightgcn", "bpr_mf"}
        assert len(list((tmp_path / "out" / "search").glob("*/best.yaml"))) == 2

    def test_only_a_search_knows_other_models(self, folder: Path, tmp_path: Path, capsys) -> None:
        for more, said in (
            (("--only", "search", "--model", "popularity"), "crane, crane_joint, lightgcn"),
            (("--only", "rca", "search", "--model", "mgcn"), "Add --only search"),
        ):
            assert cli.main(flags(folder, tmp_path / "out", *more)) == EXIT_CONFIG
            assert said in json.loads(capsys.readouterr().out)["remedy"]

    @pytest.mark.slow
    def test_a_second_process_waits_for_the_search(self, dataset, tmp_path, landscape) -> None:
        said: list[str] = []
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDING, str(tmp_path / "search" / "crane")], stdout=subprocess.PIPE, text=True
        )
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"

        def show(_: str, line: str) -> None:
            said.append(line)
            if line.startswith("waits"):
                assert landscape == [], "nothing is tried while another process searches"
                holder.terminate()

        study(dataset, tmp_path, show=show).run(["search"], 2)
        assert holder.wait() != 0
        assert said[0].startswith("waits for another process") and "trial=2 of=2" in said[2]

    def test_a_damaged_file_is_named(self, dataset, tmp_path, landscape) -> None:
        path = tmp_path / "search" / "crane" / "trials.db"
        Search(dataset, RECIPE, 0, Cells(tmp_path)).run(1, NO_BOUND.allows, lambda _: None)
        whole = path.read_bytes()
        for damaged in (b"no database" * 100, whole[:5000], whole[:-8192] + b"\7" * 8192):
            path.write_bytes(damaged)
            with pytest.raises(ArtifactError, match=f"{path} is damaged"):
                Search(dataset, RECIPE, 0, Cells(tmp_path)).run(2, NO_BOUND.allows, lambda _: None)
        path.unlink()
        Search(dataset, RECIPE, 0, Cells(tmp_path)).run(1, NO_BOUND.allows, lambda _: None)
        assert len(landscape) == 1, "what was trained is found"

    def test_the_file_is_the_recipe(self, tmp_path: Path) -> None:
        recipe = changed(RECIPE, {"knn.k": 7, "features.modalities": ("a",)})
        (tmp_path / "best.yaml").write_text(as_yaml(recipe))
        assert load_recipe(str(tmp_path / "best.yaml"), []) == recipe
        other = changed(RECIPE, {"mgcn.k": 7})
        assert Recipe.model_validate(yaml.safe_load(as_yaml(other, "mgcn"))) == other

    def test_another_recipe_is_another_search(self, dataset, tmp_path, landscape) -> None:
        cells = Cells(tmp_path)
        Search(dataset, RECIPE, 0, cells).run(1, NO_BOUND.allows, lambda _: None)
        other = Search(dataset, changed(RECIPE, {"train.num_epochs": 3}), 0, cells)
        assert other.trials() == [] and other.best() is None

    def test_values_outside_the_space_are_left_to_the_sampler(self, dataset, tmp_path, landscape) -> None:
        search = Search(dataset, changed(RECIPE, {"knn.k": 40, "train.contrast_weight": 0.0}), 0, Cells(tmp_path))
        search.run(1, NO_BOUND.allows, lambda _: None)
        (trial,) = search.record()
        assert 5 <= trial["parameters"]["knn.k"] <= 20
        assert trial["parameters"]["train.learning_rate"] == RECIPE.train.learning_rate


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_dataset_without_a_split_is_a_data_error(dataset: Dataset, split: str) -> None:
    empty = ItemLists.from_pairs(np.empty(0, np.int64), np.empty(0, np.int32), dataset.interactions.num_users)
    broken = replace(dataset, interactions=replace(dataset.interactions, **{split: empty}))
    with pytest.raises(DataError, match=f"has no {split} row"):
        broken.require_splits()


def test_a_pair_counts_once_in_train_before_the_rest(tmp_path: Path) -> None:
    rows = ["0\t1\t2", "0\t1\t0", "0\t1\t0", "1\t0\t1", "1\t0\t2", "1\t2\t0", "0\t2\t2"]
    (tmp_path / "x.inter").write_text("\n".join(["userID\titemID\tx_label", *rows]) + "\n")
    interactions = load_dataset(tmp_path).interactions
    pairs = {
        name: list(zip(lists.users().tolist(), lists.items.tolist(), strict=True))
        for name in ("train", "validation", "test")
        for lists in [getattr(interactions, name)]
    }
    assert pairs == {"train": [(0, 1), (1, 2)], "validation": [(1, 0)], "test": [(0, 2)]}


def test_the_forms_of_the_paper_are_not_compared_twice() -> None:
    forms = plan(load_recipe("paper", []), ["a"])["form"].variants
    recipes = [changed(load_recipe("paper", []), each.changes).model_dump_json() for each in forms]
    assert len(set(recipes)) == len(recipes) > 1
