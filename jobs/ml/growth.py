"""What a run grows from: the artifacts of `etl.base_run`, where they fit."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from crane_core.dataset.modalities import Modality, load_modalities
from crane_core.stages import KNN_BASE, REFINE_BASE, STAGES, base_contents, list_settings
from crane_core.storage.artifacts import Artifact
from crane_core.storage.matrix import open_matrix
from jobs.runner import Job

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """What `ml.refine` grows from.

    Attributes:
        refined: its artifact.
        modalities: features and profiles it was made of.
    """

    refined: Artifact
    modalities: list[Modality]


@dataclass(frozen=True)
class BaseGraph:
    """What `ml.knn` grows from.

    Attributes:
        rows: float32 [m, d], fused rows of the items.
        neighbours, similarities: int32 and float32 [m, k].
    """

    rows: np.ndarray
    neighbours: np.ndarray
    similarities: np.ndarray


def find_base(job: Job, modalities: list[Modality]) -> Base | None:
    """What to grow from, if it was made in the same way under the same ids."""
    if base_contents(job.config, job.store, REFINE_BASE) is None:
        return None
    run = job.config.etl.base_run
    assert run is not None
    ids, features, profiles, refined = (job.store.artifact(run, name) for name in REFINE_BASE)
    then = load_modalities(features, profiles)
    widths = [[(each.name, each.items.shape[1]) for each in side] for side in (then, modalities)]
    fits = {
        "same_ids": ids.fingerprint == job.input("etl.interactions").facts["base"],
        "same_version": refined.manifest["stage_version"] == job.stage.version,
        "same_settings": refined.manifest["config"]["refine"] == job.config.refine.model_dump(mode="json"),
        "same_modalities": widths[0] == widths[1],
        "same_profiles": profiles.facts["aggregate"] == job.config.profiles.aggregate,
    }
    if not all(fits.values()):
        logger.warning("build_anew base=%s %s", run, " ".join(f"{name}={fit}" for name, fit in fits.items()))
        return None
    for artifact in (features, profiles, refined):
        artifact.verify()
    return Base(refined, then)


def find_base_graph(job: Job) -> BaseGraph | None:
    """The lists to grow from, if the rows of this run have grown and the lists were found in the same way."""
    if "growth" not in job.input("ml.refine").facts or base_contents(job.config, job.store, KNN_BASE) is None:
        return None
    run = job.config.etl.base_run
    assert run is not None
    refined, graph = (job.store.artifact(run, name) for name in KNN_BASE)
    fits = {
        "same_version": graph.manifest["stage_version"] == STAGES["ml.graph"].version,
        "same_settings": list_settings(graph.manifest["config"]["knn"]) == list_settings(job.config.knn.model_dump()),
    }
    if not all(fits.values()):
        logger.warning("build_anew base=%s %s", run, " ".join(f"{name}={fit}" for name, fit in fits.items()))
        return None
    for artifact in (refined, graph):
        artifact.verify()
    names = ("neighbours.npy", "similarities.npy")
    return BaseGraph(open_matrix(refined.file("fused_items.npy")), *(open_matrix(graph.file(name)) for name in names))
