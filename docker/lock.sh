#!/usr/bin/env bash
# Write docker/locks/ from pyproject.toml: every package of every image, with its version and hashes.
#
#   UV_FIND_LINKS=FOLDER_OR_PAGE docker/lock.sh [--upgrade]     where torch's CPU builds (+cpu) are, beside the index
#
# Versions that still fit are kept; --upgrade takes the newest. uv is found in .venv-infra or in PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv=.venv-infra/bin/uv
[ -x "$uv" ] || uv=uv
torch="$(sed -n 's/^cpu = \["\(torch==[0-9.]*\)"\]$/\1/p' pyproject.toml)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# lock NAME ARGUMENT...: compile what the arguments name into docker/locks/NAME.txt.
lock() {
    local name=$1
    shift
    "$uv" pip compile --quiet --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --no-emit-index-url --no-emit-find-links --no-annotate \
        --custom-compile-command "make locks" --output-file "docker/locks/$name.txt" "$@"
}

mkdir -p docker/locks
printf '%s+cpu\n' "$torch" >"$scratch/cpu.txt"
printf 'faiss-cpu ; sys_platform == "never"\n' >"$scratch/cuda.txt"
lock build --group build "$@"
lock airflow --group airflow-image "$@"
lock spark pyproject.toml "$@"
lock torch-cpu pyproject.toml --extra cpu --extra server --constraint "$scratch/cpu.txt" "$@"
# The index's own builds are those for CUDA.
unset UV_FIND_LINKS
lock torch-cuda pyproject.toml --extra cuda --extra server --override "$scratch/cuda.txt" "$@"
