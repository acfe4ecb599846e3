"""The earlier run that a run grows from: `etl.base_run`, where its artifacts are there and fit."""

from __future__ import annotations

from crane_core.dataset.modalities import Modality
from crane_core.graph.growth import BaseGraph, find_base_graph
from crane_core.refine.growth import Base, find_base
from crane_core.stages import KNN_BASE, REFINE_BASE, base_contents
from crane_core.storage.artifacts import Artifact
from jobs.runner import Job


def refine_base(job: Job, modalities: list[Modality]) -> Base | None:
    """Return what `ml.refine` can grow from, None when there is nothing."""
    earlier = _artifacts(job, REFINE_BASE)
    return find_base(earlier, job.input("etl.interactions"), modalities, job.config) if earlier else None


def knn_base(job: Job) -> BaseGraph | None:
    """Return what `ml.knn` can grow from, None when there is nothing or the rows of this run were built anew."""
    if "growth" not in job.input("ml.refine").facts:
        return None
    earlier = _artifacts(job, KNN_BASE)
    if not earlier:
        return None
    refined, graph = earlier
    return find_base_graph(refined, graph, job.config)


def _artifacts(job: Job, stages: tuple[str, ...]) -> list[Artifact]:
    if base_contents(job.config, job.store, stages) is None:
        return []
    assert job.config.etl.base_run is not None
    return [job.store.artifact(job.config.etl.base_run, name) for name in stages]
