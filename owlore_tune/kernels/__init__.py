"""Triton kernels for a GPU: one launch for what takes torch three to ten.

Each is an operation of torch that knows the shape of its result, so memory plans on a GPU and compiled graphs have it.
Without Triton, or without the C compiler and Python headers that it needs, torch computes the same.
"""

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch


def _has_compiler() -> bool:
    """Whether Triton can compile its driver: a C compiler, and the headers of this Python."""
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]  # as Triton looks
    has_headers = Path(include, "Python.h").is_file()
    return has_headers and any([os.environ.get("CC"), *map(shutil.which, ("gcc", "clang"))])


# A build of torch for CPUs has no use for kernels, unless Triton's interpreter runs them.
HAS_TRITON = find_spec("triton") is not None and (
    (torch.version.cuda is not None and _has_compiler()) or os.environ.get("TRITON_INTERPRET") == "1"
)


def has_kernels(device: torch.device) -> bool:
    """Whether tensors of ``device`` are computed with these kernels."""
    return device.type == "cuda" and HAS_TRITON
