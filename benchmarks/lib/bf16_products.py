"""Run a program with products of float32 matrices computed from bfloat16 copies, accumulated in float32.

    python benchmarks/lib/bf16_products.py PROGRAM [ARGUMENT ...]

PROGRAM is a Python file or a Python command such as tune. Weights, gradients and optimizer state stay float32. On a CPU
without AMX, oneDNN ignores the setting, and these products are computed in float32.
"""

import runpy
import shutil
import sys

import torch

if __name__ == "__main__":
    del sys.argv[0]
    torch.set_float32_matmul_precision("medium")
    runpy.run_path(shutil.which(sys.argv[0]) or sys.argv[0], run_name="__main__")
