"""Choice of the device and number of threads for torch, from `runtime`."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist

from crane_core.config import Runtime
from crane_core.errors import ConfigError

logger = logging.getLogger(__name__)

UNPROVEN = (
    "not yet run on a GPU: whole jobs, a training on several GPUs, similar items, lists that grow, reasons, and faiss "
    "for GPUs"
)
"""Names what no GPU has run yet (`tests/bench/results/gpu.md` has what one has run). `crane doctor` says it, jobs with
`runtime.device=cuda` warn of it, and the README repeats it."""


def use_torch_threads(runtime: Runtime) -> None:
    """Set the number of torch threads, for jobs that compute on the CPU whatever `runtime.device` is.

    If neither `runtime.num_threads` nor OMP_NUM_THREADS gives the number, the ranks of a machine share its cores.
    """
    if runtime.num_threads is not None:
        torch.set_num_threads(runtime.num_threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def use_device(runtime: Runtime) -> torch.device:
    """Set the number of torch threads and return this rank's device.

    On CUDA, torch takes algorithms that give the same bits in every run, as all do on a CPU: a job that is killed or
    run again then leaves the same artifact.

    Raises:
        ConfigError: CUDA is configured and not available.
    """
    use_torch_threads(runtime)
    if not runtime.device.startswith("cuda"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"runtime.device is {runtime.device!r} but torch {torch.__version__} sees no CUDA device.",
            "Set runtime.device=cpu, or install a CUDA build of torch on a machine with a GPU.",
        )
    if UNPROVEN:
        logger.warning("unproven device=%s %s; tests/bench/gpu.sh tests it", runtime.device, UNPROVEN)
    # Without this setting of cuBLAS, torch refuses every matrix product under deterministic algorithms.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Nothing is read before it is written. To fill new memory each time would be a pass over it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    local_rank = dist.get_node_local_rank(fallback_rank=0)
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
