"""Data sets on which several importers are tested."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.worlds.sources import LOG, MOVIES, RATED


@pytest.fixture
def mmrec(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tiny.inter").write_text(LOG)
    np.save(folder / "text_feat.npy", np.arange(6, dtype=np.float32).reshape(3, 2))
    np.save(folder / "audio_deep_feat.npy", np.array([[np.nan], [1], [2]], dtype=np.float16))
    (folder / "items.tsv").write_text('itemID\tartist\tname\n1\t7\tThe "B" side\n0\t8\tA\n')
    return folder


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    wheel = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", RATED)
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.item", MOVIES)
    return wheel
