"""Refined rows and item graph of one day of a backfill: `python -m jobs.backfill.content --part DAY ...`."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.backfill.days import rebuild
from jobs.ml import graph, knn, refine

STAGES = {"ml.refine": refine.run, "ml.knn": knn.run, "ml.graph": graph.run}


def main(argv: Sequence[str] | None = None) -> int:
    return rebuild("backfill.content", STAGES, argv)


if __name__ == "__main__":
    raise SystemExit(main())
