"""Paths of the console script: the checkout, its `.crane` folder and the store of the last demo."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from crane_core.errors import ConfigError

PROJECT = Path(__file__).resolve().parents[2]
HOME = PROJECT / ".crane"
AIRFLOW_ENVIRONMENT = PROJECT / ".venv-airflow"
DAGS = PROJECT / "dags"
POOLS = PROJECT / "infra" / "local" / "pools.json"


@dataclass(frozen=True)
class Last:
    """Store and run of the last demo.

    Attributes:
        store: artifact store.
        run: run id.
    """

    store: str
    run: str


def remember(last: Last, home: Path) -> None:
    """Write the store and run into `home`: commands without --store use them."""
    (home / "last.json").write_text(json.dumps(asdict(last)))


def default_store() -> str:
    """Return the store of the last demo.

    Raises:
        ConfigError: there was none.
    """
    try:
        return Last(**json.loads((HOME / "last.json").read_text())).store
    except FileNotFoundError as error:
        raise ConfigError(
            f"No store was given and {HOME} remembers none.", "Give --store URI, or run make demo first."
        ) from error
