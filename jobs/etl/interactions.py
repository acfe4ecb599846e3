"""Read the log, split it, number users and items: `python -m jobs.etl.interactions --store URI --run RUN_ID`."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.runner import Job, Result, run_stage


def run(job: Job) -> Result:
    """Do the stage's work; PySpark is imported only here."""
    from jobs.etl.stages import interactions

    return interactions.run(job)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("etl.interactions", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
