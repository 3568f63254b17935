"""Several processes on this machine that train together."""

import os
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from runs import variant, weights

PROGRAMS = Path(__file__).parent / "distributed_programs.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(num_ranks: int, *arguments: str | Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    return subprocess.run(
        [*command, *options, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=400
    )


def train_together(num_ranks: int, *configs: dict) -> None:
    """Train each of ``configs`` on ``num_ranks`` ranks, one after the other."""
    files = [write(config) for config in configs]
    result = torchrun(num_ranks, PROGRAMS, "train", *files)
    assert result.returncode == 0, result.stderr[-3000:]


def write(config: dict) -> Path:
    file = Path(f"{config['output_dir']}.yaml")
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    return file


def furthest(one: dict, other: dict) -> float:
    """Return the largest difference between the final weights of two runs."""
    theirs = weights(other)
    return max((weight - theirs[name]).abs().max().item() for name, weight in weights(one).items())


def on_ranks(num_ranks: int, config: dict, name: str, **changes) -> dict:
    return variant(config, name, **{"batch_size": 6 // num_ranks, "batch_size_val": 2, **changes})
