"""Log lines and messages without secrets."""

from __future__ import annotations

import logging
import os
import re
import sys

from crane_core.errors import CraneError


class Redacting(logging.Formatter):
    """Log lines without secrets: passwords inside URIs, and the values of the environment's secret variables."""

    PASSWORD = re.compile(r"(?<=://)([^/\s:@]*):[^/\s@]+(?=@)")
    VARIABLE = re.compile(r"SECRET|PASSWORD|TOKEN|CREDENTIAL", re.IGNORECASE)
    SHORTEST = 6

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def redacted(text: str) -> str:
    """Return a text without the secrets in it, as it may be shown."""
    text = Redacting.PASSWORD.sub(r"\1:***", text)
    for name, value in os.environ.items():
        if Redacting.VARIABLE.search(name) and len(value) >= Redacting.SHORTEST:
            text = text.replace(value, "***")
    return text


def shown(error: CraneError) -> dict[str, str]:
    """Return an error as data, without the secrets in it."""
    return {key: redacted(value) for key, value in error.as_dict().items()}


def start_logging() -> None:
    """Log lines to stderr, secrets left out; stdout belongs to results."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Redacting("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("py4j", "matplotlib", "botocore", "alembic", "faiss", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
