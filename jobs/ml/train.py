"""Train CRANE to its best validation recall: `python -m jobs.ml.train --store URI --run RUN_ID`.

With `crane.mode=joint` the RCA weights that `ml.refine` has fitted go on learning and the item graph moves with them.

Leaves `embeddings.safetensors` (`user_embeddings` and `item_embeddings`, scores are their dot products): CRANE's rows
beside the behavioural view, at the share the validation split trusts them with; and where the data have times, beside
the user's recent items and the popularity of the moment (`crane_core/training/head.py`). In the same file
`history_rows` and `history_constant`, of which a history becomes a user's row (`crane_core/model/fold_in.py`). Also
`weights.safetensors`, `curve.json` with one entry per epoch, and `trust.json` with the recall at every share tried.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.ml.nodes import Training, run_training
from jobs.runner import Job, Result


def run(job: Job) -> Result:
    """Do the stage's work; torch is imported only here and in `lend`."""
    from jobs.ml.stages import train

    return train.run(job)


def lend(training: Training) -> None:
    """Run this node's ranks in the training that another node has started."""
    from jobs.ml.stages import train

    train.lend(training)


def main(argv: Sequence[str] | None = None) -> int:
    return run_training("ml.train", run, lend, argv)


if __name__ == "__main__":
    raise SystemExit(main())
