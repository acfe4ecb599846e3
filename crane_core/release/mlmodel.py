"""Check of the file `MLmodel` of a registered model, before any code that it names can run."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import yaml

from crane_core.errors import ArtifactError

LOADER = "crane_core.serving"
"""Module that MLflow imports to load a model. It is written into every registered model and must never change."""
_ALLOWED = {"data", "env", "loader_module", "python_version"}
"""Fields of the flavor that only describe the model; others, such as `code` and `config`, can run or steer code."""


def served_folder(model: Path) -> Path:
    """Return the folder that `serving.model_folder.load_model` reads, inside a model as MLflow keeps it.

    `mlflow.pyfunc.load_model` imports whatever module the file `MLmodel` names, and puts the folder that it calls
    `code` first in Python's path. Call this function first wherever a model is loaded without `Registry.load`.

    Args:
        model: local folder with the file `MLmodel`.

    Raises:
        ArtifactError: the file cannot be read, or asks for anything but our own loader.
    """
    try:
        flavor = yaml.safe_load((model / "MLmodel").read_text())["flavors"]["python_function"]
        asked = {key: value for key, value in flavor.items() if value}
        data = PurePosixPath(asked.get("data", "."))
    except (OSError, ValueError, yaml.YAMLError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise _refused(model, f"its MLmodel cannot be read ({error!r})") from error
    if asked.get("loader_module") != LOADER:
        raise _refused(model, f"its loader is {asked.get('loader_module')!r}, expected {LOADER!r}")
    if strange := set(asked) - _ALLOWED:
        raise _refused(model, f"its MLmodel asks for {', '.join(sorted(map(str, strange)))}")
    if len(data.parts) != 2 or data.parts[0] != "data" or data.parts[1] == "..":
        raise _refused(model, f"its data lie in {str(data)!r}")
    return model / data


def _refused(model: Path, found: str) -> ArtifactError:
    return ArtifactError(f"Model {model} is refused: {found}.", "Register the run's model again and promote that.")
