"""Write the champion's recommendations: the work of `jobs.ml.export`."""

from __future__ import annotations

import logging
import shutil

from crane_core.model.content_rows import CONTENT_FILES
from crane_core.serving.export import write_export
from crane_core.serving.model_folder import load_recommender
from jobs.ml.device import use_device
from jobs.runner import Job, Result

logger = logging.getLogger(__name__)


def run(job: Job) -> Result:
    """Write the artifact of `job.run_id`, the champion's run."""
    device = use_device(job.config.runtime)
    trained = job.input("ml.train")
    trained.verify()
    export = job.config.export
    recommender = load_recommender(job.input("etl.interactions"), trained, export.rules, job.config.window.end)
    counts = write_export(job.out, recommender, export, device)
    for name in CONTENT_FILES:
        # A training of an earlier version has none.
        if name in trained.manifest["files"]:
            shutil.copyfile(trained.file(name), job.out / name)
    told = (f"{name.removeprefix('num_')}={count}" for name, count in counts.items() if name != "rules")
    logger.info("exported %s", " ".join(told))
    return Result(counts)
