#!/usr/bin/env bash
# safetensors.numpy writes the memory of an array, not the array.
#
# One expects:   save(a), load: the same matrix comes back, or an error as the torch side of the library raises one
#                ("You are trying to save a non contiguous tensor").
# What happens:  for a transposed matrix (and for any array in Fortran order, such as what np.asfortranarray, .T or
#                many solvers return), the shape is kept and the numbers lie elsewhere. Nothing is raised or logged.
# Who is hurt:   whoever saves embeddings or factors straight from numpy: W.T, the result of scipy.linalg, a matrix read
#                from a column-major file. A square matrix comes back as its transpose; others come back scrambled.
# Instead:       np.ascontiguousarray(array) before every save, and one test that reads back a transposed matrix.
#
# Seen with safetensors 0.8.0 and numpy 2.4.6 on Linux x86-64, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet 'safetensors==0.8.0' 'numpy==2.4.6'
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
from safetensors.numpy import load, save

rows = np.arange(6, dtype=np.float32).reshape(2, 3)
wide = rows.T
back = load(save({"wide": wide}))["wide"]
print("saved  ", wide.tolist())
print("loaded ", back.tolist())
assert back.shape == wide.shape == (3, 2)
assert not np.array_equal(back, wide), "safetensors now keeps the array: this finding is over"
assert np.array_equal(back.ravel(), rows.ravel()), "it is the memory of the array, in the order in which it lies"

square = np.array([[1, 2], [3, 4]], dtype=np.float32)
assert np.array_equal(load(save({"s": square.T}))["s"], square), "a square matrix comes back as its transpose"
assert np.array_equal(load(save({"s": np.ascontiguousarray(square.T)}))["s"], square.T), "this is the way to save it"
print("a transposed matrix comes back with other numbers, without an error")
PYTHON
