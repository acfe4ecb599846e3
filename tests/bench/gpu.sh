#!/usr/bin/env bash
# Test and time every CUDA path of crane_core on one GPU, within 8 minutes.
#
#   tests/bench/gpu.sh                        on a GPU; leaves gpu.json and gpu.md in ./gpu-results
#   tests/bench/gpu.sh --rehearse             every part at toy size, on the CPU and in Triton's interpreter
#   tests/bench/gpu.sh --only rca knn         some parts; --out FOLDER, --seconds 300
#
# It needs this repository and a Python (PYTHON=..., python3 otherwise) with torch 2.11 or newer, Triton, and the wheels
# numpy, scipy, pydantic, pyarrow, safetensors, rich and PyYAML. faiss is used where it is installed; MLflow, Spark and
# Airflow are not needed. Triton needs a C compiler. With numpy 2.4 or newer, Triton's interpreter works from Triton 3.7 on.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# So that a question for a GPU does not start CUDA in the process that starts the parts.
export PYTORCH_NVML_BASED_CUDA_CHECK=1

"$python" - "$@" <<'EOF'
import importlib.util
import os
import shutil
import sys

names = {"torch": "torch", "triton": "triton", "numpy": "numpy", "scipy": "scipy", "pydantic": "pydantic"}
names |= {"pyarrow": "pyarrow", "safetensors": "safetensors", "rich": "rich", "yaml": "PyYAML"}
missing = [wheel for module, wheel in names.items() if importlib.util.find_spec(module) is None]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}. Remedy: {sys.executable} -m pip install {' '.join(missing)}")
if "--rehearse" not in sys.argv and not os.environ.get("CC") and not shutil.which("gcc") and not shutil.which("clang"):
    sys.exit("Triton finds no C compiler. Remedy: apt-get install gcc libc6-dev, or name one in CC.")
EOF
exec "$python" -m tests.bench.gpu "$@"
