"""Remedies of wrong configurations name the form of a field and what it may hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from crane_core.config_file import load_config
from crane_core.errors import ConfigError
from crane_core.raw.importers.mapped import read_mapping

WINDOW = ["window.start=2026-03-01", "window.end=2026-03-02"]


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("etl.k_core=0", "Give --set etl.k_core=VALUE, a whole number at least 1 (default 1)."),
        ("etl.history_days=0", "Give --set etl.history_days=VALUE, a whole number at least 1 or null (default None)."),
        ("crane.loss=mse", "Give --set crane.loss=VALUE, one of softmax, bpr (default 'softmax')."),
        (
            "features.modalities=3",
            "Give --set features.modalities=VALUE, a list such as [A, B], each text (default []).",
        ),
        (
            "etl.event_weights={view: much}",
            "Give --set etl.event_weights=VALUE, a mapping such as {A: B}, each value a number (default {}).",
        ),
        (
            "window.start=soon",
            "Give --set window.start=VALUE, a time such as 2026-03-01 or 2026-03-01T12:00:00+00:00.",
        ),
        ("window.start=2026-03-03", "Give --set window.start=VALUE and --set window.end=VALUE."),
    ],
)
def test_a_wrong_value_is_told_what_is_allowed(override: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*WINDOW, override])
    assert caught.value.remedy == remedy


@pytest.mark.parametrize(
    ("override", "known", "guess"),
    [("knn.num_shard=2", "knn has the fields", "num_shards"), ("trian.seed=1", "the top level has", "train")],
)
def test_a_misspelt_name_is_told_which_there_are(override: str, known: str, guess: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*WINDOW, override])
    assert known in caught.value.remedy and caught.value.remedy.endswith(f"perhaps {guess}.")


def test_several_wrong_fields_are_all_told() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*WINDOW, "knn.k=0", "train.seed=x"])
    assert "knn.k=VALUE" in caught.value.remedy and "train.seed=VALUE" in caught.value.remedy


def test_a_mapping_file_is_told_in_its_own_form(tmp_path: Path) -> None:
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text("dataset: x\ninteractions: {files: [a.csv], columns: {usr: id}, time: zz}\nitems: {files: 3}\n")
    with pytest.raises(ConfigError) as caught:
        read_mapping(mapping)
    assert "each key one of user_id, item_id, event_time" in caught.value.remedy
    assert "Give interactions.time: VALUE in the mapping, text" in caught.value.remedy
    assert "interactions.time: Value error, none of iso, s, ms, us, ns and no format" in str(caught.value)
    assert "Give items.columns: VALUE in the mapping" in caught.value.remedy
