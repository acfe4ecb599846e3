"""The torch jobs through their command lines, on a planted data set put into the store by hand."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file
from torch.distributed.elastic.multiprocessing.errors import record

from crane_core.config import Runtime
from crane_core.config_file import load_config
from crane_core.dataset.interactions import ItemLists
from crane_core.errors import EXIT_ARTIFACT, EXIT_CONFIG, EXIT_OK, EXIT_UNEXPECTED, ConfigError, DataError
from crane_core.graph.exact import brute_force
from crane_core.graph.item_graph import build_graph
from crane_core.model.content import load_graph
from crane_core.model.fold_in import History
from crane_core.model.views import Rows
from crane_core.serving.model_folder import load_recommender
from crane_core.stages import STAGES
from crane_core.storage.artifacts import ArtifactStore
from crane_core.training.validation import STEERING_METRIC, Validation
from jobs.ml import behaviour, evaluate, graph, knn, launch, refine, train
from jobs.ml.nodes import Node
from jobs.ml.stages import graph as graph_stage
from jobs.stores import open_store
from tests.worlds.planted import checkerboard, planted_modalities
from tests.worlds.processes import JobProcess, forked_ranks, forkserver_ranks

SETTINGS = [
    "window.start=2026-01-01",
    "window.end=2026-01-02",
    "refine.embedding_dim=8",
    "refine.num_steps=20",
    "refine.batch_size=64",
    "knn.k=5",
    "lightgcn.embedding_dim=8",
    "train.batch_size=64",
    "train.num_epochs=8",
    "train.learning_rate=0.02",
    "evaluate.num_bootstrap=200",
    "runtime.num_threads=1",
]
JOBS = [
    (refine, ""),
    (knn, "0"),
    (knn, "1"),
    (graph, ""),
    (behaviour, ""),
    (train, ""),
    (evaluate, ""),
]


def flags(store: Path, run: str, part: str = "", extra: tuple[str, ...] = ()) -> list[str]:
    settings = [flag for setting in (*SETTINGS, *extra) for flag in ("--set", setting)]
    return ["--store", str(store), "--run", run, *settings, *(["--part", part] if part else [])]


def publish(store: ArtifactStore, run: str, stage: str, folder: Path, facts: dict) -> None:
    manifest = {"stage": stage, "part": "", "fingerprint": "planted", "facts": facts}
    store.publish(folder, manifest)
    store.record(run, stage, {"fingerprint": "planted"})


def rows(lists: ItemLists, split: int) -> pa.Table:
    size = len(lists.items)
    return pa.table(
        {
            "user_idx": pa.array(lists.users(), pa.int32()),
            "item_idx": pa.array(lists.items, pa.int32()),
            "split": pa.array([split] * size, pa.int8()),
            "weight": pa.array([1.0] * size, pa.float32()),
            "event_time": pa.array([datetime(2026, 1, 1)] * size, pa.timestamp("us", "UTC")),
        }
    )


def plant(path: Path, scratch: Path) -> None:
    """The artifacts of the ETL for the checkerboard, recorded for the run `planted`."""
    store, interactions = open_store(str(path)), checkerboard()
    store.start_run("planted", load_config(None, SETTINGS))
    folder = scratch / "interactions"
    for table in ("interactions", "users", "items", "cold"):
        (folder / table).mkdir(parents=True)
    parts = [rows(lists, split) for split, lists in enumerate((interactions.train, interactions.validation))]
    pq.write_table(pa.concat_tables([*parts, rows(interactions.test, 2)]), folder / "interactions" / "0.parquet")
    for table, index, name, size in (("users", "user", "u", 40), ("items", "item", "i", 32)):
        columns = {
            f"{index}_idx": pa.array(range(size), pa.int32()),
            f"{index}_id": [f"{name}{n}" for n in range(size)],
        }
        if table == "items":
            columns["title"] = pa.array([None] * size, pa.string())
        pq.write_table(pa.table(columns), folder / table / "0.parquet")
    cold = {
        "user_id": pa.array(["new", "new", "u1"]),
        "user_idx": pa.array([None, None, 1], pa.int32()),
        "item_idx": pa.array([0, None, None], pa.int32()),
        "split": pa.array([2, 2, 2], pa.int8()),
        "reason": pa.array(["unknown_user", "unknown_user", "unknown_item"]),
    }
    pq.write_table(pa.table(cold), folder / "cold" / "0.parquet")
    publish(store, "planted", "etl.interactions", folder, {"num_users": 40, "num_items": 32})
    features, profiles = scratch / "features", scratch / "profiles"
    profiles.mkdir()
    for modality in planted_modalities(noise=0.5):
        (features / modality.name).mkdir(parents=True)
        np.save(features / modality.name / "matrix.npy", modality.items)
        np.save(features / modality.name / "mask.npy", modality.present)
        np.savez(features / modality.name / "standardisation.npz", allow_pickle=False, kind=np.array("none"))
        np.save(profiles / f"{modality.name}.npy", modality.profiles)
        np.save(profiles / f"{modality.name}.counts.npy", modality.counts)
    widths = {modality.name: {"dim": modality.items.shape[1]} for modality in planted_modalities(noise=0.5)}
    publish(store, "planted", "etl.features", features, {"modalities": widths})
    publish(store, "planted", "etl.profiles", profiles, {})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which every torch job has run."""
    folder = tmp_path_factory.mktemp("planted")
    plant(folder / "store", folder / "scratch")
    for job, part in JOBS:
        assert job.main(flags(folder / "store", "planted", part)) == EXIT_OK, job.__name__
    return folder / "store"


def test_every_stage_leaves_what_it_promises(finished: Path) -> None:
    store = open_store(str(finished))
    refined = store.artifact("planted", "ml.refine")
    assert np.load(refined.file("items.npy")).shape == (32, 2, 8)
    assert np.load(refined.file("fused_users.npy")).shape == (40, 8)
    certificate = json.loads(store.artifact("planted", "ml.graph").file("certificate.json").read_text())
    assert certificate["recall"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert certificate["co_interaction"]["lift"] > 1.5
    for stage in ("ml.behaviour", "ml.train"):
        trained = store.artifact("planted", stage)
        trained.verify()
        rows = load_file(trained.file("embeddings.safetensors"))
        assert rows["user_embeddings"].shape[0] == 40
        assert rows["item_embeddings"].shape[0] == 32
    metrics = json.loads(store.artifact("planted", "ml.evaluate").file("metrics.json").read_text())
    assert set(metrics["models"]) == {"crane", "lightgcn", "item_knn", "recent_popularity", "popularity"}
    assert metrics["models"]["crane"]["recall@20"]["mean"] > metrics["models"]["popularity"]["recall@20"]["mean"]
    assert metrics["models"]["item_knn"]["recall@20"]["mean"] > metrics["models"]["popularity"]["recall@20"]["mean"]
    assert set(metrics["differences"]) == {"lightgcn", "item_knn", "recent_popularity", "popularity"}
    assert {"diverse_users", "focused_users"} <= {name for name, part in metrics["slices"].items() if part["users"]}
    assert metrics["cold_items"] is None, "every item has a training interaction"
    assert metrics["cold"]["rows"] == {"unknown_user": 2, "unknown_item": 1}
    assert metrics["cold"]["unknown_users"] == 1
    per_user = pq.read_table(store.artifact("planted", "ml.evaluate").file("per_user.parquet"))
    assert per_user.num_rows == metrics["users"] == 40
    assert per_user.column("user_id")[3].as_py() == "u3"


def test_the_history_of_a_known_user_nearly_gives_the_trained_list(finished: Path) -> None:
    store = open_store(str(finished))
    served = load_recommender(store.artifact("planted", "etl.interactions"), store.artifact("planted", "ml.train"))
    assert served.fold_in is not None and served.fold_in.weight == 1.0
    seen = served.seen
    folded = served.fold_in.fold(History(seen.users(), seen.items, np.ones(len(seen.items))), seen.num_users)
    lists = []
    for rows in (served.user_embeddings, folded):
        scores = rows @ served.item_embeddings.T
        scores[seen.users(), seen.items] = -np.inf
        lists.append(np.argsort(-scores, axis=1)[:, :5])
    assert np.median([len(set(left) & set(right)) for left, right in zip(*lists, strict=True)]) >= 4


def test_every_stage_is_found_the_second_time(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job, part in JOBS:
        assert job.main(flags(finished, "planted", part)) == EXIT_OK
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "found"


def test_another_number_of_shards_gives_the_same_graph(finished: Path) -> None:
    store = open_store(str(finished))
    extra = ("knn.num_shards=5", "knn.memory=1048576")
    store.start_run("sharded", load_config(None, [*SETTINGS, *extra]))
    for stage in ("etl.interactions", "etl.features", "etl.profiles"):
        store.record("sharded", stage, {"fingerprint": "planted"})
    for job, part in ((refine, ""), *((knn, str(n)) for n in (3, 0, 4, 2, 1)), (graph, "")):
        assert job.main(flags(finished, "sharded", part, extra)) == EXIT_OK
    first, second = (store.artifact(run, "ml.graph") for run in ("planted", "sharded"))
    assert first.fingerprint != second.fingerprint
    assert first.manifest["content"] == second.manifest["content"]


def test_too_low_a_recall_raises_the_probes_once_and_then_stops(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(finished))
    extra = ("knn.mode=approx", "knn.k=2", "knn.num_lists=8", "knn.num_probes=1", "knn.min_recall=0.9")
    store.start_run("approx", load_config(None, [*SETTINGS, *extra]))
    # Noise, whose lists cut neighbours apart.
    rows = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    np.save(tmp_path / "fused_items.npy", rows)
    publish(store, "approx", "ml.refine", tmp_path, {})
    store.record("approx", "etl.interactions", {"fingerprint": "planted"})
    for part in ("0", "1"):
        assert knn.main(flags(finished, "approx", part, extra)) == EXIT_OK
    with monkeypatch.context() as patch:
        patch.setattr(graph_stage, "RAISE", 1)
        assert graph.main(flags(finished, "approx", "", extra)) == EXIT_ARTIFACT
    assert store.entry("approx", "ml.graph") is None
    assert graph.main(flags(finished, "approx", "", extra)) == EXIT_OK
    raised = store.artifact("approx", "ml.graph")
    certificate = raised.facts["certificate"]
    assert [attempt["num_probes"] for attempt in certificate["attempts"]] == [1, 4]
    assert certificate["attempts"][0]["recall"]["low"] < 0.9 <= certificate["recall"]["low"]
    assert certificate["attempts"][1]["recall"] == certificate["recall"]
    truth = brute_force(rows, np.arange(32), 2)
    found = (np.load(raised.file("neighbours.npy"))[:, :, None] == truth[:, None, :]).any(axis=2)
    assert found.mean() == pytest.approx(certificate["recall"]["mean"]), "every item is in the sample"
    assert store.artifact("planted", "ml.graph").facts["certificate"]["attempts"] == []


def test_a_joint_run_trains_rca_on_from_the_fitted_weights(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(finished))
    validate, epochs = Validation.best, itertools.count()

    def prefer_the_last(self: Validation, rankings: dict[str, Rows]) -> tuple[str, dict[str, float]]:
        """The first epoch may find the whole planted answer; by the last the graph has moved."""
        ranking, metrics = validate(self, rankings)
        return ranking, metrics | {STEERING_METRIC: float(next(epochs))}

    monkeypatch.setattr(Validation, "best", prefer_the_last)
    extra = ("crane.mode=joint", "crane.semantic_users=profiles")
    store.start_run("joint", load_config(None, [*SETTINGS, *extra]))
    for stage in ("etl.interactions", "etl.features", "etl.profiles"):
        store.record("joint", stage, {"fingerprint": "planted"})
    for job, part in JOBS:
        assert job.main(flags(finished, "joint", part, extra)) == EXIT_OK, job.__name__
    manifest = store.artifact("joint", "ml.train").manifest
    assert {"etl.features", "etl.profiles"} < set(manifest["inputs"])
    weights = load_file(store.artifact("joint", "ml.train").file("weights.safetensors"))
    fitted = load_file(store.artifact("joint", "ml.refine").file("rca.safetensors"))
    assert {f"content.refiner.{name}" for name in fitted} <= set(weights)
    moved = np.abs(weights["content.refiner.weights.0"] - fitted["weights.0"]).max()
    assert 0 < moved < 8 * 5 * 0.021, "a step of Adam moves an entry by the learning rate at most"
    assert weights["content.neighbours"].shape == (32, 5)
    used = build_graph(weights["content.neighbours"])
    start = load_graph(store.artifact("joint", "ml.graph"), torch.device("cpu")).matrix
    assert not np.array_equal(used.toarray(), start.toarray()), "the best epoch's graph is another"
    staged = {"etl.interactions", "etl.features", "ml.refine", "ml.graph", "ml.behaviour"}
    assert set(store.artifact("planted", "ml.train").manifest["inputs"]) == staged


def test_a_missing_input_and_an_unknown_part_are_typed_errors(finished: Path) -> None:
    extra = ("train.seed=7",)
    assert train.main(flags(finished, "empty", "", extra)) == EXIT_ARTIFACT
    assert train.main(flags(finished, "planted", "0")) == EXIT_CONFIG
    assert knn.main(flags(finished, "planted", "2")) == EXIT_CONFIG


@pytest.mark.slow
def test_a_training_job_killed_with_signal_9_ends_with_the_same_result(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    undisturbed = open_store(str(finished)).artifact("planted", "ml.train").manifest["content"]
    shutil.copytree(finished, tmp_path / "store")
    for stage in ("ml.train", "ml.evaluate"):
        shutil.rmtree(tmp_path / "store" / stage)
        (tmp_path / "store" / "runs" / "planted" / f"{stage}.json").unlink()
    store = open_store(str(tmp_path / "store"))
    process = JobProcess("jobs.ml.train", flags(tmp_path / "store", "planted"), tmp_path / "killed")
    scratch = Path(store.storage.uri) / ".scratch" / "ml.train"
    while not list(scratch.glob("*.work/checkpoint.json")):
        assert process.running, "the job ended before it was killed"
        time.sleep(0.01)
    process.process.kill()
    assert process.wait() == -signal.SIGKILL
    assert store.entry("planted", "ml.train") is None
    assert store.storage.names("ml.train") == []
    assert "resume epoch=" not in process.said()
    capfd.readouterr()
    assert train.main(flags(tmp_path / "store", "planted")) == EXIT_OK
    assert "resume epoch=" in capfd.readouterr().err
    assert store.artifact("planted", "ml.train").manifest["content"] == undisturbed


@pytest.mark.slow
def test_refining_killed_with_signal_9_on_two_ranks_ends_with_the_rows_of_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path / "store", tmp_path / "scratch")
    extra = ("runtime.world_size=2", "refine.chunk_size=16384")
    argv = flags(tmp_path / "store", "planted", "", extra)
    command = [sys.executable, "-m", "jobs.ml.refine", *argv]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    work = tmp_path / "store" / ".scratch" / "ml.refine"
    while not list(work.glob("*.work/fit.json")):
        assert process.poll() is None, "the job ended before it was killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    monkeypatch.setattr(launch, "LaunchConfig", forkserver_ranks)
    assert refine.main(argv) == EXIT_OK
    assert "resume the fit is done" in capfd.readouterr().err
    one, two = (open_store(str(path)).artifact("planted", "ml.refine") for path in (finished, tmp_path / "store"))
    two.verify()
    assert sorted(two.manifest["files"]) == sorted(one.manifest["files"])
    for name in ("items", "users", "fused_items", "fused_users"):
        found, expected = (np.load(artifact.file(f"{name}.npy")) for artifact in (two, one))
        assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


def test_two_ranks_listen_on_loopback_only_and_stop_on_sigterm(tmp_path: Path) -> None:
    plant(tmp_path / "store", tmp_path / "scratch")
    extra = ("runtime.world_size=2", "train.num_epochs=100000", "train.patience=100000")
    store = open_store(str(tmp_path / "store"))
    store.start_run("long", load_config(None, [*SETTINGS, *extra]))
    store.record("long", "etl.interactions", {"fingerprint": "planted"})
    command = [sys.executable, "-m", "jobs.ml.behaviour", *flags(tmp_path / "store", "long", "", extra)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        while not list((tmp_path / "store" / ".scratch").glob("ml.behaviour/*.work/checkpoint.json")):
            assert process.poll() is None, "the job ended before it trained"
            time.sleep(0.05)
        agent = psutil.Process(process.pid)
        found = [
            connection.laddr.ip
            for each in (agent, *agent.children(recursive=True))
            for connection in each.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert set(found) == {"127.0.0.1"} and len(found) >= 3, "a store, and a socket of gloo for each rank"
    assert process.returncode == EXIT_UNEXPECTED and "error=TrainingStopped" in said
    assert launch.SHUTDOWN_SECONDS > 60, "nobody was killed above, and a step at scale takes half a minute"


def test_two_nodes_train_as_one_with_two_processes_does(tmp_path: Path) -> None:
    """Each node is told its rank as Kubeflow Trainer tells a pod; the first one's artifact is the result of both."""
    contents = {}
    for name, nodes in (("one", 1), ("two", 2)):
        place = tmp_path / name / "store"
        plant(place, tmp_path / name / "scratch")
        extra = (f"runtime.world_size={2 // nodes}", "train.num_epochs=3")
        store = open_store(str(place))
        store.start_run("nodes", load_config(None, [*SETTINGS, *extra]))
        store.record("nodes", "etl.interactions", {"fingerprint": "planted"})
        argv = flags(place, "nodes", "", extra)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        placed = {"PET_NNODES": str(nodes), "PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": str(port)}
        processes = [
            JobProcess(
                "jobs.ml.behaviour",
                argv,
                tmp_path / name / f"node-{rank}",
                placed | {"PET_NODE_RANK": str(rank)},
                _fork_ranks,
            )
            for rank in range(nodes)
        ]
        assert [process.wait() for process in processes] == [EXIT_OK] * nodes, [each.said() for each in processes]
        answers = [json.loads(process.printed().splitlines()[-1]) for process in processes]
        assert [answer["status"] for answer in answers] == ["done", "joined"][:nodes]
        contents[name] = {answer["content"] for answer in answers}
        assert len(store.storage.names("ml.behaviour")) == 1
    assert len(contents["one"]) == 1
    assert contents["one"] == contents["two"]


def _fork_ranks() -> None:
    launch.LaunchConfig = forked_ranks


@pytest.mark.parametrize(
    "variables",
    [
        {"PET_NNODES": "2", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "a"},
        {"PET_NNODES": "2", "PET_NODE_RANK": "1"},
        {"PET_NNODES": "auto", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "a"},
    ],
)
def test_a_node_that_cannot_be_is_a_typed_error(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="describe no node of a training"):
        Node.here()


def test_a_node_whose_rank_is_no_number_ends_with_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PET_NNODES": "2", "PET_NODE_RANK": "first", "PET_MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)
    assert behaviour.main(flags(tmp_path / "store", "nodes")) == EXIT_CONFIG


def test_ranks_are_no_more_than_the_devices_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch.num_processes(Runtime(device="cuda", world_size=8)) == 1
    assert launch.num_processes(Runtime(device="cpu", world_size=8)) == 8


def test_a_pod_without_a_gpu_makes_the_graph_of_a_run_that_has_them(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    store = open_store(str(finished))
    extra = ("knn.certificate_sample=30", "runtime.device=cuda")
    store.start_run("no-gpu", load_config(None, [*SETTINGS, *extra]))
    for stage, part in (("etl.interactions", ""), ("ml.refine", ""), ("ml.knn", "0"), ("ml.knn", "1")):
        label = STAGES[stage].label(part)
        store.record("no-gpu", label, store.entry("planted", label) or {})
    assert graph.main(flags(finished, "no-gpu", "", extra)) == EXIT_OK


def test_a_damaged_input_of_the_right_size_is_never_used(finished: Path) -> None:
    store = open_store(str(finished))
    extra = ("evaluate.seed=5",)
    store.start_run("damaged", load_config(None, [*SETTINGS, *extra]))
    for stage in ("etl.interactions", "ml.refine", "ml.behaviour", "ml.train"):
        store.record("damaged", stage, store.entry("planted", stage) or {})
    trained = store.artifact("planted", "ml.train").file("embeddings.safetensors")
    sound = trained.read_bytes()
    trained.write_bytes(sound[:-8] + bytes(8))
    try:
        assert evaluate.main(flags(finished, "damaged", "", extra)) == EXIT_ARTIFACT
        assert store.entry("damaged", "ml.evaluate") is None
    finally:
        trained.write_bytes(sound)
    assert evaluate.main(flags(finished, "damaged", "", extra)) == EXIT_OK


@pytest.mark.parametrize("run", ["../escape", "a/b", "", ".hidden", "x" * 129])
def test_a_run_id_that_is_no_file_name_is_refused(tmp_path: Path, run: str) -> None:
    assert refine.main(flags(tmp_path / "store", run)) == EXIT_CONFIG
    assert not (tmp_path / "escape").exists()


@record
def _refuse(*_: object) -> None:
    raise DataError("Nothing is there.", "Deliver it.")


def test_what_a_rank_refuses_ends_the_job_as_it_would_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "LaunchConfig", forkserver_ranks)
    config = load_config(None, [*SETTINGS, "runtime.world_size=2"])
    with pytest.raises(DataError, match=r"Rank \d of 2: Nothing is there") as caught:
        launch.start_ranks(_refuse, "ml.train", ("store", "run", config))
    assert caught.value.remedy == "Deliver it."


def test_a_training_goes_on_where_the_server_of_its_live_curve_is_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path / "store", tmp_path / "scratch")
    (tmp_path / "file").touch()
    away = f"runtime.registry=sqlite:///{tmp_path}/file/mlflow.db"
    argv = flags(tmp_path / "store", "planted", extra=("runtime.live_curves=true", away))
    assert behaviour.main(argv) == EXIT_OK
    log = capsys.readouterr().err
    assert "no_live_curve run=planted" in log and "does not answer" in log
    assert open_store(str(tmp_path / "store")).artifact("planted", "ml.behaviour").file("curve.json").exists()
