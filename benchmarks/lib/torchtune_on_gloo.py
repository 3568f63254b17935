"""Run torchtune's distributed recipes, also without a GPU.

    torchrun --nproc_per_node N -m torchtune_on_gloo full_finetune_distributed --config C

On the CPU, the recipes fail because torch has no CPU memory statistics, and one of them requires NCCL. This script
disables the statistics and uses gloo. Training is unchanged.
"""

import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torchtune
from torchtune import training

name = sys.argv.pop(1)
if not torch.cuda.is_available():
    init_process_group = dist.init_process_group
    dist.init_process_group = lambda backend: init_process_group("gloo")
    training.cleanup_before_training = lambda: None
    training.get_memory_stats = lambda device: {}
    training.log_memory_stats = lambda stats: None
# Run by path: importing torchtune's recipes package raises an error.
runpy.run_path(str(Path(torchtune.__file__).parents[1] / "recipes" / f"{name}.py"), run_name="__main__")
