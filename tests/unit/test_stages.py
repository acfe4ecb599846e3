"""What decides the output of every stage: its fingerprint changes with that, and with nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_origin

import pytest

from crane_core.config import Rules, RunConfig
from crane_core.config_file import load_config
from crane_core.model_config import Choices
from crane_core.stages import STAGES, fingerprint_of, input_labels

WINDOW = ["window.start=2026-01-01", "window.end=2026-02-01"]

BEFORE_THE_ROOMS = {
    "default": {
        "etl.interactions": "a276cb79ce86e20f6d6dd302b86c208c",
        "etl.features": "55c3c44bb1efa025ab60e25d2ee413e5",
        "etl.profiles": "7ddaa5527674181c990cf17138ae00ae",
        "ml.refine": "8d0768d5cdf7b7f6212bb5e36883a35c",
        "ml.knn.0": "d217bafd8f9ba43749e6ccc4c9000dd9",
        "ml.knn.1": "68e183cfa169da136730872c28d9186c",
        "ml.graph": "3850b3ebb54ee833826b527f900df9ea",
        "ml.behaviour": "6bbcacbcc898161e4042b3f7eadd2b7a",
        "ml.train": "fb089d3ed0f0fb78b1b9732303cf525a",
        "ml.evaluate": "fd5c22aae2da0861aac3d69259b80cad",
        "ml.register": "4f335c165870e7f84369294a619e3a5b",
        "ml.export": "67b4181843fdbcb465da141c91fcd10c",
    },
    "changed": {
        "etl.interactions": "a276cb79ce86e20f6d6dd302b86c208c",
        "etl.features": "55c3c44bb1efa025ab60e25d2ee413e5",
        "etl.profiles": "7ddaa5527674181c990cf17138ae00ae",
        "ml.refine": "b13c40146528fe85fccc06a8a5e852eb",
        "ml.knn.0": "ee7b2ca109b49884405730c709142c31",
        "ml.knn.1": "7408e1d62a88addbeba62d9e1a3ada17",
        "ml.graph": "8d50e4dd2a3ca4d9429d47600defdf47",
        "ml.behaviour": "6ce338f6054d3dc6885a7c9aaf5bb7fb",
        "ml.train": "7f122a635627b0e989f7c67549b9dc40",
        "ml.evaluate": "fd5c22aae2da0861aac3d69259b80cad",
        "ml.register": "4f335c165870e7f84369294a619e3a5b",
        "ml.export": "67b4181843fdbcb465da141c91fcd10c",
    },
    "joint": {
        "etl.interactions": "a276cb79ce86e20f6d6dd302b86c208c",
        "etl.features": "55c3c44bb1efa025ab60e25d2ee413e5",
        "etl.profiles": "7ddaa5527674181c990cf17138ae00ae",
        "ml.refine": "8d0768d5cdf7b7f6212bb5e36883a35c",
        "ml.knn.0": "ee7b2ca109b49884405730c709142c31",
        "ml.knn.1": "7408e1d62a88addbeba62d9e1a3ada17",
        "ml.graph": "8d50e4dd2a3ca4d9429d47600defdf47",
        "ml.behaviour": "9d264c9160d3d90228600ca2f50b0ab4",
        "ml.train": "b83033af54970f4b35eeec47a8556df7",
        "ml.evaluate": "fd5c22aae2da0861aac3d69259b80cad",
        "ml.register": "4f335c165870e7f84369294a619e3a5b",
        "ml.export": "67b4181843fdbcb465da141c91fcd10c",
    },
}
"""Fingerprints made by the code before it moved into packages and before `train` was split."""
RAISED = (
    *("etl.interactions", "etl.features", "etl.profiles", "ml.behaviour", "ml.train", "ml.evaluate"),
    *("ml.register", "ml.export"),
)
"""Stages whose version was raised since."""

DECIDES = {
    "window": ["etl.interactions", "ml.live"],
    "etl": ["etl.interactions"],
    "etl.refit": [],
    "features": ["etl.features"],
    "profiles": ["etl.profiles"],
    "refine": ["ml.refine"],
    "knn": ["ml.graph", "ml.knn"],
    "train": ["ml.behaviour", "ml.train"],
    "lightgcn": ["ml.behaviour", "ml.train"],
    "crane": ["ml.train"],
    "head": ["ml.evaluate", "ml.live", "ml.train"],
    "evaluate": ["ml.evaluate", "ml.live"],
    "promote": [],
    "export": ["ml.export"],
    "export.rules": ["ml.evaluate", "ml.export", "ml.register"],
    "runtime": [],
    # Fields that decide the output of other stages than the rest of their section.
    "features.modalities": ["etl.features"],
    "knn.num_shards": ["ml.graph", "ml.knn"],
    "knn.memory": [],
    "knn.certificate_sample": ["ml.graph"],
    "knn.min_recall": ["ml.graph"],
    "train.checkpoint_steps": [],
    "crane.joint_start": [],
    "crane.graph_epochs": [],
    "head.history_half_lives": ["ml.train"],
    "head.content_axes": ["ml.train"],
    "head.cold_exposure": ["ml.train"],
    "evaluate.user_block": ["ml.evaluate"],
    "evaluate.live_warn": [],
    "evaluate.live_stop": [],
    "evaluate.live_min_users": [],
}
"""Section or `section.field` to the stages whose output it decides in a staged run."""
JOINT = {
    "refine": ["ml.refine", "ml.train"],
    "knn.k": ["ml.graph", "ml.knn", "ml.train"],
    "crane.joint_start": ["ml.train"],
    "crane.graph_epochs": ["ml.train"],
    # Another mode reads other inputs and obeys other sections.
}
"""The entries that differ in a joint run."""

FIELDS = [
    f"{section}.{field}"
    for section, of in RunConfig.model_fields.items()
    if section != "choices"
    for field in of.annotation.model_fields  # type: ignore[union-attr]
]
CHOICES = Choices(behaviour_epochs=3, crane_epochs=4, crane_ranking="dot", share=0.5)
CHOSEN = {
    "choices.behaviour_epochs": ["ml.behaviour"],
    **{f"choices.{field}": ["ml.train"] for field in Choices.model_fields if field != "behaviour_epochs"},
    "train.num_epochs": [],
    "train.patience": [],
    "train.validation_users": [],
    "head.half_lives": ["ml.evaluate", "ml.live"],
    "head.history_half_lives": [],
    "head.cold_exposure": [],
}
"""Stages whose output a field decides where the choices are given, and where that differs."""


def configure(*overrides: str) -> RunConfig:
    return load_config(None, [*WINDOW, *overrides])


def fingerprints(config: RunConfig) -> dict[str, str]:
    """Of all parts, had every input and every raw file the same content."""
    return {
        stage.label(part): fingerprint_of(
            stage, part, config, {label: f"content-of-{label}" for label in input_labels(stage, config)}, ["raw"]
        )
        for stage in STAGES.values()
        for part in stage.parts(config)
    }


def other_value(config: RunConfig, path: str) -> Any:
    """A value that the field may take and does not have."""
    section, _, name = path.partition(".")
    field = type(getattr(config, section)).model_fields[name]
    value = getattr(getattr(config, section), name)
    special = {
        "window.start": "2025-12-01",
        "window.end": "2026-03-01",
        "etl.time_zone": "Asia/Tokyo",
        "etl.event_weights": {"view": 2.0},
        "features.modalities": ["text"],
        "evaluate.ks": [20],
        "promote.beats": ["popularity"],
        "export.rules": {"available": True},
        "head.half_lives": [3],
        "choices.head": {"edges": [0, 1], "popularity": 0.5, "channels": {}, "bias": [0, 0], "num_cold": 0},
        "head.history_half_lives": [3],
        "head.cold_exposure": 0.1,
    }
    if path in special:
        return special[path]
    options = get_args(field.annotation) if get_origin(field.annotation) is not None else ()
    texts = [option for option in options if isinstance(option, str)]
    if texts:
        return next(option for option in texts if option != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.125
    return "other" if str in (field.annotation, *options) else 2


def changed_stages(config: RunConfig, path: str) -> list[str]:
    """Stages whose fingerprints change with a field."""
    section, _, name = path.partition(".")
    tree = config.model_dump(mode="json")
    tree[section][name] = other_value(config, path)
    other = RunConfig.model_validate(tree)
    assert other != config
    before, after = fingerprints(config), fingerprints(other)
    labels = {label for label in {*before, *after} if before.get(label) != after.get(label)}
    return sorted({".".join(label.split(".")[:2]) for label in labels})


@pytest.mark.parametrize("path", FIELDS)
def test_a_field_changes_the_fingerprints_of_the_stages_whose_output_it_decides(path: str) -> None:
    section = path.partition(".")[0]
    expected = DECIDES.get(path, DECIDES[section])
    if path == "crane.mode":
        assert changed_stages(configure(), path) == ["ml.train"]
        return
    assert changed_stages(configure(), path) == expected
    joint = JOINT.get(path, JOINT.get(section, expected))
    assert changed_stages(configure("crane.mode=joint"), path) == joint


@pytest.mark.parametrize("path", [*FIELDS, *CHOSEN])
def test_a_refit_run_obeys_the_choices_and_what_led_to_none_of_them(path: str) -> None:
    config = configure().model_copy(update={"choices": CHOICES})
    section = path.partition(".")[0]
    if path == "crane.mode":
        return
    assert changed_stages(config, path) == CHOSEN.get(path, DECIDES.get(path, DECIDES.get(section)))


@pytest.mark.parametrize(
    "rules", [{"available": True}, {"repeat_categories": ["a"]}, {"max_per_category": 2}, {"boosts": {"a": {"b": 2}}}]
)
def test_every_rule_decides_what_is_shown_and_nothing_of_a_training(rules: dict[str, Any]) -> None:
    assert set(rules) < set(Rules.model_fields)
    tree = configure().model_dump(mode="json")
    ruled = RunConfig.model_validate(tree | {"export": {"rules": rules}})
    before, after = fingerprints(configure()), fingerprints(ruled)
    assert {label for label in before if before[label] != after[label]} == {"ml.evaluate", "ml.export", "ml.register"}
    # A rule is read at the end of the window; how long the lists are is a matter of the export alone.
    assert changed_stages(ruled, "window.end") == [
        *("etl.interactions", "ml.evaluate", "ml.export", "ml.live", "ml.register"),
    ]
    assert changed_stages(ruled, "window.start") == DECIDES["window"]
    assert changed_stages(ruled, "export.k") == ["ml.export"]


def test_choices_make_other_trainings_and_change_nothing_else() -> None:
    before, after = (fingerprints(each) for each in (configure(), configure().model_copy(update={"choices": CHOICES})))
    assert {label for label in before if before[label] != after[label]} == {"ml.behaviour", "ml.train"}


def test_every_section_and_every_exception_is_one_of_the_configuration() -> None:
    known = {*RunConfig.model_fields, *FIELDS}
    assert {*DECIDES, *JOINT} <= known
    assert set(RunConfig.model_fields) - {"choices"} <= set(DECIDES)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("default", ()),
        (
            "changed",
            (
                "lightgcn.num_layers=3",
                "crane.contrast_temperature=0.3",
                "crane.semantic_weight=scale",
                "train.num_epochs=7",
                "knn.k=12",
                "refine.phi=tanh",
            ),
        ),
        ("joint", ("crane.mode=joint", "knn.k=12")),
    ],
)
def test_artifacts_of_earlier_versions_are_found(name: str, overrides: tuple[str, ...]) -> None:
    found, before = fingerprints(configure(*overrides)), dict(BEFORE_THE_ROOMS[name])
    del found["ml.live"]
    for stage in RAISED:
        assert found.pop(stage) != before.pop(stage)
    assert found == before


def test_settings_in_their_former_section_still_count() -> None:
    former = ("train.num_layers=3", "train.temperature=0.3", "train.trust=scale", "train.mode=joint")
    today = ("lightgcn.num_layers=3", "crane.contrast_temperature=0.3", "crane.semantic_weight=scale")
    assert configure(*former) == configure(*today, "crane.mode=joint")


def test_fingerprint_changes_with_everything_that_decides_the_output() -> None:
    stage, config = STAGES["etl.features"], configure()
    inputs, source = {"etl.interactions": "c1"}, [["file", 1, 2]]
    reference = fingerprint_of(stage, "", config, inputs, source)
    assert fingerprint_of(stage, "", config, dict(inputs), [["file", 1, 2]]) == reference
    elsewhere = configure("runtime.spark_memory=9g", "knn.k=3", "etl.k_core=4")
    assert fingerprint_of(stage, "", elsewhere, inputs, source) == reference
    changed = [
        fingerprint_of(stage, "1", config, inputs, source),
        fingerprint_of(dataclasses.replace(stage, version=stage.version + 1), "", config, inputs, source),
        fingerprint_of(stage, "", configure("features.standardise=zscore"), inputs, source),
        fingerprint_of(stage, "", config, {"etl.interactions": "c2"}, source),
        fingerprint_of(stage, "", config, inputs, [["file", 1, 3]]),
        fingerprint_of(STAGES["etl.profiles"], "", config, inputs, source),
    ]
    assert len({reference, *changed}) == 7


def test_a_joint_training_reads_and_obeys_more() -> None:
    stage, staged, joint = STAGES["ml.train"], configure(), configure("crane.mode=joint")
    assert {*stage.inputs(joint)} - {*stage.inputs(staged)} == {"etl.profiles"}
    for override in ("refine.phi=softmax", "knn.k=3"):
        for mode, decides in (("staged", False), ("joint", True)):
            pair = [configure(f"crane.mode={mode}"), configure(f"crane.mode={mode}", override)]
            found = {fingerprint_of(stage, "", config, {}, None) for config in pair}
            assert (len(found) == 2) is decides, (mode, override)


def test_inputs_come_before_the_stage_that_reads_them() -> None:
    order = list(STAGES)
    for stage in STAGES.values():
        for mode in ("staged", "joint"):
            for name in stage.inputs(configure(f"crane.mode={mode}")):
                assert order.index(name) < order.index(stage.name)
