"""MLflow's tables, made once per test run: making them takes seconds, copying the file does not."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from crane_core.release.registry import Registry


def copy_tables(store: Path) -> None:
    """Put an empty registry database where a store looks for it."""
    store.mkdir()
    shutil.copyfile(_tables(), store / "mlflow.db")


@functools.cache
def _tables() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="crane-mlflow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Registry(f"sqlite:///{folder / 'mlflow.db'}", None, "template")
    return folder / "mlflow.db"
