"""Records of a registered model: what is registered, and the version that comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

FINGERPRINT_TAG = "crane.fingerprint"
"""Tag of a version that holds the fingerprint of model and evaluation."""

SHIPPED_TAG = "crane.shipped_run"
"""Tag of a version whose served model is that of a refit run."""

EVIDENCE_TAG = "crane.evidence."
"""Prefix of the tags that hold the checksum of each file of the evidence."""


@dataclass(frozen=True)
class DatasetReference:
    """An artifact a model was made from.

    Attributes:
        name: the stage.
        digest: fingerprint of the artifact.
        source: its location.
        context: its use: `training` or `evaluation`.
    """

    name: str
    digest: str
    source: str
    context: str


@dataclass(frozen=True)
class Release:
    """A trained model with everything that is registered beside it.

    Attributes:
        fingerprint: identity of model and evaluation; the same fingerprint is the same version.
        run_id: the pipeline's run.
        folder: folder of the served model, as `serving.model_folder.write_model` leaves it.
        twin: folder of the same form with the evaluated model; None where that is the served one.
        evidence: files that the gate reads again later.
        input_example: a request the model can answer.
        params: the flattened configuration.
        metrics: name to value; MLflow does not allow `@`, so it is written as `_at_`.
        curve: one mapping per epoch, `epoch` and metrics.
        datasets: artifacts it was made from.
        tags: lineage.
    """

    fingerprint: str
    run_id: str
    folder: Path
    twin: Path | None
    evidence: Sequence[Path]
    input_example: pd.DataFrame
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    curve: Sequence[Mapping[str, float]]
    datasets: Sequence[DatasetReference]
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Version:
    """A registered version.

    Attributes:
        number: version number as MLflow writes it.
        mlflow_run: MLflow run that holds parameters, metrics and evidence.
        tags: lineage and decisions.
        aliases: aliases that point here.
    """

    number: str
    mlflow_run: str
    tags: dict[str, str]
    aliases: tuple[str, ...]

    @property
    def run_id(self) -> str:
        """The pipeline's run that made it, whose model was evaluated."""
        return self.tags["crane.run"]

    @property
    def shipped_run(self) -> str:
        """The run that made the served model: the refit run, or the run itself where there is none."""
        return self.tags.get(SHIPPED_TAG, self.run_id)

    @property
    def has_twin(self) -> bool:
        """Whether the evaluated model is another one than the served one."""
        return SHIPPED_TAG in self.tags

    @property
    def evidence(self) -> list[str]:
        """Names of the files of its evidence."""
        return [tag.removeprefix(EVIDENCE_TAG) for tag in self.tags if tag.startswith(EVIDENCE_TAG)]
