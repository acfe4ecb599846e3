"""Every model by name on a planted dataset."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crane_core.config import Refine
from crane_core.config_file import preset_names
from crane_core.dataset.interactions import Interactions
from crane_core.errors import DataError
from crane_core.evaluation.baselines import item_knn
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import Scorer, dot_product, rank_users
from crane_core.evaluation.slices import slices_of_test
from crane_core.experiments import models
from crane_core.experiments.data import Dataset
from crane_core.experiments.models import CONTENT_GRID, ITEM_KNN_GRID, MODELS, NEED_FEATURES, Recipe, Trained
from crane_core.experiments.plans import load_recipe
from crane_core.experiments.references import FreedomSettings, MgcnSettings
from crane_core.model.lightgcn import LightGCN
from crane_core.numerics.bootstrap import bootstrap, paired_bootstrap
from crane_core.training.head import choose_head
from crane_core.training.share import fuse
from tests.worlds.planted import Communities, checkerboard, communities, planted_modalities
from tests.worlds.settings import changed
from tests.worlds.trainings import with_everything

RECIPE = changed(
    Recipe(
        refine=Refine(embedding_dim=8, num_steps=10, batch_size=64),
        freedom=FreedomSettings(k=4, learning_rate=0.02),
        mgcn=MgcnSettings(k=4, learning_rate=0.02),
    ),
    embedding_dim=8,
    batch_size=64,
    num_epochs=8,
    learning_rate=0.02,
)


def of_epochs(num_epochs: int) -> Recipe:
    return changed(RECIPE, num_epochs=num_epochs)


def planted() -> Dataset:
    modalities = planted_modalities(noise=0.5)
    features = {m.name: np.where(m.present[:, None], m.items, np.nan).astype(np.float32) for m in modalities}
    return Dataset("planted", checkerboard(), features)


def recall(dataset: Dataset, score: Scorer) -> float:
    users = np.flatnonzero(dataset.interactions.test.counts() > 0)
    ranked = rank_users(score, dataset.interactions.train, users, 3)
    return float(user_metrics(ranked, dataset.interactions.test, users, (3,))["recall@3"].mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "popularity"])
def test_every_model_beats_popularity_and_repeats_itself(name: str, tmp_path: Path) -> None:
    dataset = planted()
    first, second = (MODELS[name](dataset, RECIPE, tmp_path / attempt) for attempt in ("a", "b"))
    users = np.arange(dataset.interactions.num_users)
    assert first.score(users).shape == (dataset.interactions.num_users, dataset.interactions.num_items)
    assert torch.equal(first.score(users), second.score(users))
    assert first.validation == second.validation > 0 and first.seconds > 0
    popularity = MODELS["popularity"](dataset, RECIPE, tmp_path / "popularity")
    assert recall(dataset, first.score) > 2 * recall(dataset, popularity.score)


@pytest.mark.parametrize("name", MODELS)
def test_a_user_who_has_met_everything_stops_no_model(name: str, tmp_path: Path) -> None:
    dataset = dataclasses.replace(planted(), interactions=with_everything(1))
    trained = MODELS[name](dataset, of_epochs(2), tmp_path / "work")
    assert trained.facts.get("users_without_negatives", 1) == 1
    assert torch.isfinite(trained.score(np.arange(40))).all()


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_trains(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["refine.num_steps=3", "train.num_epochs=3", "knn.k=4"])
    trained = MODELS["crane"](planted(), recipe, tmp_path / "work")
    assert trained.facts["num_epochs"] == 3 and 0 < trained.validation <= 1
    assert torch.isfinite(trained.score(np.arange(40))).all()


def test_crane_joint_is_crane_in_joint_mode(tmp_path: Path) -> None:
    dataset = planted()
    joint = changed(RECIPE, mode="joint", num_epochs=3)
    staged = changed(joint, mode="staged")
    asked, named, other = (
        {
            key: value
            for key, value in MODELS[name](dataset, recipe, tmp_path / f"{name}-{recipe.crane.mode}").facts.items()
            if "sec" not in key
        }
        for name, recipe in (("crane", joint), ("crane_joint", staged), ("crane", staged))
    )
    assert asked == named != other


@pytest.mark.parametrize("name", list(MODELS))
def test_a_dataset_without_features_is_refused_by_the_models_that_need_them(name: str, tmp_path: Path) -> None:
    dataset, recipe = dataclasses.replace(planted(), features={}), of_epochs(1)
    if name in NEED_FEATURES:
        with pytest.raises(DataError, match="planted has no item features"):
            MODELS[name](dataset, recipe, tmp_path)
    else:
        MODELS[name](dataset, recipe, tmp_path)


def test_bpr_mf_does_not_propagate(tmp_path: Path) -> None:
    dataset = planted()
    trained = MODELS["bpr_mf"](dataset, RECIPE, tmp_path / "work")
    (folder,) = tmp_path.glob("lightgcn-*")
    weights = load_file(folder / "best.safetensors")["ids"]
    assert torch.equal(trained.score(np.array([3, 0])), weights[[3, 0]] @ weights[40:].T)


def test_lightgcn_softmax_differs_from_lightgcn_by_the_loss_alone(tmp_path: Path) -> None:
    dataset = planted()
    plain, softmax = (MODELS[name](dataset, RECIPE, tmp_path / name) for name in ("lightgcn", "lightgcn_softmax"))
    users = np.arange(40)
    assert not torch.equal(plain.score(users), softmax.score(users))
    model = LightGCN(40, 32, RECIPE, "softmax")
    assert torch.equal(model.ids, LightGCN(40, 32, RECIPE).ids), "both start from the same embeddings"
    rows, _ = models.train_to_best(model, dataset.interactions, RECIPE, tmp_path / "by hand")
    assert torch.equal(softmax.score(users), dot_product(*rows)(users))


def test_lightgcn_fused_is_crane_without_content(tmp_path: Path) -> None:
    dataset, users, names = planted(), np.arange(40), ("_fused", "", "_softmax")
    fused, plain, softmax = (MODELS[f"lightgcn{name}"](dataset, RECIPE, tmp_path / "x") for name in names)
    assert len(list(tmp_path.glob("lightgcn*"))) == 2, "the views of the others are found"
    assert 0 < fused.facts["trust"] < 1, "one of the views alone shows nothing"
    recalls = dict(fused.facts["curve"])
    assert (recalls[0.0], recalls[1.0]) == pytest.approx((plain.validation, softmax.validation))
    views = [models.behaviour(dataset.interactions, RECIPE, tmp_path / "x", loss)[0] for loss in ("bpr", "softmax")]
    head = choose_head(fuse(views[0], views[1], fused.facts["trust"]), dataset.interactions, RECIPE)
    assert head is not None
    assert torch.equal(fused.score(users), dot_product(*head.rows)(users)), "the head without content is on top"
    assert fused.validation == head.recall[head.form] and fused.seconds > plain.seconds + softmax.seconds


def test_a_grid_is_searched_by_validation_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = planted()
    held_out = dataset.interactions.validation
    wanted = torch.zeros(40, 32)
    wanted[held_out.users(), held_out.items] = 1

    def fake(interactions: Interactions, num_neighbours: int, shrinkage: float) -> Scorer:
        """Right when asked with the fourth entry of the grid or a later one, wrong before."""
        sign = 1 if ITEM_KNN_GRID.index((num_neighbours, shrinkage)) >= 3 else -1
        return lambda users: sign * wanted[users]

    monkeypatch.setattr(models, "item_knn", fake)
    trained = MODELS["item_knn"](dataset, RECIPE, tmp_path)
    assert trained.validation == 1.0
    assert trained.facts == dict(zip(("num_neighbours", "shrinkage"), ITEM_KNN_GRID[3], strict=True))


def test_the_chosen_item_knn_is_the_one_it_names(tmp_path: Path) -> None:
    dataset = planted()
    trained = MODELS["item_knn"](dataset, RECIPE, tmp_path)
    users = np.arange(40)
    assert torch.equal(trained.score(users), item_knn(dataset.interactions, **trained.facts)(users))
    assert MODELS["content"](dataset, RECIPE, tmp_path).facts["standardise"] in CONTENT_GRID


LARGER = changed(
    Recipe(refine=Refine(embedding_dim=8, num_steps=30, batch_size=64)),
    embedding_dim=16,
    batch_size=512,
    num_epochs=12,
    patience=5,
    learning_rate=0.02,
    num_negatives=64,
)


def group_features(world: Communities, seed: int) -> dict[str, np.ndarray]:
    """Two modalities in which an item lies near the centre of its group."""
    generator = np.random.default_rng(seed)
    features = {}
    for name, dim in (("sound", 12), ("words", 6)):
        centers = generator.normal(size=(4, dim))[world.groups]
        features[name] = (centers + 0.5 * generator.normal(size=centers.shape)).astype(np.float32)
    return features


def train_communities(
    world: Communities, features: dict[str, np.ndarray], seed: int, work: Path, name: str
) -> tuple[Trained, Trained]:
    """Train CRANE and LightGCN, which is found where the same folder holds it."""
    dataset = Dataset("communities", world.interactions, features)
    crane, lightgcn = (
        MODELS[model](dataset, LARGER.with_seed(seed), work / f"{model}-{name}") for model in ("crane", "lightgcn")
    )
    return crane, lightgcn


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_noise_crane_does_not_fall_below_lightgcn(seed: int, tmp_path: Path) -> None:
    world, generator = communities(seed), np.random.default_rng(seed)
    features = {name: generator.normal(size=(240, dim)).astype(np.float32) for name, dim in (("a", 12), ("b", 6))}
    test, users, found = world.interactions.test, np.arange(240), []
    for trained in train_communities(world, features, seed, tmp_path, "work"):
        ranked = rank_users(trained.score, world.interactions.train, users, 20)
        found.append(user_metrics(ranked, test, users, (20,)))
    difference = paired_bootstrap(*found, 1000, seed)["recall@20"]
    assert difference.high >= 0 and difference.mean > -0.01
    assert found[0]["recall@20"].mean() >= bootstrap(found[1], 1000, seed)["recall@20"].low


@pytest.mark.slow
def test_cold_items_are_found_by_their_content_and_by_chance_without(tmp_path: Path) -> None:
    world = communities(2)
    features = group_features(world, 2)
    order = np.random.default_rng(1).permutation(240)
    users, is_warm = np.arange(240), world.interactions.item_counts() > 0
    cold = slices_of_test(world.interactions)["cold_items"]
    everywhere, among_cold = [], []
    for attempt, shown in (("true", features), ("shuffled", {name: rows[order] for name, rows in features.items()})):
        crane, _ = train_communities(world, shown, 2, tmp_path, attempt)
        ranked = rank_users(crane.score, world.interactions.train, users, 20)
        everywhere.append(user_metrics(ranked, cold, users, (20,))["recall@20"].mean())
        scores = crane.score(users)
        scores[:, torch.from_numpy(is_warm)] = -torch.inf
        ranked = scores.topk(12, dim=1).indices.numpy()
        among_cold.append(user_metrics(ranked, cold, users, (12,))["recall@12"].mean())
    # By chance 20 of 226 items hold 9 % of what is wanted, and 12 of the 48 cold ones a quarter.
    assert everywhere[0] > 2.5 * 20 / 226 and everywhere[1] < 1.5 * 20 / 226
    assert among_cold[0] > 0.9 and 0.1 < among_cold[1] < 0.4
