import dataclasses
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save_file

from crane_core.errors import ArtifactError, DataError
from crane_core.serving import CHECKSUMS, load_model, make_probe, smoke_test
from crane_core.store import sha256_file
from crane_core.tensors import tensor_shapes
from tests.unit.served import write


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


def test_items_out_of_use_are_recommended_to_nobody(folder):
    model = load_model(folder)
    item_rows = model.item_embeddings.copy()
    item_rows[model.item_ids.get_loc("b")] = 0
    table = ask(dataclasses.replace(model, item_embeddings=item_rows), "ann", "nobody")
    assert table["item_ids"].tolist() == [["d", "c"], ["a", "c", "d"]]


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
    monkeypatch.setattr("crane_core.serving.USER_BLOCK", 1)
    pd.testing.assert_frame_equal(ask(model, "bob", "nobody", "ann", "cyd"), expected)


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.safetensors",
        "weights.safetensors",
        "seen.safetensors",
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


def test_smoke_test_passes_and_catches_a_wrong_model(folder, tmp_path):
    model = load_model(folder)
    ids = [pa.chunked_array([index.to_numpy()]) for index in (model.user_ids, model.item_ids)]
    probe = make_probe(model.user_embeddings, model.item_embeddings, model.seen, *ids, np.arange(3), k=3)
    assert probe["answers"][0] == {"user_id": "ann", "item_ids": ["b", "d", "c"], "scores": [2.0, 1.0, 0.0]}

    def predict(table, params):
        return model.predict(table, params)

    assert smoke_test(predict, probe) == 3
    items = {"a": [3.0, 0.0], "b": [2.0, 2.0], "c": [3.0, 0.0], "d": [1.0, 0.0]}
    other = load_model(write(tmp_path / "other", items=items))
    with pytest.raises(ArtifactError, match="to user 'ann'"):
        smoke_test(lambda table, params: other.predict(table, params), probe)
    with pytest.raises(ArtifactError, match="no fallback"):
        smoke_test(lambda table, params: predict(table, params).assign(fallback=False), probe)
