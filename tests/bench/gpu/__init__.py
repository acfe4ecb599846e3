"""Tests and timings of every CUDA path on one GPU; `tests/bench/gpu.sh` starts them."""
