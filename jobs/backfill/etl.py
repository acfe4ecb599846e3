"""The Spark stages of one day of a backfill, in one session: `python -m jobs.backfill.etl --part DAY ...`."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.backfill.days import rebuild
from jobs.etl import features, interactions, profiles

STAGES = {"etl.interactions": interactions.run, "etl.features": features.run, "etl.profiles": profiles.run}


def main(argv: Sequence[str] | None = None) -> int:
    return rebuild("backfill.etl", STAGES, argv)


if __name__ == "__main__":
    raise SystemExit(main())
