import json
from datetime import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from crane_core.errors import ArtifactError, DataError
from crane_core.serving.model_folder import CHECKSUMS, load_model, load_recommender
from crane_core.storage.artifacts import Artifact, sha256_file
from crane_core.storage.tensors import tensor_shapes
from tests.worlds.served import write


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model")


def ask(model, *users: str, k: int = 20) -> pd.DataFrame:
    return model.predict(pd.DataFrame({"user_id": list(users)}), {"k": k})


def test_answers_by_hand(folder):
    table = ask(load_model(folder), "bob", "ann", "nobody", "ann")
    assert table["user_id"].tolist() == ["bob", "ann", "nobody", "ann"]
    # ann: b 2, d 1, c 0, a seen. bob: a 0, d 0 in index order, b and c seen.
    assert table["item_ids"].tolist()[:2] == [["a", "d"], ["b", "d", "c"]]
    assert table["scores"].tolist()[1] == [2.0, 1.0, 0.0]
    # Two users have b, one each a and c, none d.
    assert table["item_ids"][2] == ["b", "a", "c", "d"]
    assert table["fallback"].tolist() == [False, False, True, False]
    assert table["item_ids"][3] == table["item_ids"][1]


def test_list_length(folder):
    model = load_model(folder)
    assert ask(model, "ann", k=1)["item_ids"][0] == ["b"]
    with pytest.raises(DataError, match="k is 0"):
        ask(model, "ann", k=0)


def test_a_request_without_users_is_a_data_error(folder):
    with pytest.raises(DataError, match="hold no 'user_id'"):
        load_model(folder).predict(pd.DataFrame({"user": ["ann"]}))


def test_blocks_do_not_matter(folder, monkeypatch):
    model = load_model(folder)
    expected = ask(model, "bob", "nobody", "ann", "cyd")
    monkeypatch.setattr("crane_core.serving.model_folder.USER_BLOCK", 1)
    pd.testing.assert_frame_equal(ask(model, "bob", "nobody", "ann", "cyd"), expected)


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.safetensors",
        "weights.safetensors",
        "seen.safetensors",
        "popularity.safetensors",
        "users.parquet",
        "items.parquet",
        "model.json",
    ],
)
def test_a_changed_file_is_refused(folder, name):
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name} does not match its sha256"):
        load_model(folder)


def test_a_missing_and_an_added_file_are_refused(folder):
    (folder / "payload.pkl").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"payload\.pkl"):
        load_model(folder)
    (folder / "payload.pkl").unlink()
    (folder / "weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is damaged"):
        load_model(folder)


def test_no_checksums_no_model(folder):
    (folder / CHECKSUMS).unlink()
    with pytest.raises(ArtifactError, match=r"checksums\.json cannot be read"):
        load_model(folder)


def seal(folder):
    """Forge the checksums after a change."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in folder.iterdir()
        if path.name != CHECKSUMS
    }
    (folder / CHECKSUMS).write_text(json.dumps(files))


def test_tensors_of_another_size_are_refused_even_with_matching_checksums(folder):
    rows = load_file(folder / "embeddings.safetensors")
    save_file({**rows, "user_embeddings": rows["user_embeddings"][:2].copy()}, folder / "embeddings.safetensors")
    seal(folder)
    with pytest.raises(ArtifactError, match=r"user_embeddings': \(2, 2\)"):
        load_model(folder)


def test_a_safetensors_header_that_lies_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.int64)}, path)
    whole = path.read_bytes()
    assert tensor_shapes(path) == {"a": (2, 3), "b": (4,)}
    for broken in (whole[:-4], whole + b"\0" * 4, whole[:4], whole.replace(b"[2,3]", b"[3,3]")):
        path.write_bytes(broken)
        with pytest.raises(ArtifactError, match="declares"):
            tensor_shapes(path)


def test_tombstones_and_users_without_training_items_stay_in_the_pipeline(tmp_path):
    """Their numbers are never given to others, so the rows that are served are numbered anew."""
    for table in ("interactions", "users", "items"):
        (tmp_path / table).mkdir()
    met = [(0, 3, 0), (0, 1, 0), (2, 4, 0), (1, 4, 2), (3, 1, 1)]
    columns = dict(zip(("user_idx", "item_idx", "split"), zip(*met, strict=True), strict=True))
    columns |= {"weight": [1.0] * len(met), "event_time": [datetime(2026, 1, 5)] * len(met)}
    pq.write_table(pa.table(columns), tmp_path / "interactions" / "0.parquet")
    pq.write_table(pa.table({"user_idx": range(4), "user_id": list("abcd")}), tmp_path / "users" / "0.parquet")
    states = ["cold", "trained", "tombstone", "trained", "trained"]
    items = {"item_idx": range(5), "item_id": list("vwxyz"), "title": list("VWXYZ"), "state": states}
    pq.write_table(pa.table(items), tmp_path / "items" / "0.parquet")
    rows = {"user_embeddings": np.eye(4, 5, dtype=np.float32), "item_embeddings": np.eye(5, dtype=np.float32)}
    save_file(rows, tmp_path / "embeddings.safetensors")
    names = ("interactions", "users", "items", "embeddings.safetensors")
    facts = {"num_users": 4, "num_items": 5, "num_tombstones": {"users": 0, "items": 1}}
    artifact = Artifact(tmp_path, {"facts": facts, "files": dict.fromkeys(names)})
    found = load_recommender(artifact, artifact)
    assert found.user_ids.to_pylist() == ["a", "c"] and found.item_ids.to_pylist() == list("vwyz")
    assert found.titles.to_pylist() == list("VWYZ")
    np.testing.assert_array_equal(found.user_embeddings, rows["user_embeddings"][[0, 2]])
    np.testing.assert_array_equal(found.item_embeddings, rows["item_embeddings"][[0, 1, 3, 4]])
    assert found.seen.indptr.tolist() == [0, 2, 3] and found.seen.items.tolist() == [1, 2, 3]
    assert found.popularity.tolist() == [0, 1, 1, 1]
