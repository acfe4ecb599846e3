"""The page of the experiments."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from crane_core.config import Phi
from jobs import cli
from tests.worlds.experiments import flags


@pytest.mark.slow
def test_the_page_and_the_last_line(folder: Path, tmp_path: Path, capfd) -> None:
    assert cli.main(flags(folder, tmp_path / "out", "--only", "modalities", "--seeds", "0")) == 0
    ended = capfd.readouterr()
    (line,) = ended.out.splitlines()
    result = json.loads(line)
    page = Path(result["report"]).read_text()
    assert result["experiments"]["modalities"]["answer"] in page
    assert "all: noise + telling" in page and "<svg" in page
    assert not re.search(r'(src|href)="(?!#)|url\(http|@import', page), "it loads nothing"
    assert "left=" in ended.err and "validation_recall@20=" in ended.err
    results = json.loads(Path(result["results"]).read_text())
    table = results["experiments"]["modalities"]["table"]
    assert [row["label"] for row in table] == ["all: noise + telling", "noise", "telling"]
    curves = results["experiments"]["modalities"]["curves"]
    assert [len(curves[row["label"]]) for row in table] == [2, 2, 2], "an entry for each epoch"
    assert "Gradient norm: contrast" in page and "Effective rank" in page
    assert set(table[1]["profile_spread"]) == {"noise"}
    assert table[0]["difference"] is None and table[1]["difference"]["recall@20"]["low"] <= 0


def test_without_a_budget_left_the_page_says_what_is_missing(folder: Path, tmp_path: Path, capsys) -> None:
    argv = flags(folder, tmp_path / "out", "--budget-minutes", "0", "--only", "neighbours", "cost", "search")
    assert cli.main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert not result["complete"] and len(result["missing"]) == 12 + len(get_args(Phi)) + 4
    page = Path(result["report"]).read_text()
    assert "No answer yet: 0 of 4 variants are measured." in page
    assert "neighbours: k = 5, seed 2" in page and "search: 30 of 30 trials" in page
