"""Freed memory of the process on a CPU: keep it for reuse, or return it. Both do nothing without glibc."""

import ctypes

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def reuse_freed_memory(device: torch.device) -> None:
    """On a CPU, make glibc keep freed blocks of up to 32 MB for reuse. Does nothing on other devices.

    By default it returns most of them to the system, and each activation then causes page faults. Larger blocks, such
    as the weights of a 7B model, are still returned.
    """
    if device.type == "cpu" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**28)  # bytes that each thread's heap may keep at its end


def return_freed_memory(device: torch.device) -> None:
    """On a CPU, return all freed blocks to the system, after rare work. Does nothing on other devices."""
    if device.type == "cpu" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(0)
