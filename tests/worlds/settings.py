"""Settings of models and their training, named by field."""

from __future__ import annotations

from typing import Any, TypeVar

from crane_core.model_config import ModelConfig

Config = TypeVar("Config", bound=ModelConfig)

_SECTIONS = ("train", "lightgcn", "crane", "head")


def changed(config: Config, **fields: Any) -> Config:
    """Return the configuration with other values of some fields, whichever section they are of."""
    homes = {field: section for section in _SECTIONS for field in type(getattr(config, section)).model_fields}
    return config.changed({f"{homes[name]}.{name}": value for name, value in fields.items()})


def model_config(**fields: Any) -> ModelConfig:
    """Return the defaults with other values of some fields."""
    return changed(ModelConfig(), **fields)
