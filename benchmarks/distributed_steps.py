"""Step time and memory on several ranks: OwLore against torchtune's distributed recipes, interleaved.

    python benchmarks/distributed_steps.py [--ranks 2] [--rounds 1] [--steps 12] [--model smollm2] [--output FILE]

Seconds and memory are measured on the first rank. Step time is the time from one logged step to the next, without the
first two steps. Memory is the peak up to the last step. As in methods.py, one step in ten has a draw and new bases, and
the draws are typical.
"""

import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from methods import MODELS, RESAMPLE_EVERY, Model, Result, row_config, step_seconds
from omegaconf import OmegaConf
from report import command, machine, parser, publish
from tqdm import tqdm
from tune_run import run_process

RECIPES = {
    "OwLore, γ=2": ["owlore_full_finetune"],
    "OwLore, γ=5": ["owlore_full_finetune"],
    "torchtune full": ["torchtune_on_gloo", "full_finetune_distributed"],
    "torchtune LoRA, r=16": ["torchtune_on_gloo", "lora_finetune_distributed"],
}


def time_row(row: str, model: Model, num_ranks: int, steps: int, result: Result) -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        config = row_config(row, model, scratch, steps, RESAMPLE_EVERY)
        if row == "torchtune full":  # its sharded state fits without 8-bit
            config |= {
                "optimizer_in_bwd": False,
                "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-5, "fused": True},
            }
        OmegaConf.save(OmegaConf.create(config), scratch / "config.yaml")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        command = [*torchrun, "-m", *RECIPES[row], "--config", str(scratch / "config.yaml")]
        run_process(command, log=scratch / "log.txt")
        lines = [json.loads(line) for line in (scratch / "steps.jsonl").read_text().splitlines()]
    result.seconds += step_seconds(lines)
    result.peak = max(result.peak, lines[-1]["peak_memory"])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--steps", type=int, default=12)
    arguments.add_argument("--model", choices=MODELS, default="llama2-7b" if torch.cuda.is_available() else "smollm2")
    args = arguments.parse_args()
    model = replace(MODELS[args.model], batch_size=1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.ranks)))
    results = {row: Result(tokens=args.ranks * model.seq_len) for row in RECIPES}
    for row, result in tqdm(list(results.items()) * args.rounds, unit="run"):
        time_row(row, model, args.ranks, args.steps, result)
    mean = {row: statistics.mean(result.seconds) for row, result in results.items()}
    lines = [
        "# A step on several ranks",
        "",
        f"{args.model} on {args.ranks} ranks, MMLU dev packed {model.batch_size} × {model.seq_len} tokens per rank, "
        f"{model.dtype}, rank 128, LoRA on all Linears; {args.rounds} interleaved rounds of {args.steps} steps; "
        f"{machine()}. Command: {command()}; its docstring describes the columns.",
        "",
        "| run | mean step, s | median | tokens/s | peak memory per rank, GB | step / torchtune full "
        "| step / torchtune LoRA, r=16 |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row} | {mean[row]:.2f} | {statistics.median(result.seconds):.2f} | {result.tokens / mean[row]:.0f} "
            f"| {result.peak:.2f} | {mean[row] / mean['torchtune full']:.2f} "
            f"| {mean[row] / mean['torchtune LoRA, r=16']:.2f} |"
            for row, result in results.items()
        ),
    ]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
