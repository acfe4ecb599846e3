"""What is registered for a run: its model, its evidence, its figures and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from crane_core.config_file import load_config
from crane_core.release.assembly import PROBED_USERS, Made, assemble
from crane_core.serving.model_folder import load_model
from jobs.stores import open_store
from tests.worlds.release_runs import make_run

INPUTS = ("etl.interactions", "ml.train", "ml.evaluate")


def test_a_release_says_what_the_run_has_made(tmp_path: Path) -> None:
    make_run(tmp_path / "store", "run-1", noise=0.3)
    store = open_store(str(tmp_path / "store"))
    inputs = {name: store.artifact("run-1", name) for name in INPUTS}
    config = load_config(None, [], store.run("run-1")["config"])
    (tmp_path / "made").mkdir()
    release = assemble(tmp_path / "made", "f1", "run-1", config, store, Made(inputs, {}))

    model = load_model(release.folder)
    assert (release.folder.name, release.fingerprint, release.run_id) == ("crane", "f1", "run-1")
    assert model.facts["run"] == "run-1" and model.facts["window"]["end"].startswith("2026-03-01T00:00:00")
    assert [path.name for path in release.evidence] == ["metrics.json", "per_user.parquet", "probe.json"]
    answers = json.loads(release.evidence[2].read_text())["answers"]
    assert len(answers) == PROBED_USERS
    assert release.input_example["user_id"].tolist() == [answer["user_id"] for answer in answers[:2]]
    for answer in answers[:3]:
        row = model.user_ids.get_loc(answer["user_id"])
        best = [model.item_ids.get_loc(item) for item in answer["item_ids"]]
        scores = model.item_embeddings[best] @ model.user_embeddings[row]
        np.testing.assert_allclose(scores, answer["scores"], rtol=1e-4)

    metrics = json.loads(inputs["ml.evaluate"].file("metrics.json").read_text())
    assert release.metrics["models/crane/recall@20/mean"] == metrics["models"]["crane"]["recall@20"]["mean"]
    assert release.params["export.k"] == 10 and not any("runtime" in name for name in release.params)
    assert [point["epoch"] for point in release.curve] == list(range(12))
    assert {each.name: each.context for each in release.datasets} == {
        "etl.interactions": "training",
        "ml.train": "training",
        "ml.evaluate": "evaluation",
    }
    assert all(Path(each.source).is_dir() for each in release.datasets)
    assert release.tags["crane.artifact.ml.train"] == inputs["ml.train"].fingerprint
    assert release.tags["crane.window_end"] == model.facts["window"]["end"]
