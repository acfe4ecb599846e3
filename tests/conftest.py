"""One Spark session for all tests that need one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """A local session on two cores, made as the jobs make theirs, so that jobs run in-process find and share it."""
    from crane_core.config import Runtime
    from jobs.etl.session import open_session

    scratch = tmp_path_factory.mktemp("spark")
    session = open_session(Runtime(spark_master="local[2]"), scratch, num_rows=0)
    yield session
    session.stop()
