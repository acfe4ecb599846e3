"""Align item features with the item numbers: `python -m jobs.etl.features --store URI --run RUN_ID`."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.runner import Job, Result, run_stage


def run(job: Job) -> Result:
    """Do the stage's work; PySpark is imported only here."""
    from jobs.etl.stages import features

    return features.run(job)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("etl.features", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
