"""Cost of checkpoints on SmolLM2: the time of a save, and its effect on step time.

    python benchmarks/saving.py [--rounds 3] [--steps 30] [--output benchmarks/saving.md]

A save is compared with safetensors writing the same tensors to one file, also synced to disk. The two are interleaved.
Step times are compared pairwise between a run that saves every 10 steps and a run that never saves. Both have the same
seed, so each step has the same layers and samples.
"""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf
from report import machine, parser, publish
from safetensors.torch import save_file

from owlore_full_finetune import OwLoreFullFinetuneRecipe
from owlore_tune.config import load_config
from owlore_tune.models.smollm2 import fetch
from owlore_tune.run.settings import TrainingSettings

NUM_SAVES = 9


def train(steps: int, every: int | None, output_dir: str) -> OwLoreFullFinetuneRecipe:
    overrides = [
        "dataset.packed=true", "batch_size=2", "owlore.num_active_layers=2", "dataset_val=null", "owlore.score=uniform",
        "epochs=10", f"output_dir={output_dir}", f"save_every_n_steps={every or 'null'}", "keep_last_n=2",
    ]  # fmt: skip
    cfg = load_config("smollm2/135M_owlore", overrides)
    cfg.max_steps_per_epoch = None
    recipe = OwLoreFullFinetuneRecipe(TrainingSettings.from_config(OmegaConf.create(cfg)))
    recipe.setup()
    report = recipe._report.step

    def report_until_done(metrics, *args, **kwargs):
        report(metrics, *args, **kwargs)
        if metrics["step"] == steps:
            raise KeyboardInterrupt  # not caught by the recipe

    recipe._report.step = report_until_done
    try:
        recipe.train()
    except KeyboardInterrupt:
        return recipe
    raise AssertionError("not enough data for the requested steps")


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
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=30)
    args = arguments.parse_args()
    fetch()
    ratios: list[float] = []
    saves: list[float] = []
    plain: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.rounds):
            without = train(args.steps, None, f"{scratch}/without_{number}")
            with_saves = train(args.steps, 10, f"{scratch}/with_{number}")
            pairs = zip(with_saves._report.records.steps[2:], without._report.records.steps[2:], strict=True)
            ratios += [saving["step_seconds"] / not_saving["step_seconds"] for saving, not_saving in pairs]
            print(f"round {number + 1}: {statistics.median(ratios):.3f}", flush=True)
        with_saves._cfg.keep_last_n = None  # time only the write; files are deleted afterwards
        for _ in range(NUM_SAVES):
            with_saves._progress.step += 1
            started = time.perf_counter()
            with_saves.save_checkpoint()
            saves.append(time.perf_counter() - started)
            num_bytes = sum(f.stat().st_size for f in with_saves._step_dir().iterdir())
            shutil.rmtree(with_saves._step_dir())
            started = time.perf_counter()
            write_plainly(with_saves, Path(scratch) / "plain.safetensors")
            plain.append(time.perf_counter() - started)
            (Path(scratch) / "plain.safetensors").unlink()
    ratio = statistics.median(save / write for save, write in zip(saves, plain, strict=True))
    lines = [
        "# Cost of checkpoints",
        "",
        f"SmolLM2-135M, γ=2, rank 128, float32 on the CPU, {num_bytes / 1e6:.0f} MB per checkpoint; "
        f"{args.rounds} rounds of {args.steps} steps, {NUM_SAVES} saves; {machine()}. "
        "Command: `python benchmarks/saving.py`.",
        "",
        "| | |",
        "|---|---|",
        f"| save, median | {statistics.median(saves):.2f} s |",
        f"| same tensors with safetensors, synced, median | {statistics.median(plain):.2f} s |",
        f"| ratio, median of pairs | {ratio:.2f} |",
        f"| step with saves every 10 / without, median of {len(ratios)} pairs | {statistics.median(ratios):.3f} |",
    ]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
