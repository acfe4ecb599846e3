"""The library behind the CRANE pipeline: everything that is worth testing without Spark or Airflow."""

import os

# torch reads it at its first tensor. Large ones then lie in huge pages, where Linux gives them on request (`madvise`).
# A propagation, whose reads are scattered over all rows, takes half as long at a million users.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
