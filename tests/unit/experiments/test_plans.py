"""The experiment plan: what each experiment varies, and what is refused."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from crane_core.config import Phi
from crane_core.errors import ConfigError
from crane_core.experiments.plans import NAMES, changed, experiment_plan, load_recipe
from crane_core.experiments.study import chosen
from tests.worlds.experiments import RECIPE


class TestPlans:
    def test_each_experiment_holds_the_recipe_itself_once(self) -> None:
        experiments = experiment_plan(RECIPE, ["a", "b"])
        assert tuple(experiments) == NAMES
        for experiment in experiments.values():
            defaults = [variant for variant in experiment.variants if changed(RECIPE, variant.changes) == RECIPE]
            assert len(defaults) == (0 if experiment.name == "cost" else 1), experiment.name
            labels = [variant.label for variant in experiment.variants]
            assert len(set(labels)) == len(labels), experiment.name

    def test_what_is_varied(self) -> None:
        experiments = experiment_plan(RECIPE, ["a", "b"])

        def values(name: str, field: str) -> list[Any]:
            return [variant.changes.get(field) for variant in experiments[name].variants]

        assert values("training", "crane.mode") == ["staged", "joint", "joint"]
        assert values("training", "crane.joint_start") == [None, "fitted", "scratch"]
        assert values("rca", "refine.num_recursions") == [0, 1, 2, 3, 4, 5]
        assert values("neighbours", "knn.k") == [5, 10, 15, 20]
        assert values("profiles", "profiles.aggregate") == ["sum", "mean"]
        assert values("phi", "refine.phi") == list(get_args(Phi))
        assert values("modalities", "features.modalities") == [None, ("a",), ("b",)]
        assert {*values("contrast", "crane.contrast_weight")} == {None, 0.0, 1e-4, 1e-2, 1e-1}

    def test_another_default_joins_the_grid(self) -> None:
        recipe = load_recipe(None, ["knn.k=7", "crane.contrast_weight=0.05"])
        experiments = experiment_plan(recipe, ["a"])
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
        assert load_recipe("paper", []).crane.semantic_items == "content"


def test_the_forms_of_the_paper_are_not_compared_twice() -> None:
    forms = experiment_plan(load_recipe("paper", []), ["a"])["form"].variants
    recipes = [changed(load_recipe("paper", []), each.changes).model_dump_json() for each in forms]
    assert len(set(recipes)) == len(recipes) > 1
