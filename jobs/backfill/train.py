"""Train, evaluate and register the last day of a backfill: `python -m jobs.backfill.train --part DAY ...`.

It trains twice: the model that is evaluated, and, unless `etl.refit=false`, the one that would be served. With
`runtime.backfill=true` among the flags the version gets no alias.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.backfill.days import rebuild
from jobs.ml import behaviour, evaluate, train

STAGES = {
    "ml.behaviour": behaviour.run,
    "ml.train": train.run,
    "ml.evaluate": evaluate.run,
    "ml.refit": None,
    "ml.register": None,
}


def main(argv: Sequence[str] | None = None) -> int:
    return rebuild("backfill.train", STAGES, argv)


if __name__ == "__main__":
    raise SystemExit(main())
