"""Triton kernels for a GPU: one launch for what takes torch three to ten.

Each is an operation of torch that knows the shape of its result, so memory plans and counts of kernels need neither a
GPU nor Triton. Without Triton, torch computes the same.
"""

from importlib.util import find_spec

import torch

_HAS_TRITON = find_spec("triton") is not None  # torch for CPUs comes without it


def has_kernels(device: torch.device) -> bool:
    """Whether tensors of ``device`` are computed with these kernels."""
    return device.type == "cuda" and _HAS_TRITON
