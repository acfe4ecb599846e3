from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from crane_core.config import Rules, RunConfig
from crane_core.config_file import load_config, preset_names
from crane_core.errors import ConfigError
from crane_core.model_config import Choices

WINDOW = ["window.start=2026-01-05", "window.end=2026-01-06"]


def test_last_override_wins_over_file_and_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("window: {start: 2026-01-05, end: 2026-01-06}\ntrain: {learning_rate: 0.5, num_layers: 3}\n")
    config = load_config(str(file), ["train.learning_rate=1e-3", "train.learning_rate=2.0e-3"])
    assert (config.train.learning_rate, config.lightgcn.num_layers, config.train.batch_size) == (0.002, 3, 2048)


@pytest.mark.parametrize(
    "text", ["2026-01-05", "2026-01-05T00:00:00", "2026-01-05T00:00:00+00:00", "2026-01-05T01:00:00+01:00"]
)
def test_window_is_utc_however_it_is_written(text: str) -> None:
    assert load_config(None, [f"window.start={text}", WINDOW[1]]).window.start == datetime(2026, 1, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.learningrate=1"], "train.learningrate: Extra inputs are not permitted, found 1"),
        (["train.learning_rate=-1"], "train.learning_rate: Input should be greater than 0, found -1"),
        (["trains.k=1"], "trains: Extra inputs are not permitted"),
        (
            ["etl.split=random"],
            "etl.split: Input should be 'temporal', 'leave_last', 'label' or 'none', found 'random'",
        ),
        (["etl.time_zone=Mars/Base"], "etl.time_zone: Value error, not a time zone of the IANA database"),
        *(
            (["etl.time_zone=" + name], "not a time zone")
            for name in ("Factory", "localtime", "posixrules", "posix/UTC")
        ),
        (["etl.event_weights={view: -1}"], "finite weights of 0 or more"),
        (["window.end=2026-01-05"], "must lie before window.end"),
        (["evaluate.ks=[5, 10]"], "evaluate.ks must hold positive numbers, 20 among them"),
        (["train"], "'train' is not of the form section.field=value"),
        (["train=1"], "is not of the form section.field=value"),
        ([".x=1"], "is not of the form section.field=value"),
        (["export..available=true"], "is not of the form section.field=value"),
        (["export.rules.most=3"], "export.rules.most: Extra inputs are not permitted"),
        (["export.k=3", "export.k.a=3"], "'k' is not a section"),
        (["export.rules.boosts={brand: {acme: 0}}"], "factors from 0.001 to 1000"),
    ],
)
def test_mistakes_name_the_field_and_what_was_found(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*WINDOW, *overrides])
    assert expected in caught.value.found and caught.value.remedy


def test_a_field_of_a_section_within_a_section_is_set_alone() -> None:
    overrides = ["export.rules={available: true}", "export.rules.max_per_category=3"]
    rules = load_config(None, [*WINDOW, *overrides]).export.rules
    assert rules == Rules(available=True, max_per_category=3)
    assert rules.are_set() and not Rules().are_set()
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*WINDOW, "export.rules.max_per_categry=3"])
    assert "perhaps max_per_category" in caught.value.remedy


def test_window_is_required() -> None:
    with pytest.raises(ConfigError, match="window: Field required"):
        load_config(None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a: [", "is not YAML"), ("- 1", "is not a mapping"), ("train: 3", "'train' is not a section")],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_config(str(file), [*WINDOW, "train.num_layers=1"])


def test_absent_file_lists_the_presets() -> None:
    with pytest.raises(ConfigError, match=r"'no\.yaml' cannot be read.*presets .*mmrec, movielens"):
        load_config("no.yaml", WINDOW)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid(name: str) -> None:
    assert load_config(name, WINDOW).window.start.year == 2026


def test_the_ways_to_train_have_names() -> None:
    staged, joint, paper = (load_config(name, WINDOW) for name in ("staged", "joint", "paper"))
    assert staged == load_config(None, WINDOW)
    assert joint == staged.changed({"crane.mode": "joint"})
    train, lightgcn, crane = paper.train, paper.lightgcn, paper.crane
    assert (crane.mode, crane.joint_start, crane.loss, crane.semantic_weight) == ("joint", "scratch", "bpr", "none")
    assert (crane.semantic_items, crane.semantic_users) == ("content", "profiles")
    assert (lightgcn.num_layers, crane.num_item_layers, train.learning_rate, train.batch_size) == (2, 1, 1e-3, 2048)
    assert (paper.refine.num_recursions, paper.knn.k, paper.profiles.aggregate) == (3, 10, "sum")
    assert paper.refine.embedding_dim == lightgcn.embedding_dim == 64


def test_a_recorded_run_is_the_start_unless_a_file_is_named(tmp_path: Path) -> None:
    recorded = load_config(None, [*WINDOW, "knn.k=7"]).identity()
    before = RunConfig.model_validate(recorded)
    assert load_config(None, ["train.num_layers=1"], recorded).knn.k == 7
    assert RunConfig.model_validate(recorded) == before
    file = tmp_path / "run.yaml"
    file.write_text("window: {start: 2026-01-05, end: 2026-01-06}")
    assert load_config(str(file), [], recorded).knn.k == 10


def test_where_a_run_happens_is_not_its_identity() -> None:
    here, there = (load_config(None, [*WINDOW, f"runtime.spark_memory={size}"]) for size in ("1g", "2g"))
    assert here.identity() == there.identity() and "runtime" not in here.identity()
    assert RunConfig.model_validate(here.identity()).window == here.window


def test_test_period_ends_at_the_end_and_validation_before_it() -> None:
    config = load_config(None, ["window.start=2026-01-20", "window.end=2026-01-21"])
    assert config.etl.cutoffs(config.window) == (datetime(2026, 1, 7, tzinfo=UTC), datetime(2026, 1, 14, tzinfo=UTC))


def test_configuration_is_frozen_and_every_field_is_described() -> None:
    config = load_config(None, WINDOW)
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 1
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()} | {"choices": Choices}
    for name, section in sections.items():
        assert section is not None
        for inner, described in section.model_fields.items():
            assert described.description, f"{name}.{inner}"
