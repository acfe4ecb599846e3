"""Merge and certify the item graph: `python -m jobs.ml.graph --store URI --run RUN_ID`.

Leaves `neighbours.npy` int32 and `similarities.npy` float32 [num_items, k], the symmetric normalised CSR graph of them
`indptr.npy` int64, `indices.npy` int32, `values.npy` float32, and `certificate.json`: recall against brute force with
its interval, how often the search was repeated for it, and the co-interaction lift over random pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.runner import Job, Result, run_stage


def run(job: Job) -> Result:
    """Do the stage's work; torch is imported only here."""
    from jobs.ml.stages import graph

    return graph.run(job)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("ml.graph", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
