"""torchtune's recipes for several devices, where there is no GPU too.

    torchrun --nproc_per_node N -m torchtune_on_gloo full_finetune_distributed --config C

On a CPU they stop at memory figures that torch has of GPUs alone, and one of them asks for NCCL: here they get no
figures, and gloo. They train as they ship.
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
# Not by name: the package that has it raises when it is imported.
runpy.run_path(str(Path(torchtune.__file__).parents[1] / "recipes" / f"{name}.py"), run_name="__main__")
