#!/usr/bin/env bash
# pyarrow writes a Parquet file that pyarrow cannot read: a missing vector in a column of fixed-size lists.
#
# One expects:   a column of type list<float>[2] with a null row, written with pyarrow.parquet.write_table, comes back
#                from read_table with the null row, as it does from a column of variable-size lists.
# What happens:  the file is written without a word. Reading it raises ArrowInvalid, "Expected all lists to be of size=2
#                but index 2 had size=0": the null row has no values in the file. DuckDB reads the same file, null row
#                included, so nothing is damaged.
# Who is hurt:   whoever stores embeddings as fixed-size lists, as many feature stores and vector databases export them,
#                and has one item without a vector. The error speaks of damaged data, and comes at the reader's.
# Instead:       write embeddings as variable-size lists, or leave the rows out; read such a file with the schema of the
#                file replaced (DuckDB, Spark), or through the column's flattened values.
#
# Seen with pyarrow 25.0.1 and duckdb 1.5.5 on Linux x86-64, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet 'pyarrow==25.0.1' 'duckdb==1.5.5'
"$folder/env/bin/python" - "$folder" <<'PYTHON'
import sys

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

rows = [[1.0, 2.0], None, [3.0, 4.0]]
path = f"{sys.argv[1]}/vectors.parquet"

pq.write_table(pa.table({"vector": pa.array(rows, pa.list_(pa.float32()))}), path)
assert pq.read_table(path).column("vector").to_pylist() == rows, "variable-size lists come back"

pq.write_table(pa.table({"vector": pa.array(rows, pa.list_(pa.float32(), 2))}), path)
try:
    found = pq.read_table(path).column("vector").to_pylist()
except pa.ArrowInvalid as error:
    print("pyarrow, which wrote the file:", error)
    assert "Expected all lists to be of size=2" in str(error)
else:
    raise SystemExit(f"pyarrow now reads {found}: this finding is over")

found = [row[0] for row in duckdb.sql(f"select vector from '{path}'").fetchall()]
print("DuckDB reads", found)
assert [value and list(value) for value in found] == rows
PYTHON
