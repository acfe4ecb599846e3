"""The raw folder of an import: written once, complete or absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crane_core.errors import ConfigError, DataError
from crane_core.raw.importers import import_mmrec, import_movielens


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_second_import_touches_nothing_and_others_are_refused(mmrec: Path, movielens: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    first = import_mmrec(mmrec, raw)
    before = files_of(raw)
    second = import_mmrec(mmrec, raw)
    assert (first.is_new, second.is_new) == (True, False)
    assert second.modalities == first.modalities and second.start == first.start
    with pytest.raises(DataError, match=r"holds the dataset 'tiny' \(4 rows\), not this version of 'ml-100k'"):
        import_movielens(movielens, raw)
    np.save(mmrec / "text_feat.npy", np.zeros((3, 2)))
    with pytest.raises(DataError, match="not this version of 'tiny'"):
        import_mmrec(mmrec, raw)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"is not empty and holds no source\.json"):
        import_mmrec(mmrec, tmp_path / "foreign")
    assert files_of(raw) == before


@pytest.mark.parametrize("raw", ["/proc/none", "{folder}/tiny.inter/raw", "s3://bucket/raw"])
def test_a_folder_that_cannot_be_made_is_an_error(mmrec: Path, raw: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written|no folder of this machine") as caught:
        import_mmrec(mmrec, raw.format(folder=mmrec))
    assert caught.value.remedy and not Path("s3:").exists()


def test_failed_import_leaves_nothing(mmrec: Path, tmp_path: Path) -> None:
    np.save(mmrec / "text_feat.npy", np.zeros((2, 2)))
    with pytest.raises(DataError):
        import_mmrec(mmrec, tmp_path / "raw")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"source": {}, "imported": {}}', "\udcff", "number"])
def test_a_damaged_record_of_an_import_is_an_error(mmrec: Path, tmp_path: Path, damage: str) -> None:
    import_mmrec(mmrec, tmp_path / "raw")
    record = tmp_path / "raw" / "source.json"
    text = record.read_text().replace('"num_users"', '"num"') if damage == "number" else damage
    record.write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match=r"source\.json cannot be read") as caught:
        import_mmrec(mmrec, tmp_path / "raw")
    assert "another folder" in caught.value.remedy
