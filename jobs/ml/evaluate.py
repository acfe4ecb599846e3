"""Read the test split, once: `python -m jobs.ml.evaluate --store URI --run RUN_ID`.

Leaves `metrics.json` (every model with intervals, paired differences to the baselines, slices, cold items, unknown
users; where `export.rules` are set, CRANE's lists that obey them) and `per_user.parquet`, the metrics of each user, for
later paired tests.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.runner import Job, Result, run_stage


def run(job: Job) -> Result:
    """Do the stage's work; torch is imported only here."""
    from jobs.ml.stages import evaluate

    return evaluate.run(job)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("ml.evaluate", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
