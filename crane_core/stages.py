"""The stages of the pipeline: for each one its version, inputs, raw data, configuration and parts.

All that decides a stage's output is in this table. Its fingerprint is made of it and of nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from crane_core.config import RunConfig
from crane_core.config_file import MOVED
from crane_core.errors import ConfigError
from crane_core.model_config import Choices, CraneSettings, LightGCNSettings
from crane_core.raw.files import list_features, list_interactions, list_items, raw_root
from crane_core.storage.artifacts import Artifact, ArtifactStore
from crane_core.storage.exports import exported_before

WHOLE = ""
"""The one part of a stage that is not mapped."""
REFINE_BASE = ("etl.interactions", "etl.features", "etl.profiles", "ml.refine")
"""Stages of `etl.base_run` that `ml.refine` reads when it grows."""
KNN_BASE = ("ml.refine", "ml.graph")
"""Stages of `etl.base_run` that `ml.knn` reads when it grows."""

Source = Callable[[RunConfig, ArtifactStore], Any]
"""Identity, as JSON values, of what a stage reads beside its inputs: raw files, or artifacts of another run."""


def _interactions_source(config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    root = raw_root(config, store.storage.uri)
    files = list_interactions(root, config.window, config.etl) + list_items(root)
    base = base_interactions(config, store)
    return {"files": [file.identity for file in files], "base": base and base.manifest["content"]}


def _features_source(config: RunConfig, store: ArtifactStore) -> dict[str, list[list[str | int]]]:
    listed = list_features(raw_root(config, store.storage.uri), config.features.modalities)
    return {name: [file.identity for file in files] for name, files in listed.items()}


def _refine_source(config: RunConfig, store: ArtifactStore) -> list[str | int] | None:
    contents = base_contents(config, store, REFINE_BASE)
    # The drift is counted in neighbours.
    return None if contents is None else [*contents, config.knn.k]


def _knn_source(config: RunConfig, store: ArtifactStore) -> list[str] | None:
    return base_contents(config, store, KNN_BASE)


def _lists_source(config: RunConfig, store: ArtifactStore) -> dict[str, Any] | None:
    lists = exported_before(config, store)
    return lists.facts() if lists else None


def base_contents(config: RunConfig, store: ArtifactStore, stages: tuple[str, ...]) -> list[str] | None:
    """Return the content checksums of some stages of `etl.base_run`; None where the run does not grow."""
    run = config.etl.base_run
    if run is None or config.refine.max_drift == 0:
        return None
    entries = [store.entry(run, stage) for stage in stages]
    return [entry["content"] for entry in entries if entry] if all(entries) else None


def base_interactions(config: RunConfig, store: ArtifactStore) -> Artifact | None:
    """Return the interactions of the run whose ids are kept; None when `etl.base_run` names none.

    Raises:
        ConfigError: that run's window does not end before this one's: its ids would come from the future.
        ArtifactError: that run has no interactions.
    """
    run = config.etl.base_run
    if run is None:
        return None
    base = store.artifact(run, "etl.interactions")
    end = datetime.fromisoformat(base.facts["cutoffs"]["end"])
    if end >= config.window.end:
        raise ConfigError(
            f"etl.base_run={run} ends at {end:%Y-%m-%d %H:%M} UTC, this run at {config.window.end:%Y-%m-%d %H:%M}: "
            "ids can only be taken from an earlier window.",
            "Name a run whose window ends before this one's.",
        )
    return base


Names = Callable[[RunConfig], tuple[str, ...]]
"""Names that depend on the configuration of a run."""


def _fixed(*names: str) -> Names:
    return lambda config: names


_NOTHING = _fixed()
_ONE_PART = _fixed(WHOLE)


def _chosen(config: RunConfig, *names: str) -> tuple[str, ...]:
    return names if config.choices else ()


def _joint(config: RunConfig, *names: str) -> tuple[str, ...]:
    return names if config.crane.mode == "joint" else ()


def _staged(config: RunConfig, *names: str) -> tuple[str, ...]:
    return names if config.crane.mode == "staged" else ()


def _ruled(config: RunConfig) -> tuple[str, ...]:
    """Sections that decide what may be shown: the rules, if there are any, and the instant at which they are read."""
    return ("export", "window") if config.export.rules.are_set() else ()


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: `<group>.<stage>`; the module `jobs.<name>` runs it.
        version: raised when the meaning of its output changes.
        inputs: stages whose artifacts it reads.
        obeys: sections of `RunConfig` that decide its output.
        ignores: fields `section.field` of these sections that cannot change its output.
        source: identity of what it reads beside its inputs.
        parts: names of the independent parts that it is mapped over; one, `WHOLE`, for a stage in one piece.
    """

    name: str
    version: int
    inputs: Names
    obeys: Names
    ignores: Names = _NOTHING
    source: Source = lambda config, store: None
    parts: Names = _ONE_PART

    def label(self, part: str) -> str:
        """Return the name of a part in the store: `ml.graph`, or `ml.knn.0` where the stage is mapped."""
        return f"{self.name}.{part}" if part else self.name

    def labels(self, config: RunConfig) -> list[str]:
        """Return the labels of all its parts."""
        return [self.label(part) for part in self.parts(config)]

    def settings(self, config: RunConfig) -> dict[str, dict[str, Any]]:
        """Return the sections that it obeys, as JSON values.

        The fields that it ignores have their default, and are left out if they have none.
        """
        sections = self.obeys(config)
        settings = config.model_dump(mode="json", include=set(sections))
        for path in self.ignores(config):
            section, _, field = path.partition(".")
            if section in sections:
                known = type(getattr(config, section)).model_fields[field]
                settings[section].pop(field)
                if not known.is_required():
                    settings[section][field] = known.default
        return settings


_HOW_LISTS_ARE_FOUND = ("knn.num_shards", "knn.memory")
"""Fields of `knn` that decide how lists of neighbours are found and not which they are."""
_JUDGING_LISTS = ("knn.certificate_sample", "knn.min_recall")
"""Fields of `knn` that the certificate of the graph obeys."""
_SEARCHING_LISTS = ("knn.mode", "knn.exact_items", "knn.num_lists", "knn.num_probes")
_CHOOSING = ("train.num_epochs", "train.patience", "train.validation_users")
"""Fields of `train` that nothing obeys where the choices are given."""
_CHOICES_OF_CRANE = tuple(f"choices.{name}" for name in Choices.model_fields if name != "behaviour_epochs")
"""Choices that LightGCN's training does not obey."""
_CHOOSING_HEAD = ("head.half_lives", "head.history_half_lives", "head.cold_exposure")
_OF_TRAINING = ("head.history_half_lives", "head.content_axes", "head.cold_exposure")
"""Fields of `head` that the evaluation does not obey: it reads the half-lives of popularity alone."""

_NO_RULES = ("export.k", "export.num_similar", "window.start")
"""Fields of the sections `_ruled` that are no rules."""

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("etl.interactions", 4, _fixed(), _fixed("window", "etl"), source=_interactions_source),
        Stage("etl.features", 2, _fixed("etl.interactions"), _fixed("features"), source=_features_source),
        Stage("etl.profiles", 2, _fixed("etl.interactions", "etl.features"), _fixed("profiles")),
        Stage(
            "ml.refine",
            1,
            _fixed("etl.interactions", "etl.features", "etl.profiles"),
            _fixed("refine"),
            source=_refine_source,
        ),
        Stage(
            "ml.knn",
            2,
            _fixed("ml.refine"),
            _fixed("knn"),
            ignores=_fixed("knn.memory", *_JUDGING_LISTS),
            source=_knn_source,
            parts=lambda config: tuple(str(number) for number in range(config.knn.num_shards)),
        ),
        Stage(
            "ml.graph",
            2,
            _fixed("etl.interactions", "ml.refine", "ml.knn"),
            _fixed("knn"),
            ignores=_fixed(*_HOW_LISTS_ARE_FOUND),
        ),
        Stage(
            "ml.behaviour",
            2,
            _fixed("etl.interactions"),
            lambda config: ("train", "lightgcn", *_chosen(config, "choices")),
            ignores=lambda config: (
                "train.checkpoint_steps",
                *_chosen(config, *_CHOOSING, *_CHOICES_OF_CRANE),
            ),
        ),
        Stage(
            "ml.train",
            6,
            lambda config: (
                *("etl.interactions", "etl.features", "ml.refine", "ml.graph", "ml.behaviour"),
                *_joint(config, "etl.profiles"),
            ),
            lambda config: (
                *("train", "lightgcn", "crane", "head"),
                *_joint(config, "refine", "knn"),
                *_chosen(config, "choices"),
            ),
            ignores=lambda config: (
                "train.checkpoint_steps",
                *_chosen(config, *_CHOOSING, *_CHOOSING_HEAD, "choices.behaviour_epochs"),
                *_staged(config, "crane.joint_start", "crane.graph_epochs"),
                *_joint(config, *_HOW_LISTS_ARE_FOUND, *_JUDGING_LISTS, *_SEARCHING_LISTS),
            ),
        ),
        Stage(
            "ml.evaluate",
            8,
            _fixed("etl.interactions", "ml.refine", "ml.behaviour", "ml.train"),
            lambda config: ("evaluate", "head", *_ruled(config)),
            ignores=_fixed(*_OF_TRAINING, *_NO_RULES),
        ),
        Stage(
            "ml.live",
            1,
            _fixed("etl.interactions"),
            _fixed("window", "evaluate", "head"),
            ignores=_fixed("evaluate.user_block", *_OF_TRAINING),
            source=_lists_source,
        ),
        Stage(
            "ml.register",
            3,
            _fixed("etl.interactions", "ml.train", "ml.evaluate"),
            _ruled,
            ignores=_fixed(*_NO_RULES),
        ),
        Stage(
            "ml.export",
            6,
            _fixed("etl.interactions", "ml.train"),
            lambda config: _ruled(config) or ("export",),
            ignores=_fixed("window.start"),
        ),
    )
}


SHIPPED = tuple(STAGES)[: tuple(STAGES).index("ml.train") + 1]
"""The stages of a refit run."""


def list_settings(knn: Mapping[str, Any]) -> dict[str, Any]:
    """Return those fields of `knn` that decide which neighbours a list holds."""
    others = {path.partition(".")[2] for path in (*_HOW_LISTS_ARE_FOUND, *_JUDGING_LISTS)}
    return {name: value for name, value in knn.items() if name not in others}


def input_labels(stage: Stage, config: RunConfig) -> list[str]:
    """Return the label of every part of every input of a stage."""
    return [label for name in stage.inputs(config) for label in STAGES[name].labels(config)]


def fingerprint_of(stage: Stage, part: str, config: RunConfig, inputs: Mapping[str, str], source: Any) -> str:
    """Return the identity of a stage's work: equal fingerprints mean equal content.

    Args:
        stage: its name, version and settings enter.
        part: the part of a mapped stage.
        config: of the run.
        inputs: label of every part of every input to its content checksum.
        source: `stage.source` of the run.
    """
    payload = [stage.name, stage.version, part, _as_before(stage.settings(config)), dict(inputs), source]
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()[:32]


_NO_STAGE = {"etl": ("refit",), "evaluate": ("live_warn", "live_stop", "live_min_users")}
"""Fields by section that decide nothing that a stage makes, and that earlier versions did not have."""


def _as_before(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the settings as earlier versions named them, so that their artifacts are found.

    Fields of `MOVED` have their former names. Those of `_NO_STAGE` are left out.
    """
    for section in _NO_STAGE.keys() & settings.keys():
        kept = {name: value for name, value in settings[section].items() if name not in _NO_STAGE[section]}
        settings = settings | {section: kept}
    if "train" not in settings:
        return settings
    defaults = {"lightgcn": LightGCNSettings(), "crane": CraneSettings()}
    values = {name: section.model_dump(mode="json") for name, section in defaults.items()} | settings
    moved = {old: values[section][field] for old, (section, field) in MOVED.items()}
    kept = {name: value for name, value in settings.items() if name not in defaults}
    return kept | {"train": settings["train"] | moved}
