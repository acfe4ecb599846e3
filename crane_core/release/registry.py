"""The model registry: versions, their evidence and their aliases."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

# mlflow reads these when it is imported: a pipeline sends no telemetry, and its log lines are its own.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import mlflow
import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.pyfunc import PyFuncModel
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

from crane_core.config import Runtime
from crane_core.errors import ArtifactError, ConfigError
from crane_core.release.downloads import download, listed
from crane_core.release.mlmodel import LOADER, served_folder
from crane_core.release.reading import CHECKSUMS_TAG, EVIDENCE, TWIN, TWIN_TAG, RegistryReader
from crane_core.release.version import EVIDENCE_TAG, FINGERPRINT_TAG, Release, Version
from crane_core.schema import USER_ID
from crane_core.serving.histories import HISTORY, TIMES
from crane_core.serving.model_folder import CHECKSUMS, DEFAULT_K
from crane_core.storage.artifacts import sha256_file
from crane_core.storage.lock import locked

logger = logging.getLogger(__name__)

CANDIDATE = "candidate"
CANDIDATE_TAG = "crane.candidate"
"""Tag of a version that has been candidate: when it became one, ISO 8601 UTC."""
PRUNED_TAG = "crane.pruned"
"""Tag of a version whose run was removed from the store: when, ISO 8601 UTC; empty once the run was made again."""

_MODEL = "model"
_TRAINING_TAG = "crane.training"
_PARAM_LENGTH, _TAG_LENGTH, _BATCH = 500, 5000, 1000

SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            ColSpec(DataType.string, USER_ID),
            *(ColSpec(Array(DataType.string), name, False) for name in (HISTORY, TIMES)),
        ]
    ),
    outputs=Schema(
        [
            ColSpec(DataType.string, USER_ID),
            ColSpec(Array(DataType.string), "item_ids"),
            ColSpec(Array(DataType.double), "scores"),
            ColSpec(DataType.boolean, "fallback"),
            ColSpec(DataType.long, "unknown_items"),
        ]
    ),
    params=ParamSchema([ParamSpec("k", DataType.integer, DEFAULT_K)]),
)


class Registry(RegistryReader):
    """One registered model in one MLflow registry.

    Args:
        uri: tracking and registry URI.
        artifact_root: URI where artifacts of a new experiment go; the server's choice when None.
        name: name of the registered model.

    Raises:
        ConfigError: the registry does not answer.
    """

    def __init__(self, uri: str, artifact_root: str | None, name: str) -> None:
        self.uri = uri
        self.name = name
        try:
            mlflow.set_tracking_uri(uri)
            mlflow.set_registry_uri(uri)
            self._client = MlflowClient(uri, uri)
            experiment = self._client.get_experiment_by_name(name)
            self._experiment_id = (
                experiment.experiment_id if experiment else self._client.create_experiment(name, artifact_root)
            )
            with contextlib.suppress(MlflowException):
                self._client.create_registered_model(
                    name, description="CRANE recommender; the alias champion is served."
                )
        except (MlflowException, OSError) as error:
            raise self._away(error) from error

    def register(self, release: Release) -> tuple[Version, bool]:
        """Make a version, or find the one with the same fingerprint.

        Returns:
            The version, and whether it is new.
        """
        found = self.find(release.fingerprint)
        if found:
            return found, False
        started = time.monotonic()
        evidence_tags = {f"{EVIDENCE_TAG}{path.name}": sha256_file(path) for path in release.evidence}
        tags = {
            **release.tags,
            **evidence_tags,
            "crane.run": release.run_id,
            FINGERPRINT_TAG: release.fingerprint,
            CHECKSUMS_TAG: sha256_file(release.folder / CHECKSUMS),
            **({TWIN_TAG: sha256_file(release.twin / CHECKSUMS)} if release.twin else {}),
        }
        run = self._client.create_run(self._experiment_id, run_name=release.run_id).info.run_id
        with mlflow.start_run(run_id=run):
            model = mlflow.pyfunc.log_model(
                name=_MODEL,
                loader_module=LOADER,
                data_path=str(release.folder),
                signature=SIGNATURE,
                input_example=(release.input_example, {"k": DEFAULT_K}),
                pip_requirements=["crane-pipeline"],
            )
        for path in release.evidence:
            self._client.log_artifact(run, str(path), EVIDENCE)
        if release.twin:
            self._client.log_artifacts(run, str(release.twin), TWIN)
        self._log_figures(run, model.model_id, release, tags)
        version = self._client.create_model_version(
            self.name, model.model_uri, run, tags=_clipped(tags), model_id=model.model_id
        )
        first = self.find(release.fingerprint)
        assert first is not None
        if first.number != str(version.version):
            # Another process registered the same model meanwhile: keep one version per fingerprint.
            self._client.delete_model_version(self.name, version.version)
            return first, False
        logger.info("registered version=%s seconds=%.1f", first.number, time.monotonic() - started)
        return first, True

    def versions(self) -> list[Version]:
        """Return all versions, oldest first."""
        named: dict[str, list[str]] = defaultdict(list)
        for alias, number in self._client.get_registered_model(self.name).aliases.items():
            named[str(number)].append(alias)
        found: list[Version] = []
        token = None
        while True:
            page = self._client.search_model_versions(f"name = '{self.name}'", max_results=_BATCH, page_token=token)
            found += [Version(str(v.version), v.run_id or "", dict(v.tags), tuple(named[str(v.version)])) for v in page]
            token = page.token
            if not token:
                return sorted(found, key=lambda version: int(version.number))

    def holder(self, alias: str) -> str | None:
        """Return the number of the version an alias points to, None when there is no such alias."""
        number = self._client.get_registered_model(self.name).aliases.get(alias)
        return None if number is None else str(number)

    def set_alias(self, alias: str, number: str | None) -> None:
        """Point an alias to a version, or remove it."""
        if number is None:
            self._client.delete_registered_model_alias(self.name, alias)
        else:
            self._client.set_registered_model_alias(self.name, alias, number)

    def tag(self, number: str, tags: Mapping[str, str]) -> None:
        """Write tags on a version."""
        for key, value in _clipped(tags).items():
            self._client.set_model_version_tag(self.name, number, key, value)

    def aliased_runs(self) -> set[str]:
        """Return the pipeline's runs of all versions that carry an alias, of every model of the server."""
        found = set()
        token = None
        while True:
            page = self._client.search_registered_models(max_results=_BATCH, page_token=token)
            for model in page:
                for number in set(model.aliases.values()):
                    with contextlib.suppress(MlflowException):
                        # An alias may point to a version that was deleted.
                        found.add(self._client.get_model_version(model.name, number).tags.get("crane.run"))
            token = page.token
            if not token:
                return {run for run in found if run}

    def describe(self, number: str, text: str) -> None:
        """Write the description of a version, Markdown."""
        self._client.update_model_version(self.name, number, text)

    def check_listed(self, version: Version) -> None:
        listed(self.uri, version.mlflow_run, self._model_uri(version))

    def _logged(self, version: Version, path: str) -> Path:
        return _present(run_id=version.mlflow_run, artifact_path=path, tracking_uri=self.uri)

    def _model(self, version: Version) -> Path:
        return _present(artifact_uri=self._model_uri(version))

    def _model_uri(self, version: Version) -> str:
        return f"models:/{self.name}/{version.number}"

    def load(self, reference: str) -> PyFuncModel:
        """Load a version as a serving process would.

        Args:
            reference: `@alias` or `/number`.

        Raises:
            ArtifactError: the model was tampered with, names code other than ours, or does not exist.
        """
        try:
            folder = download(artifact_uri=f"models:/{self.name}{reference}")
            served_folder(folder)
            return mlflow.pyfunc.load_model(str(folder))
        except MlflowException as error:
            raise ArtifactError(
                f"models:/{self.name}{reference} cannot be loaded ({error}).",
                "Check that its files can be read here; if some are gone, run python -m jobs.ml.register for its run.",
            ) from error

    @contextlib.contextmanager
    def watch(self, name: str, fingerprint: str) -> Iterator[Callable[[Mapping[str, float]], None]]:
        """Log a training's epochs while it runs, into an MLflow run of their own.

        A training that resumes from a checkpoint resumes its run. If the server stops answering after the start, the
        training goes on and these points are missing in MLflow; the training's own curve has them.

        Args:
            name: name of the run.
            fingerprint: fingerprint of the stage.

        Yields:
            Function that logs the entry of an epoch.

        Raises:
            ConfigError: the server does not answer at the start.
        """
        try:
            run = self._training_run(name, fingerprint)
        except (MlflowException, OSError) as error:
            raise self._away(error) from error

        def log(entry: Mapping[str, float]) -> None:
            now, epoch = int(time.time() * 1000), int(entry["epoch"])
            points = [
                Metric(_metric_name(f"epoch/{name}"), float(value), now, epoch)
                for name, value in entry.items()
                if name != "epoch"
            ]
            try:
                self._client.log_batch(run, metrics=points)
            except MlflowException as error:
                logger.warning("curve_not_shown epoch=%d run=%s error=%s", epoch, run, error)

        status = "FAILED"
        try:
            yield log
            status = "FINISHED"
        finally:
            with contextlib.suppress(MlflowException):
                self._client.set_terminated(run, status)

    def _training_run(self, name: str, fingerprint: str) -> str:
        """Return the MLflow run of a training, which is resumed or made."""
        query = f"tags.`{_TRAINING_TAG}` = '{fingerprint}'"
        found = self._client.search_runs([self._experiment_id], query, max_results=1)
        if not found:
            tags = {_TRAINING_TAG: fingerprint}
            return self._client.create_run(self._experiment_id, run_name=name, tags=tags).info.run_id
        self._client.update_run(found[0].info.run_id, status="RUNNING")
        return found[0].info.run_id

    def _away(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"The model registry {self.uri} does not answer ({error}).",
            "Start the server, or give --set runtime.registry=URI (for crane: --registry URI) of one that runs.",
        )

    def _log_figures(self, run: str, model_id: str, release: Release, tags: Mapping[str, str]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            Metric(_metric_name(name), float(value), now, 0, model_id=model_id)
            for name, value in release.metrics.items()
        ]
        metrics += [
            Metric(_metric_name(f"epoch/{name}"), float(value), now, int(point["epoch"]))
            for point in release.curve
            for name, value in point.items()
            if name != "epoch" and isinstance(value, int | float)
        ]
        params = [Param(name, str(value)[:_PARAM_LENGTH]) for name, value in release.params.items()]
        run_tags = [RunTag(name, value) for name, value in _clipped(tags).items()]
        self._client.log_batch(run, params=params[:100], tags=run_tags[:100])
        for start in range(100, len(params), 100):
            self._client.log_batch(run, params=params[start : start + 100])
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(run, metrics=metrics[start : start + _BATCH])
        inputs = [
            DatasetInput(
                Dataset(each.name, each.digest[:36], "local", f'{{"uri": "{each.source}"}}'),
                [InputTag("mlflow.data.context", each.context)],
            )
            for each in release.datasets
        ]
        self._client.log_inputs(run, inputs)


def open_registry(runtime: Runtime, store_uri: str) -> Registry:
    """Open the configured registry, else the one in a SQLite file inside a local store.

    Raises:
        ConfigError: none is configured for a remote store, or it does not answer.
    """
    if runtime.registry:
        return Registry(runtime.registry, None, runtime.model_name)
    if "://" in store_uri:
        raise ConfigError(
            f"Store {store_uri} is remote and no model registry is configured.",
            "Give --set runtime.registry=URI (for crane: --registry URI), for example http://HOST:5000.",
        )
    root = Path(store_uri)
    root.mkdir(parents=True, exist_ok=True)
    # Two processes that create the tables of one SQLite file at the same time would both fail.
    with locked(root / ".mlflow.lock"):
        return Registry(f"sqlite:///{root / 'mlflow.db'}", (root / "mlartifacts").as_uri(), runtime.model_name)


def _present(**what: str) -> Path:
    """Return a local path of files of the registry; an OSError says that they are not there."""
    try:
        return download(**what)
    except MlflowException as error:
        raise OSError(str(error)) from error


def _metric_name(name: str) -> str:
    return name.replace("@", "_at_")


def _clipped(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: value[:_TAG_LENGTH] for key, value in tags.items()}
