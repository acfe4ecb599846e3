"""Run the three ETL stages in one process, which share its Spark session: `python -m tests.worlds.etl_stages FLAGS`."""

from __future__ import annotations

import sys

from jobs.etl import features, interactions, profiles


def main(flags: list[str]) -> int:
    return next((code for stage in (interactions, features, profiles) if (code := stage.main(flags)) != 0), 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
