"""Sum the feature rows of every user's items: `python -m jobs.etl.profiles --store URI --run RUN_ID`."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.runner import Job, Result, run_stage


def run(job: Job) -> Result:
    """Do the stage's work; PySpark is imported only here."""
    from jobs.etl.stages import profiles

    return profiles.run(job)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("etl.profiles", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
