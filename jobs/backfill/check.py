"""Fail unless everything a backfill wanted is there: `python -m jobs.backfill.check`, with the flags of the plan."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.backfill.days import run_plan


def main(argv: Sequence[str] | None = None) -> int:
    return run_plan("backfill.check", True, argv)


if __name__ == "__main__":
    raise SystemExit(main())
