"""Fit RCA and run the whole catalog through it: `python -m jobs.ml.refine --store URI --run RUN_ID`.

Leaves `items.npy` [num_items, M, d] and `users.npy` [num_users, M, d] refined rows, `fused_items.npy` and
`fused_users.npy` [n, d], the weights `rca.safetensors`, and `fit.json` with the curve and the monitors.

With `refine.max_drift` it also leaves the files that a later run grows from: `keys-1.npy` and so on, `anchors.npy` and
`anchor_items.npy`. A run that grows (`etl.base_run`) refines only new and changed rows.

If the job is killed, the next attempt repeats at most the fit, or the unfinished chunks of `refine.chunk_size` rows:
finished chunks stay in the work folder.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.runner import Job, Result, run_stage


def run(job: Job) -> Result:
    """Do the stage's work; torch is imported only here."""
    from jobs.ml.stages import refine

    return refine.run(job)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("ml.refine", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
