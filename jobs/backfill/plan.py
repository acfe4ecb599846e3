"""Plan a backfill: `python -m jobs.backfill.plan --store URI --windows START/END ... --stages STAGE ...`.

One log line for each step of each day: `state=found` where the store has the artifact already, by whatever run, else
`state=make`. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.backfill.days import run_plan


def main(argv: Sequence[str] | None = None) -> int:
    return run_plan("backfill.plan", False, argv)


if __name__ == "__main__":
    raise SystemExit(main())
