"""Find the neighbours of one shard of the items: `python -m jobs.ml.knn --store URI --run RUN_ID --part 0`.

Leaves `neighbours.npy` int32 and `similarities.npy` float32, both [rows, k]. If the job is killed, the next attempt
continues with the block of items that was not finished. If `ml.refine` has grown from an earlier run, the lists grow
from that run's lists.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.runner import Job, Result, run_stage


def run(job: Job) -> Result:
    """Do the stage's work; torch is imported only here."""
    from jobs.ml.stages import knn

    return knn.run(job)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("ml.knn", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
