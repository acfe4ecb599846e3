import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import yaml

from crane_core.config import Runtime
from crane_core.errors import ArtifactError, ConfigError
from crane_core.release.registry import Registry, open_registry
from crane_core.release.version import SHIPPED_TAG, DatasetReference, Release
from crane_core.serving.model_folder import verify_model
from tests.worlds.mlflow_tables import copy_tables
from tests.worlds.served import write


@pytest.fixture
def store(tmp_path) -> Path:
    copy_tables(tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def registry(store) -> Registry:
    return open_registry(Runtime(), str(store))


@pytest.fixture
def release(tmp_path) -> Release:
    evidence = tmp_path / "metrics.json"
    evidence.write_text(json.dumps({"recall@20": 0.25}))
    return Release(
        fingerprint="f1",
        run_id="run-1",
        folder=write(tmp_path / "crane"),
        twin=None,
        evidence=[evidence],
        input_example=pd.DataFrame({"user_id": ["ann", "bob"]}),
        params={"train.learning_rate": 0.001, "knn.k": 10},
        metrics={"models/crane/recall@20/mean": 0.25},
        curve=[{"epoch": 0, "loss": 0.7, "recall@20": 0.1}, {"epoch": 1, "loss": 0.5, "recall@20": 0.2}],
        datasets=[DatasetReference("etl.interactions", "abc", "/store/etl.interactions/abc", "training")],
        tags={"crane.window_end": "2026-03-01T00:00:00Z"},
    )


def files(store: Path) -> list[Path]:
    return [path for path in (store / "mlartifacts").rglob("*") if path.is_file()]


def test_what_is_registered(registry, release):
    version, is_new = registry.register(release)
    assert is_new and version.number == "1" and version.run_id == "run-1" and version.aliases == ()
    assert version.tags["crane.window_end"] == "2026-03-01T00:00:00Z"
    run = mlflow.get_run(version.mlflow_run)
    assert run.data.params == {"train.learning_rate": "0.001", "knn.k": "10"}
    assert run.data.metrics["models/crane/recall_at_20/mean"] == 0.25
    history = mlflow.MlflowClient().get_metric_history(version.mlflow_run, "epoch/recall_at_20")
    assert [(point.step, point.value) for point in history] == [(0, 0.1), (1, 0.2)]
    assert [(each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs] == [
        ("etl.interactions", "abc")
    ]
    info = mlflow.models.get_model_info("models:/crane/1")
    assert info.signature.inputs.input_names() == ["user_id", "history", "history_times"]
    assert info.signature.inputs.required_input_names() == ["user_id"]
    assert info.signature.outputs.input_names() == ["user_id", "item_ids", "scores", "fallback", "unknown_items"]
    assert info.saved_input_example_info is not None


def test_histories_reach_the_served_model(registry, release):
    version, _ = registry.register(release)
    registry.set_alias("champion", version.number)
    model = registry.load("@champion")
    asked = pd.DataFrame(
        {
            "user_id": ["ann", "new", "newer"],
            "history": [None, ["a", "q"], ["a", "b"]],
            "history_times": [None, None, ["2026-02-27T00:00:00Z", "2026-03-01T00:00:00Z"]],
        }
    )
    found = model.predict(asked, params={"k": 2})
    assert found["item_ids"].tolist() == [["b", "d"], ["b", "c"], ["c", "d"]]
    assert found["unknown_items"].tolist() == [0, 1, 0]
    # As MLflow's server reads a request.
    parsed = mlflow.pyfunc.scoring_server.infer_and_parse_data(
        {"dataframe_records": json.loads(asked.to_json(orient="records"))}, model.metadata.get_input_schema()
    )
    pd.testing.assert_frame_equal(model.predict(parsed, params={"k": 2}), found)


def test_a_twin_lies_beside_the_served_model(registry, release, tmp_path, store):
    alone, _ = registry.register(release)
    assert not alone.has_twin and alone.shipped_run == "run-1"
    assert registry.twin_folder(alone) == registry.model_folder(alone)
    twin = write(tmp_path / "twin", seen={"ann": ["b"]})
    tags = release.tags | {SHIPPED_TAG: "run-1.refit"}
    both, _ = registry.register(replace(release, fingerprint="f2", twin=twin, tags=tags))
    assert both.has_twin and (both.run_id, both.shipped_run) == ("run-1", "run-1.refit")
    found = registry.twin_folder(both)
    assert found != registry.model_folder(both)
    assert (found / "checksums.json").read_bytes() == (twin / "checksums.json").read_bytes()
    assert verify_model(found)["run"] == "run-1"
    (stored,) = {path.parent for path in files(store) if path.parent.name == "twin"}
    (stored / "checksums.json").write_text("{}")
    with pytest.raises(ArtifactError, match="its checksums are not those that were registered"):
        registry.twin_folder(both)
    shutil.rmtree(stored)
    with pytest.raises(ArtifactError, match="its twin cannot be read"):
        registry.twin_folder(both)
    assert registry.model_folder(both)


def test_the_same_fingerprint_is_the_same_version(registry, release):
    first, _ = registry.register(release)
    again, is_new = registry.register(replace(release, run_id="run-2"))
    assert not is_new and again == first
    other, is_new = registry.register(replace(release, fingerprint="f2"))
    assert is_new and other.number == "2"
    assert [version.number for version in registry.versions()] == ["1", "2"]


def test_nothing_in_the_model_can_execute(registry, release, store):
    registry.register(release)
    names = {path.name for path in files(store)}
    assert {"embeddings.safetensors", "users.parquet", "checksums.json", "MLmodel"} <= names
    assert {path.suffix for path in files(store)} <= {".safetensors", ".json", ".parquet", ".yaml", ".txt", ""}
    for path in files(store):
        data = path.read_bytes()
        assert not data.startswith(b"\x80") and b"cloudpickle" not in data, path


def test_loads_by_alias_and_answers(registry, release):
    version, _ = registry.register(release)
    registry.set_alias("champion", version.number)
    assert registry.holder("champion") == "1"
    assert registry.version("1").aliases == ("champion",)
    table = registry.load("@champion").predict(pd.DataFrame({"user_id": ["ann", "stranger"]}), params={"k": 2})
    assert table["item_ids"].tolist() == [["b", "d"], ["b", "a"]]
    assert table["fallback"].tolist() == [False, True]
    registry.set_alias("champion", None)
    assert registry.holder("champion") is None
    with pytest.raises(ArtifactError, match="models:/crane@champion cannot be loaded"):
        registry.load("@champion")


def test_a_tampered_model_is_refused(registry, release, store):
    version, _ = registry.register(release)
    path = next(path for path in files(store) if path.name == "embeddings.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"embeddings\.safetensors does not match its sha256"):
        registry.load(f"/{version.number}")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"loader_module": "planted"}, "its loader is 'planted', expected 'crane_core.serving'"),
        ({"code": "code"}, "its MLmodel asks for code"),
        ({"config": {"k": 1}}, "its MLmodel asks for config"),
        ({"data": "../elsewhere"}, r"its data lie in '\.\./elsewhere'"),
        ({"data": "data/.."}, r"its data lie in 'data/\.\.'"),
        ({"data": 3}, "its MLmodel cannot be read"),
        (None, "its MLmodel cannot be read"),
    ],
)
def test_a_model_that_asks_for_other_code_is_refused_before_it_runs(
    registry, release, store, monkeypatch, change, found
):
    version, _ = registry.register(release)
    (path,) = (path for path in files(store) if path.name == "MLmodel")
    # What a loader of somebody else's would find: on the path, as `code` would put it there.
    (store / "planted").mkdir()
    for place in (store / "planted" / "planted.py", path.parent / "code" / "crane_core" / "serving.py"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    monkeypatch.syspath_prepend(store / "planted")
    described = yaml.safe_load(path.read_text())
    if change is None:
        path.write_text("flavors: [\n")
    else:
        described["flavors"]["python_function"] |= change
        path.write_text(yaml.safe_dump(described))
    with pytest.raises(ArtifactError, match=found):
        registry.load(f"/{version.number}")
    with pytest.raises(ArtifactError, match=found):
        registry.model_folder(version)
    assert not list(store.rglob("ran"))


def test_forged_checksums_are_refused(registry, release, store):
    version, _ = registry.register(release)
    assert registry.model_folder(version).name == "crane"
    path = next(path for path in files(store) if path.name == "checksums.json")
    path.write_text(path.read_text() + " ")
    with pytest.raises(ArtifactError, match="checksums are not those that were registered"):
        registry.model_folder(version)


def test_evidence_is_what_was_registered(registry, release, store):
    version, _ = registry.register(release)
    assert json.loads(registry.evidence(version, "metrics.json").read_text()) == {"recall@20": 0.25}
    with pytest.raises(ArtifactError, match=r"evidence probe\.json cannot be read"):
        registry.evidence(version, "probe.json")
    path = next(path for path in files(store) if path.name == "metrics.json")
    path.write_text(json.dumps({"recall@20": 0.99}))
    with pytest.raises(ArtifactError, match=r"evidence metrics\.json is not what was registered"):
        registry.evidence(version, "metrics.json")


def test_ledger_anchors_are_read_back(registry, release):
    version, _ = registry.register(release)
    registry.tag(version.number, {"crane.ledger.3": "abc", "crane.decision": "promoted"})
    assert registry.ledger_anchors() == {3: "abc"}


def test_unknown_version(registry):
    with pytest.raises(ArtifactError, match="has no version '7'"):
        registry.version("7")


def test_a_remote_store_needs_a_configured_registry():
    with pytest.raises(ConfigError, match="no model registry is configured"):
        open_registry(Runtime(), "s3://bucket/store")


def test_a_registry_that_is_none_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="does not answer"):
        Registry(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}", None, "crane")


def test_telemetry_is_off():
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_training_shows_its_epochs_while_it_runs_and_goes_on_in_the_same_run(registry, monkeypatch, caplog):
    client = mlflow.MlflowClient()

    def runs():
        experiment = client.get_experiment_by_name(registry.name)
        return client.search_runs([experiment.experiment_id], "tags.`crane.training` = 'f1'")

    with pytest.raises(RuntimeError), registry.watch("run-1 ml.train", "f1") as log:
        log({"epoch": 0, "loss": 0.7, "recall@20": 0.1})
        (running,) = runs()
        assert running.info.status == "RUNNING" and running.info.run_name == "run-1 ml.train"
        assert running.data.metrics == {"epoch/loss": 0.7, "epoch/recall_at_20": 0.1}
        raise RuntimeError
    assert [run.info.status for run in runs()] == ["FAILED"]
    with registry.watch("run-1 ml.train", "f1") as log:
        log({"epoch": 1, "loss": 0.5})
        with monkeypatch.context() as patch:
            patch.setattr(mlflow.MlflowClient, "log_batch", _refuse)
            log({"epoch": 2, "loss": 0.4})
    (finished,) = runs()
    assert finished.info.status == "FINISHED"
    assert [(point.step, point.value) for point in client.get_metric_history(finished.info.run_id, "epoch/loss")] == [
        (0, 0.7),
        (1, 0.5),
    ]
    assert "curve_not_shown epoch=2" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "search_runs", _refuse)
        with pytest.raises(ConfigError, match="does not answer"), registry.watch("run-1 ml.train", "f1"):
            pass


def _refuse(*_, **__):
    raise mlflow.exceptions.MlflowException("no answer")


DOWNLOAD = """
import tempfile
from crane_core.release import registry
registry.mlflow.artifacts.download_artifacts = lambda **_: tempfile.mkdtemp()
before = tempfile.gettempdir()
print(registry.download(artifact_uri="models:/crane/1"), tempfile.gettempdir() == before)
"""


@pytest.mark.slow
def test_what_is_downloaded_goes_with_the_process(tmp_path):
    (tmp_path / "tmp").mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", DOWNLOAD],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        check=True,
    )
    copy, same = ran.stdout.split()
    assert Path(copy).is_relative_to(tmp_path / "tmp") and same == "True"
    assert list((tmp_path / "tmp").iterdir()) == []
