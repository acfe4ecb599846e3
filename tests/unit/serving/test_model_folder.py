import json
from datetime import datetime, timedelta

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
from tests.worlds.served import END, write


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


DAY = timedelta(days=1)


def fold(model, *rows: tuple, k: int = 20) -> pd.DataFrame:
    """Ask for (user, history) or (user, history, times)."""
    columns = {name: [row[i] if len(row) > i else None for row in rows] for i, name in enumerate(COLUMNS)}
    return model.predict(pd.DataFrame(columns), {"k": k})


COLUMNS = ("user_id", "history", "history_times")


def test_lists_of_histories_by_hand(folder):
    """Rows: [2, 1] for a; [3, 1.5] for a two days before b; [1.5, 1.5] for the same two days earlier."""
    model, times = load_model(folder), [(END - 2 * DAY).isoformat(), END.isoformat()]
    earlier = [END - 4 * DAY, END - 2 * DAY]
    later = np.array(["2026-03-05", "2026-03-07"], dtype="datetime64[us]")
    table = fold(model, ("x", ["a"]), ("y", ["a", "b"], times), ("z", ["a", "b"], earlier), ("x", ["a", "b"], later))
    assert table["item_ids"].tolist() == [["b", "c", "d"], ["c", "d"], ["c", "d"], ["c", "d"]]
    expected = [[6.0, 3.0, 2.0], [4.5, 3.0], [4.5, 1.5], [4.5, 3.0]]
    for found, scores in zip(table["scores"], expected, strict=True):
        np.testing.assert_allclose(found, scores, rtol=1e-6)
    assert not table["fallback"].any() and table["unknown_items"].tolist() == [0, 0, 0, 0]


def test_a_repeated_item_counts_once_by_its_latest_event(folder):
    model = load_model(folder)
    times = [END - 2 * DAY, END - 9 * DAY, END]
    once, again = fold(model, ("x", ["a", "b"], times[::2])), fold(model, ("x", ["a", "a", "b"], times))
    pd.testing.assert_frame_equal(once, again)


def test_a_history_stands_in_place_of_what_is_known_of_a_user_and_what_both_hold_is_left_out(folder):
    table = fold(load_model(folder), ("bob", ["a"]), ("bob", None), ("bob", []), ("nobody", []))
    assert table["item_ids"].tolist() == [["d"], ["a", "d"], ["a", "d"], ["b", "a", "c", "d"]]
    assert table["fallback"].tolist() == [False, False, False, True]


def test_unknown_items_are_counted_and_change_nothing(folder):
    model = load_model(folder)
    known, mixed, none = (fold(model, ("x", ids)) for ids in (["a"], ["q", "a", "r"], ["q"]))
    assert [table["unknown_items"][0] for table in (known, mixed, none)] == [0, 2, 1]
    assert mixed["scores"][0] == known["scores"][0] and mixed["item_ids"][0] == known["item_ids"][0]
    assert none["fallback"][0] and none["item_ids"][0] == ["b", "a", "c", "d"]


def test_blocks_of_histories_do_not_matter(folder, monkeypatch):
    model = load_model(folder)
    rows = [("x", ["a"]), ("bob", None), ("y", ["b", "q"], [END, END]), ("z", ["q"]), ("ann", ["c", "d"])]
    expected = fold(model, *rows)
    for size in (1, 2):
        monkeypatch.setattr("crane_core.serving.model_folder.USER_BLOCK", size)
        pd.testing.assert_frame_equal(fold(model, *rows), expected)


@pytest.mark.parametrize(
    ("history", "times", "found"),
    [
        ("a", None, "no list"),
        (["a", None], None, "no item id"),
        ([["a"]], None, "no item id"),
        ([1.5], None, "no item id"),
        (["a"], ["2026-02-01", "2026-02-02"], "1 items and 2 times"),
        (["a"], ["yesterday-ish"], "no instant"),
        (["a"], [1767225600], "no instant"),
        (["a"], [None], "no instant"),
        (["a"], "2026-02-01", "no list"),
        ({"a": 1}, None, "no list"),
        (7, None, "no list"),
    ],
)
def test_a_history_that_cannot_be_read_is_a_data_error(folder, history, times, found):
    with pytest.raises(DataError, match=found) as caught:
        fold(load_model(folder), ("bob", None), ("x", history, times))
    assert "list of" in caught.value.remedy


def test_a_model_of_an_earlier_format_answers_everything_but_histories(folder):
    rows = load_file(folder / "embeddings.safetensors")
    old = {name: rows[name] for name in ("user_embeddings", "item_embeddings")}
    expected = ask(load_model(folder), "ann", "nobody")
    save_file(old, folder / "embeddings.safetensors")
    facts = json.loads((folder / "model.json").read_text())
    facts.pop("history")
    (folder / "model.json").write_text(json.dumps(facts | {"format": 1}))
    seal(folder)
    model = load_model(folder)
    pd.testing.assert_frame_equal(ask(model, "ann", "nobody"), expected)
    pd.testing.assert_frame_equal(fold(model, ("ann", None), ("nobody", [])), expected)
    with pytest.raises(ArtifactError, match="format 1") as caught:
        fold(model, ("ann", ["b"]))
    assert "crane run" in caught.value.remedy


@pytest.mark.parametrize(
    "history", [None, {}, {"weight": 1, "end": None, "blocks": []}, {"weight": 1, "end": "soon", "blocks": 3}]
)
def test_a_folder_that_does_not_say_how_to_fold_in_is_refused(folder, history):
    facts = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(facts | {"history": history}))
    seal(folder)
    with pytest.raises(ArtifactError, match="how to fold in"):
        load_model(folder)


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
