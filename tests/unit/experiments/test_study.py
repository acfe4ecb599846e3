"""Studies: each trial is trained once, a kill costs no more than an epoch, a budget cuts, wrong flags are refused."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from crane_core.config import Phi
from crane_core.errors import EXIT_CONFIG, EXIT_DATA, ConfigError, DataError
from crane_core.experiments.data import Dataset
from crane_core.experiments.plans import changed
from crane_core.experiments.report import render
from crane_core.experiments.study import Budget
from crane_core.model.crane import Crane
from crane_core.model.lightgcn import LightGCN
from jobs import cli
from tests.worlds.experiments import RECIPE, flags, forkserver, study


def _killed_after(num_epochs: int, argv: list[str]) -> None:
    """Run a command that is killed when the epoch after so many begins."""
    torch.set_num_threads(1)
    begun = 0

    def dying(start: Callable[..., None]) -> Callable[..., None]:
        def start_epoch(self: LightGCN, epoch: int) -> None:
            nonlocal begun
            begun += 1
            if begun > num_epochs:
                os.kill(os.getpid(), signal.SIGKILL)
            start(self, epoch)

        return start_epoch

    Crane.start_epoch, LightGCN.start_epoch = dying(Crane.start_epoch), dying(LightGCN.start_epoch)  # type: ignore[method-assign]
    sys.exit(cli.main(argv))


class TestCommand:
    @pytest.mark.slow
    def test_killed_between_epochs_and_cells_it_goes_on(
        self, folder: Path, tmp_path: Path, capsys, no_drawing: None
    ) -> None:
        only = ["--only", "profiles", "--seeds", "0", "1"]
        for epochs in (3, 2):
            argv = flags(folder, tmp_path / "killed", *only)
            process = forkserver().Process(target=_killed_after, args=(epochs, argv))
            process.start()
            process.join()
            assert process.exitcode == -signal.SIGKILL
        assert len(list((tmp_path / "killed" / "cells").glob("[!.]*"))) == 1
        for out in ("killed", "whole"):
            assert cli.main(flags(folder, tmp_path / out, *only)) == 0
        lines = capsys.readouterr()
        killed, whole = map(json.loads, lines.out.splitlines())
        assert "found=1 to_make=1" in lines.err, "the trial that was done is found"
        assert whole["complete"] and killed["complete"]
        assert killed["experiments"] == whole["experiments"], "bit for bit what an undisturbed run finds"

    def test_problems_end_with_their_code(self, folder: Path, tmp_path: Path, capsys) -> None:
        assert cli.main(flags(folder, tmp_path / "out", "--only", "rca", "phy")) == EXIT_CONFIG
        assert "modalities, search" in json.loads(capsys.readouterr().out)["remedy"]
        for path in folder.glob("*_feat.npy"):
            path.unlink()
        assert cli.main(flags(folder, tmp_path / "out")) == EXIT_DATA
        assert "no item features" in json.loads(capsys.readouterr().out)["found"]

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--seeds", "0", "-1"), "-1 is no seed"),
            (("--seeds", str(2**31)), "is no seed"),
            (("--set", "train.seed=-1"), "train.seed"),
            (("--threads", "0"), "--threads 0"),
            (("--set", "features.modalities=[noise, telling, noise]"), "names noise more than once"),
        ],
        ids=str,
    )
    def test_a_wrong_flag_is_a_config_error(self, folder: Path, tmp_path: Path, capsys, more, said: str) -> None:
        assert cli.main(flags(folder, tmp_path / "out", *more)) == EXIT_CONFIG
        assert said in json.loads(capsys.readouterr().out)["found"]
        assert not list(tmp_path.glob("out/cells/*"))

    @pytest.mark.parametrize("below", ["", "out"])
    def test_a_file_is_no_folder_for_results(self, folder: Path, tmp_path: Path, capsys, below: str) -> None:
        (tmp_path / "taken").write_text("mine")
        assert cli.main(flags(folder, tmp_path / "taken" / below)) == EXIT_CONFIG
        assert str(tmp_path / "taken") in json.loads(capsys.readouterr().out)["found"]
        assert (tmp_path / "taken").read_text() == "mine"


class TestStudy:
    def test_shared_cells_are_trained_once_and_the_first_seed_first(
        self, dataset: Dataset, tmp_path: Path, trainings: list
    ) -> None:
        names = ["rca", "neighbours", "profiles", "modalities"]
        study(dataset, tmp_path, seeds=(0, 1)).run(names, 0)
        assert len(trainings) == 2 * (1 + 5 + 3 + 1 + 2)
        assert [recipe.train.seed for _, recipe in trainings] == [0] * 12 + [1] * 12
        assert trainings[0][1] == RECIPE.with_seed(0), "the default first"

    def test_what_needs_no_training_is_measured_after_the_first_seed(
        self, dataset, tmp_path, trainings, monkeypatch
    ) -> None:
        monkeypatch.setattr("crane_core.experiments.study.catalog_sizes", lambda _: [64])
        said: list[str] = []
        study(dataset, tmp_path, seeds=(0, 1), show=lambda what, _: said.append(what)).run(["profiles", "cost"], 0)
        assert said == ["trials"] * 3 + ["cost"] * len(get_args(Phi)) + ["trials"] * 3

    def test_a_budget_that_ends_leaves_the_rest(self, dataset: Dataset, tmp_path: Path, trainings: list) -> None:
        class Two(Budget):
            def allows(self, seconds: float) -> bool:
                return len(trainings) < 2

        results = study(dataset, tmp_path, budget=Two(None)).run(["neighbours"], 0)
        found = results["experiments"]["neighbours"]
        assert results["missing"] == ["neighbours: k = 15, seed 0", "neighbours: k = 20, seed 0"]
        assert "2 of 4 variants are not measured yet" in found["answer"]
        assert "not measured" in render(results | {"seconds": 1.0})

    def test_features_and_seeds_are_needed(self, dataset: Dataset, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no item features"):
            study(replace(dataset, features={}), tmp_path)
        with pytest.raises(DataError, match="no features audio"):
            study(dataset, tmp_path, changed(RECIPE, {"features.modalities": ("audio",)}))
        with pytest.raises(ConfigError, match="No seed"):
            study(dataset, tmp_path, seeds=())
