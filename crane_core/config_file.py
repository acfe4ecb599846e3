"""Read a configuration: a preset or a YAML file, and overrides on top of it."""

from __future__ import annotations

import copy
import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from crane_core.allowed import remedy_of
from crane_core.config import RunConfig
from crane_core.errors import ConfigError
from crane_core.model_config import CraneSettings, LightGCNSettings

EXAMPLE = "Write it as --set section.field=value, for example --set knn.k=20."
SHAPE = "Write sections with fields, for example the two lines `knn:` and `  k: 20`, or give the name of a preset."
_RENAMED = {"contrast_temperature": "temperature", "semantic_weight": "trust"}
MOVED = {
    _RENAMED.get(name, name): (section, name)
    for section, settings in (("lightgcn", LightGCNSettings), ("crane", CraneSettings))
    for name in settings.model_fields
}
"""Names that fields had in the section `train` before it was split, to their section and name today."""


def load_config(
    source: str | None, overrides: list[str] | None = None, recorded: dict[str, Any] | None = None
) -> RunConfig:
    """Read a preset or a YAML file, apply `section.field=value` overrides and validate.

    Args:
        source: path of a YAML file, or the name of a shipped preset.
        overrides: values are parsed as YAML, the last one wins; `section.part.field=value` for a section within one.
        recorded: the configuration to start from when there is no `source`; defaults only when None.

    Raises:
        ConfigError: unreadable file, unknown field or value out of range.
    """
    tree = upgraded(_read(source) if source else recorded or {})
    for override in overrides or []:
        path, sign, value = override.partition("=")
        *sections, field = path.split(".")
        if not (sign and sections and all(sections) and field):
            raise ConfigError(f"--set {override!r} is not of the form section.field=value.", EXAMPLE)
        try:
            _section(tree, sections, override)[field] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--set {override!r}: the value is not YAML.", f"Quote it: --set '{path}=\"TEXT\"'."
            ) from error
    try:
        return RunConfig.model_validate(upgraded(tree))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}, found {item['input']!r}" for item in error.errors()
        )
        raise ConfigError(
            f"{f'Configuration {source}' if source else 'The configuration'}: {problems}.",
            remedy_of(error, RunConfig, "--set {field}=VALUE"),
        ) from error


def _section(tree: dict[str, Any], path: list[str], override: str) -> dict[str, Any]:
    """Return a section of a tree, or a section within one such as `export.rules`; made where it is not there."""
    part = tree
    for name in path:
        if part.get(name) is None:
            part[name] = {}
        part = part[name]
        if not isinstance(part, dict):
            raise ConfigError(
                f"--set {override!r}: {name!r} is not a section.",
                f"Name one of the sections {', '.join(RunConfig.model_fields)}.",
            )
    return part


def upgraded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the fields of `MOVED` where they belong today.

    Files and recorded runs of earlier versions hold them in `train`.
    """
    found = copy.deepcopy(dict(tree))
    train = found.get("train")
    if not isinstance(train, dict):
        return found
    for old, (section, field) in MOVED.items():
        target = found.setdefault(section, {}) if old in train else None
        if isinstance(target, dict):
            target[field] = train.pop(old)
    return found


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    folder = importlib.resources.files("crane_core") / "presets"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _read(source: str) -> dict[str, Any]:
    if source in preset_names():
        text = (importlib.resources.files("crane_core") / "presets" / f"{source}.yaml").read_text()
    else:
        try:
            text = Path(source).read_text()
        except OSError as error:
            raise ConfigError(
                f"Configuration {source!r} cannot be read ({error}).",
                f"Give a YAML file or one of the presets {', '.join(preset_names())}.",
            ) from error
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"Configuration {source!r} is not YAML ({error}).", SHAPE) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"Configuration {source!r} is not a mapping.", SHAPE)
    return tree
