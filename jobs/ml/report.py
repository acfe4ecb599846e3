"""Write the page about a run: `python -m jobs.ml.report --store URI --run RUN_ID`.

Leaves `{store}/reports/{run_id}.html`, self-contained. A stage that has not run is named on the page and is no error.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from crane_core.config import RunConfig
from crane_core.release.ledger import Ledger
from crane_core.report.run import render
from crane_core.storage.artifacts import ArtifactStore
from jobs.entry_points import run_job
from jobs.stores import report_uri

logger = logging.getLogger(__name__)


def report(arguments: argparse.Namespace, config: RunConfig, store: ArtifactStore) -> dict[str, Any]:
    """Render the page and replace an earlier one atomically."""
    entries = Ledger(store.storage, config.runtime.model_name).history()
    page = render(store, arguments.run, config, entries).encode()
    store.storage.write(f"reports/{arguments.run}.html", page)
    uri = report_uri(store, arguments.run)
    logger.info("report bytes=%d uri=%s", len(page), uri)
    return {
        "status": "done",
        "report": uri,
        "bytes": len(page),
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("ml.report", report, argv)


if __name__ == "__main__":
    raise SystemExit(main())
