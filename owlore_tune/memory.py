"""How much memory a run takes, and how the CPU's allocator is told to give it."""

import ctypes
import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated on a CUDA device, else resident in this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def reuse_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step, where the model runs on the CPU.

    By default every large temporary goes back to the kernel and comes anew, page by page. Without glibc,
    or where it refuses, this does nothing.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of <malloc.h>
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and mallopt(mmap_threshold, 2**30):
        mallopt(trim_threshold, 2**31 - 1)
