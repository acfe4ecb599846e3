#!/usr/bin/env bash
# What an image installs: one lock into one virtual environment, every file checked against its hash.
#
#   docker/install.sh LOCK FOLDER
#
# The Dockerfiles run it in their first stage, `make rehearse` runs it without an engine. LOCK is a name in
# docker/locks. pip reads its index settings from the environment: torch's CPU builds need PIP_EXTRA_INDEX_URL or
# PIP_FIND_LINKS.
set -euo pipefail
lock=$1 folder=$2
source="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PIP_NO_INPUT=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

python3 -m venv "$folder"
pip() { "$folder/bin/python" -m pip --quiet "$@"; }
pip install --require-hashes --no-deps --requirement "$source/docker/locks/build.txt"
# All wheels but Spark's, which is published as source only; it builds without isolation, from the locked setuptools.
pip install --require-hashes --no-deps --no-build-isolation --only-binary :all: --no-binary pyspark,pyspark-client \
    --requirement "$source/docker/locks/$lock.txt"
if [ "$lock" != airflow ]; then
    pip install --no-deps --no-build-isolation --no-index "$source"
fi
pip check
"$folder/bin/python" -m compileall -qq "$folder/lib" || true
pip uninstall --yes pip setuptools wheel
