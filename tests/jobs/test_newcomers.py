"""`crane recommend --items` from the files of an export, as any system would read them."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file

from crane_core.config import Export
from crane_core.errors import EXIT_CONFIG, EXIT_OK, ArtifactError, ConfigError, DataError
from crane_core.model.fold_in import History
from crane_core.serving.export import write_export, write_recommendations
from crane_core.serving.model_folder import load_model
from crane_core.storage.artifacts import Artifact
from jobs import cli
from jobs.commands import query
from jobs.commands.newcomers import recommend_by_history
from jobs.commands.query import Served
from tests.worlds.served import recommender, write


@pytest.fixture
def champion(tmp_path: Path) -> Served:
    folder = tmp_path / "export"
    folder.mkdir()
    write_export(folder, recommender(), Export(k=3, num_similar=2), torch.device("cpu"))
    files = dict.fromkeys(path.name for path in folder.iterdir())
    return Served("7", "run-1", Artifact(folder, {"facts": {}, "files": files}))


@pytest.mark.parametrize(
    ("items", "times"),
    [
        (["a"], None),
        (["b", "a", "q"], ["2026-02-20T12:00:00+01:00", "2026-02-27", "2026-03-03"]),
        (["c", "d"], ["2026-03-05", "2026-03-09"]),
    ],
)
def test_the_files_give_the_lists_of_the_served_model(
    champion: Served, tmp_path: Path, items: list[str], times: list[str] | None
) -> None:
    asked = pd.DataFrame({"user_id": [""], "history": [items], "history_times": [times]})
    served = load_model(write(tmp_path / "model")).predict(asked, {"k": 4})
    answer = recommend_by_history(champion, items, times, 4)
    assert [row["item_id"] for row in answer["items"]] == served["item_ids"][0]
    np.testing.assert_allclose([row["score"] for row in answer["items"]], served["scores"][0], rtol=1e-6)
    assert answer["unknown_items"] == [item for item in items if item == "q"] and not answer["fallback"]
    assert answer["history"][0] == {"item_id": items[0], "title": f"Title of {items[0]}"}


def test_unknown_items_alone_get_what_is_popular(champion: Served) -> None:
    answer = recommend_by_history(champion, ["q", "q", "r"], None, 2)
    assert answer["fallback"] and answer["unknown_items"] == ["q", "r"]
    assert [row["item_id"] for row in answer["items"]] == ["b", "a"]
    assert answer["items"][0]["title"] == "Title of b"


def test_what_cannot_be_read_is_a_typed_error(champion: Served) -> None:
    with pytest.raises(DataError, match="no instant"):
        recommend_by_history(champion, ["a"], ["then"], 2)
    with pytest.raises(DataError, match="2 items and 1 times"):
        recommend_by_history(champion, ["a", "b"], ["2026-01-01"], 2)
    with pytest.raises(ConfigError, match="-k is 0"):
        recommend_by_history(champion, ["a"], None, 0)


def test_an_export_without_fold_in_says_how_to_get_one(champion: Served) -> None:
    path = champion.export.file("embeddings.safetensors")
    rows = load_file(path)
    save_file({name: rows[name] for name in ("user_embeddings", "item_embeddings")}, path)
    with pytest.raises(ArtifactError, match="cannot make a list of a history") as caught:
        recommend_by_history(champion, ["a"], None, 2)
    assert "crane promote" in caught.value.remedy


def test_a_user_is_told_what_an_item_is_for(
    champion: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Popularity alone, the second coordinate, would show c and b to ann; d comes of a, which ann has met."""
    model = recommender()
    history = History(model.seen.users(), model.seen.items, np.ones(len(model.seen.items)))
    export = tmp_path / "told"
    export.mkdir()
    write_recommendations(export / "recommendations", replace(model, history=history), 2)
    rows = pq.read_table(export / "recommendations").to_pylist()
    assert [(row["item_id"], row["because_item_id"]) for row in rows if row["user_id"] == "ann"] == [
        ("b", None),
        ("d", "a"),
    ]
    (champion.export.path / "recommendations" / "part-0.parquet").write_bytes((export / "recommendations").read_bytes())
    answer = query.recommend(champion, "ann", 2)
    assert [(row["because_item_id"], row["because_title"]) for row in answer["items"]] == [
        (None, None),
        ("a", "Title of a"),
    ]
    monkeypatch.setattr(query, "served", lambda *_: champion)
    monkeypatch.setattr(cli, "_store", lambda _: argparse.Namespace())
    assert cli.main(["recommend", "--user", "ann", "-k", "2"]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("(because of Title of a)") and "because" not in lines[0]


def test_an_export_without_reasons_still_answers(champion: Served) -> None:
    path = champion.export.path / "recommendations" / "part-0.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["because_item_id"]), path)
    answer = query.recommend(champion, "ann", 2)
    assert [row["item_id"] for row in answer["items"]] == ["b", "d"]
    assert answer["items"][0]["because_title"] is None


def test_the_command(champion: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(query, "served", lambda *_: champion)
    monkeypatch.setattr(cli, "_store", lambda _: argparse.Namespace())
    assert cli.main(["recommend", "--items", "a", "q", "--k", "2", "--json"]) == EXIT_OK
    assert [row["item_id"] for row in json.loads(capsys.readouterr().out)["items"]] == ["b", "c"]
    assert cli.main(["recommend", "--items", "a", "q", "-k", "2"]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "not known, and left out: q" and lines[1].split()[2] == "b" and len(lines) == 3
    assert cli.main(["recommend", "--items", "q"]) == EXIT_OK
    assert capsys.readouterr().out.startswith("nothing is known of these items; what is popular now:\n")
    for wrong in (["--user", "ann", "--items", "a"], [], ["--user", "ann", "--times", "2026-01-01"]):
        assert cli.main(["recommend", *wrong]) == EXIT_CONFIG
