"""The search: resumed where it stopped, blind to the test split, over fields that the model reads."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from crane_core.config_file import load_config
from crane_core.dataset.interactions import ItemLists
from crane_core.errors import EXIT_CONFIG, ArtifactError, TrainingError
from crane_core.experiments.data import Dataset, held
from crane_core.experiments.models import MODELS, Recipe, Trained
from crane_core.experiments.plans import changed, load_recipe
from crane_core.experiments.search import SPACES, Search, as_yaml
from crane_core.experiments.trials import Trials
from jobs import cli
from tests.worlds.experiments import NO_BOUND, RECIPE, flags, forkserver, study


def _hold(folder: Path, pipe: Connection) -> None:
    """Hold the lock of a folder until the process is ended."""
    with held(folder):
        pipe.send("held")
        time.sleep(60)


class TestSearch:
    @pytest.fixture
    def landscape(self, monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
        """A model whose validation recall depends on `knn.k` alone; it diverges at a large edge dropout."""
        done: list[Recipe] = []

        def train(dataset: Dataset, recipe: Recipe, work: Path) -> Trained:
            done.append(recipe)
            if recipe.crane.edge_dropout > 0.3:
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

        monkeypatch.setitem(MODELS, "crane", train)
        return done

    def test_the_first_trial_is_the_recipe_and_the_best_is_found(self, dataset, tmp_path, landscape) -> None:
        search = Search(dataset, RECIPE, 0, Trials(tmp_path))
        search.run(12, NO_BOUND.allows, lambda _: None)
        assert landscape[0] == RECIPE.with_seed(0)
        trials = search.record()
        values = [trial["validation_recall@20"] for trial in trials]
        assert len(trials) == 12 and set(trials[0]["parameters"]) == set(SPACES["crane"])
        best = search.best()
        assert best is not None and best.knn.k == trials[int(np.argmax(values))]["parameters"]["knn.k"] > RECIPE.knn.k
        assert all(("error" in t) == (t["parameters"]["crane.edge_dropout"] > 0.3) for t in trials)
        assert any("error" in trial and trial["validation_recall@20"] == 0 for trial in trials)

    @pytest.mark.slow
    def test_in_pieces_and_after_a_kill_it_tries_the_same(self, dataset, tmp_path, landscape, monkeypatch) -> None:
        whole = Search(dataset, RECIPE, 0, Trials(tmp_path / "whole"))
        whole.run(6, NO_BOUND.allows, lambda _: None)
        train = MODELS["crane"]

        def killed(*_: Any) -> Trained:
            raise KeyboardInterrupt

        pieces = Trials(tmp_path / "pieces")
        for upto in (0, 3, 6):
            monkeypatch.setitem(MODELS, "crane", train)
            Search(dataset, RECIPE, 0, pieces).run(upto, NO_BOUND.allows, lambda _: None)
            monkeypatch.setitem(MODELS, "crane", killed)
            with pytest.raises(KeyboardInterrupt):
                Search(dataset, RECIPE, 0, pieces).run(upto + 1, NO_BOUND.allows, lambda _: None)
        last = Search(dataset, RECIPE, 0, pieces)
        assert last.record() == whole.record()
        states = [trial.state.name for trial in last.study.get_trials(deepcopy=False)]
        assert sorted(states) == ["COMPLETE"] * 6 + ["FAIL"] * 3, "no trial is left running"

    @pytest.mark.slow
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
            search = Search(each, RECIPE, 0, Trials(tmp_path / name))
            assert not len(search.dataset.interactions.test.items)
            search.run(5, NO_BOUND.allows, lambda _: None)
            found.append((search.record(), search.best(), search.study.study_name))
        assert found[0] == found[1]

    @pytest.mark.slow
    def test_a_search_with_real_trainings_ends_in_a_configuration(
        self, folder: Path, tmp_path: Path, capsys, request: pytest.FixtureRequest
    ) -> None:
        argv = flags(folder, tmp_path / "out", "--only", "search", "--trials", "2", "--seeds", "0")
        assert cli.main(argv) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["complete"]
        window = ["window.start=2026-01-01", "window.end=2026-01-02"]
        config = load_config(result["best"], window)
        assert config.train.num_epochs == 2 and config.refine.embedding_dim == 8
        page = Path(result["report"]).read_text()
        assert "All trials, best first" in page and "learning rate" in page
        request.getfixturevalue("no_drawing")
        assert cli.main(argv) == 0
        assert "trial=" not in capsys.readouterr().err, "both trials are found"

    @pytest.mark.slow
    @pytest.mark.parametrize("model", SPACES)
    def test_a_space_holds_fields_its_model_reads(self, dataset, tmp_path, model: str) -> None:
        recipe = changed(RECIPE, {"crane.num_negatives": 4, "refine.num_steps": 1})
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
    def test_a_search_of_another_model_is_a_search_of_its_own(
        self, folder: Path, tmp_path: Path, capsys, no_drawing: None
    ) -> None:
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
        trials = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*/cell.json")]
        assert {each["model"] for each in trials} == {"lightgcn", "bpr_mf"}
        assert len(list((tmp_path / "out" / "search").glob("*/best.yaml"))) == 2

    def test_only_a_search_knows_other_models(self, folder: Path, tmp_path: Path, capsys) -> None:
        for more, said in (
            (("--only", "search", "--model", "popularity"), "crane, crane_joint, lightgcn"),
            (("--only", "rca", "search", "--model", "mgcn"), "Give --only search"),
        ):
            assert cli.main(flags(folder, tmp_path / "out", *more)) == EXIT_CONFIG
            assert said in json.loads(capsys.readouterr().out)["remedy"]

    @pytest.mark.slow
    def test_a_second_process_waits_for_the_search(self, dataset, tmp_path, landscape) -> None:
        said: list[str] = []
        context = forkserver()
        ours, theirs = context.Pipe()
        holder = context.Process(target=_hold, args=(tmp_path / "search" / "crane", theirs))
        holder.start()
        assert ours.recv() == "held"

        def show(_: str, line: str) -> None:
            said.append(line)
            if line.startswith("waits"):
                assert landscape == [], "nothing is tried while another process searches"
                holder.terminate()

        study(dataset, tmp_path, show=show).run(["search"], 2)
        holder.join()
        assert holder.exitcode == -signal.SIGTERM
        assert said[0].startswith("waits for another process") and "trial=2 of=2" in said[2]

    def test_a_damaged_file_is_named(self, dataset, tmp_path, landscape) -> None:
        path = tmp_path / "search" / "crane" / "trials.db"
        Search(dataset, RECIPE, 0, Trials(tmp_path)).run(1, NO_BOUND.allows, lambda _: None)
        whole = path.read_bytes()
        for damaged in (b"no database" * 100, whole[:5000], whole[:-8192] + b"\7" * 8192):
            path.write_bytes(damaged)
            with pytest.raises(ArtifactError, match=f"{path} is damaged"):
                Search(dataset, RECIPE, 0, Trials(tmp_path)).run(2, NO_BOUND.allows, lambda _: None)
        path.unlink()
        Search(dataset, RECIPE, 0, Trials(tmp_path)).run(1, NO_BOUND.allows, lambda _: None)
        assert len(landscape) == 1, "what was trained is found"

    def test_the_file_is_the_recipe(self, tmp_path: Path) -> None:
        recipe = changed(RECIPE, {"knn.k": 7, "features.modalities": ("a",)})
        (tmp_path / "best.yaml").write_text(as_yaml(recipe))
        assert load_recipe(str(tmp_path / "best.yaml"), []) == recipe
        other = changed(RECIPE, {"mgcn.k": 7})
        assert Recipe.model_validate(yaml.safe_load(as_yaml(other, "mgcn"))) == other

    def test_another_recipe_is_another_search(self, dataset, tmp_path, landscape) -> None:
        kept = Trials(tmp_path)
        Search(dataset, RECIPE, 0, kept).run(1, NO_BOUND.allows, lambda _: None)
        other = Search(dataset, changed(RECIPE, {"train.num_epochs": 3}), 0, kept)
        assert other.finished() == [] and other.best() is None

    def test_values_outside_the_space_are_left_to_the_sampler(self, dataset, tmp_path, landscape) -> None:
        search = Search(dataset, changed(RECIPE, {"knn.k": 40, "crane.contrast_weight": 0.0}), 0, Trials(tmp_path))
        search.run(1, NO_BOUND.allows, lambda _: None)
        (trial,) = search.record()
        assert 5 <= trial["parameters"]["knn.k"] <= 20
        assert trial["parameters"]["train.learning_rate"] == RECIPE.train.learning_rate
