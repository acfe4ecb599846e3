"""Local copies of the files of a model registry."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import mlflow.artifacts
from mlflow.exceptions import MlflowException

from crane_core.errors import ArtifactError


def download(**what: str) -> Path:
    """Return a local path of files of a registry: in place if it is local, else a copy that is removed at exit.

    Raises:
        OSError: they are not there, or the server does not answer.
        MlflowException: the version or alias does not exist.
    """
    before = tempfile.tempdir
    tempfile.tempdir = _copies()
    try:
        return Path(mlflow.artifacts.download_artifacts(**what))
    finally:
        tempfile.tempdir = before


@functools.cache
def _copies() -> str:
    """Make the folder of this process's downloads; in the temporary folder itself MLflow would never remove them."""
    folder = tempfile.mkdtemp(prefix="crane-registry-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def listed(uri: str, mlflow_run: str, model_uri: str) -> None:
    """List the evidence and the files of a version, which tells files that are gone from a server that is.

    Args:
        uri: of the server.
        mlflow_run: MLflow run of the version.
        model_uri: `models:/name/number`.

    Raises:
        ArtifactError: the files cannot be listed.
    """
    try:
        mlflow.artifacts.list_artifacts(run_id=mlflow_run, artifact_path="evidence", tracking_uri=uri)
        mlflow.artifacts.list_artifacts(artifact_uri=model_uri)
    except (MlflowException, OSError) as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            return
        raise ArtifactError(
            f"The files of {model_uri} cannot be listed ({error}).",
            f"Check that {uri} and its artifacts can be reached, then run the same command again.",
        ) from error
