"""Small data sets in the formats of the importers, and a check of imported raw data."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crane_core.config import Etl, Window
from crane_core.raw.checks import check_features, check_interactions, check_items
from crane_core.raw.files import list_features, list_interactions, list_items

LOG = "userID\titemID\tx_label\n0\t0\t0\n0\t1\t0\n1\t2\t1\n1\t0\t2\n"
"""The log of an MMRec folder."""

RATED = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "1\t10\t5\t881250949\n2\t20\t3\t881250950\n2\t10\t4\t881337349\n"
)

MOVIES = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "10\tToy Story\t1995\tAnimation Comedy\n20\tComedy of Toys\t1995\tComedy\n30\t\t\t\n"
)


def table(raw: Path, name: str) -> pa.Table:
    """Read a table of raw data."""
    return pq.read_table(raw / name, partitioning=None)


def check(raw: Path, start: date, end: date, needs_label: bool) -> None:
    """Check raw data as the ETL does."""
    window = Window.model_validate({"start": start, "end": end})
    etl = Etl(split="label" if needs_label else "temporal")
    check_interactions(list_interactions(raw, window, etl), window, etl)
    check_items(list_items(raw))
    for files in list_features(raw, ()).values():
        check_features(files)
