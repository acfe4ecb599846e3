"""What was written before `crane_core` was moved into packages is found, verified and read."""

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

from crane_core.config_file import load_config
from crane_core.errors import ConfigError
from crane_core.release.ledger import Ledger
from crane_core.release.mlmodel import served_folder
from crane_core.serving.model_folder import load_model
from crane_core.serving.probe import smoke_test
from crane_core.storage.artifacts import ArtifactStore
from crane_core.storage.local import LocalStorage

WRITTEN = Path(__file__).parents[2] / "worlds" / "before_move"
FINGERPRINT = "05ad7cbc1e60be749ca9bd4100b18eb2"


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    shutil.copytree(WRITTEN / "store", tmp_path / "store")
    return ArtifactStore(LocalStorage(tmp_path / "store"), tmp_path / "cache")


def test_a_model_folder_loads():
    model = load_model(served_folder(WRITTEN / "model"))
    assert model.facts["run"] == "run-1"
    assert list(model.user_ids) == ["ann", "bob", "cyd"] and list(model.item_ids) == ["a", "b", "c", "d"]
    assert smoke_test(model.predict, json.loads((WRITTEN / "probe.json").read_text())) == 3


def test_mlflow_loads_it_through_the_module_that_it_names():
    described = mlflow.models.Model.load(WRITTEN / "model").flavors["python_function"]
    assert described["loader_module"] == "crane_core.serving"
    model = mlflow.pyfunc.load_model(str(WRITTEN / "model"))
    table = model.predict(pd.DataFrame({"user_id": ["ann", "stranger"]}), params={"k": 2})
    assert table["item_ids"].tolist() == [["b", "d"], ["b", "a"]]
    assert table["fallback"].tolist() == [False, True]


def test_an_artifact_is_found_and_verified(store):
    found = store.find("ml.knn", FINGERPRINT)
    assert found is not None
    found.verify()
    assert store.artifact("run-1", "ml.knn.0").fingerprint == FINGERPRINT
    assert np.load(found.file("neighbours.npy")).shape == (12, 3) and found.facts["num_items"] == 12


def test_the_configuration_of_a_run_is_read(store):
    recorded = store.recorded_config("run-1")
    config = load_config(None, [], recorded)
    assert (config.knn.k, config.train.num_epochs, config.refine.embedding_dim) == (3, 3, 4)
    unchanged = {"window", "etl", "refine", "knn", "evaluate", "export", "promote"}
    read = config.model_dump(mode="json", include=unchanged)
    assert read["etl"]["refit"] is True, "new since"
    for section in unchanged:
        assert {field: read[section][field] for field in recorded[section]} == recorded[section]


def test_a_run_of_before_goes_on(store):
    recorded = store.recorded_config("run-1")
    store.start_run("run-1", load_config(None, [], recorded))
    with pytest.raises(ConfigError, match=r"knn\.k was 3, now 4"):
        store.start_run("run-1", load_config(None, ["knn.k=4"], recorded))
    with pytest.raises(ConfigError, match=r"choices\.share was None, now 0\.5"):
        chosen = ["behaviour_epochs=1", "crane_epochs=1", "crane_ranking=dot", "share=0.5"]
        store.start_run("run-1", load_config(None, [f"choices.{each}" for each in chosen], recorded))


def test_a_ledger_is_whole(store):
    ledger = Ledger(store.storage, "crane")
    assert ledger.verify() == 2 and ledger.champion() == "1"
    assert ledger.history()[0].numbers["standings"]["challenger"]["version"] == "1"
