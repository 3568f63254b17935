"""The time to save a checkpoint of SmolLM2.

    python benchmarks/saving.py [--output benchmarks/saving.md]

A save is compared with safetensors writing the same tensors to one file, also synced to disk. The two are interleaved.
"""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf
from report import command, machine, parser, publish
from safetensors.torch import save_file

from owlore_full_finetune import OwLoreFullFinetuneRecipe
from owlore_tune.config import load_config
from owlore_tune.models.smollm2 import fetch
from owlore_tune.run.settings import TrainingSettings

NUM_SAVES = 9


def train(output_dir: str) -> OwLoreFullFinetuneRecipe:
    """Train two steps, so that there is optimizer state."""
    overrides = [
        "dataset.packed=true", "batch_size=2", "owlore.num_active_layers=2", "dataset_val=null", "owlore.score=uniform",
        f"output_dir={output_dir}", "max_steps_per_epoch=2",
    ]  # fmt: skip
    cfg = load_config("smollm2/135M_owlore", overrides)
    recipe = OwLoreFullFinetuneRecipe(TrainingSettings.from_config(OmegaConf.create(cfg)))
    recipe.setup()
    recipe.train()
    return recipe


def write_plainly(recipe: OwLoreFullFinetuneRecipe, path: Path) -> None:
    """Write the tensors of a checkpoint with plain safetensors, synced to disk."""
    tensors = {name: p.detach() for name, p in recipe._model.named_parameters()}
    for i, state in recipe._optimizer.state_dict()["state"].items():
        tensors |= {f"{i}.{key}": value for key, value in state.items() if torch.is_tensor(value)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    args = parser(__doc__).parse_args()
    fetch()
    saves: list[float] = []
    plain: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        recipe = train(f"{scratch}/run")
        for _ in range(NUM_SAVES):
            recipe._progress.step += 1
            started = time.perf_counter()
            recipe.save_checkpoint()
            saves.append(time.perf_counter() - started)
            num_bytes = sum(f.stat().st_size for f in recipe._step_dir().iterdir())
            shutil.rmtree(recipe._step_dir())
            started = time.perf_counter()
            write_plainly(recipe, Path(scratch) / "plain.safetensors")
            plain.append(time.perf_counter() - started)
            (Path(scratch) / "plain.safetensors").unlink()
    ratio = statistics.median(save / write for save, write in zip(saves, plain, strict=True))
    lines = [
        "# Cost of checkpoints",
        "",
        f"SmolLM2-135M, γ=2, rank 128, float32 on the CPU, {num_bytes / 1e6:.0f} MB per checkpoint; "
        f"{NUM_SAVES} saves; {machine()}. "
        f"Command: {command()}.",
        "",
        "| | |",
        "|---|---|",
        f"| save, median | {statistics.median(saves):.2f} s |",
        f"| same tensors with safetensors, synced, median | {statistics.median(plain):.2f} s |",
        f"| ratio, median of pairs | {ratio:.2f} |",
    ]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
