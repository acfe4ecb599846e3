"""Train the behavioural view, LightGCN: `python -m jobs.ml.behaviour --store URI --run RUN_ID`.

It is CRANE's first half and the baseline CRANE is compared with. It needs no content, so it runs beside the refine,
knn and graph stages. Leaves `embeddings.safetensors`, `weights.safetensors` and `curve.json`.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.ml.nodes import Training, run_training
from jobs.runner import Job, Result


def run(job: Job) -> Result:
    """Do the stage's work; torch is imported only here and in `lend`."""
    from jobs.ml.stages import behaviour

    return behaviour.run(job)


def lend(training: Training) -> None:
    """Run this node's ranks in the training that another node has started."""
    from jobs.ml.stages import behaviour

    behaviour.lend(training)


def main(argv: Sequence[str] | None = None) -> int:
    return run_training("ml.behaviour", run, lend, argv)


if __name__ == "__main__":
    raise SystemExit(main())
