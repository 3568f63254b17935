"""Several ranks against one process, and the step time of OwLore on several ranks against torchtune's recipes.

    python benchmarks/distributed.py [--ranks 2] [--rounds 1] [--steps 12] [--output benchmarks/distributed.md]

Every row of the first table compares two `tune run`s that train on the same data in each step. Adam's eps is 1e-3: with
a small eps, the rounding error of a tiny gradient becomes a full step. Data is packed, because outlier scores include
padding. Ranks are GPUs if there are enough, otherwise CPU processes. The script fails if weights differ more than a row
allows.

Rounds of the second table are interleaved. Seconds and memory are measured on the first rank. Step time is the time
from one logged step to the next, without the first two steps. Memory is the peak up to the last step. As in methods.py,
one step in ten has a draw and new bases, and the draws are typical.
"""

import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lib.report import command, machine, parser, publish
from lib.tune_run import run_process
from methods import MODELS, RESAMPLE_EVERY, Model, Result, row_config, step_seconds
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tqdm import tqdm

from owlore_tune.models.smollm2 import fetch

SETTINGS = (
    "dataset.packed=true", "dataset_val=null", "tokenizer.max_seq_len=128", "lr_scheduler=null",
    "owlore.num_active_layers=2", "owlore.update_gap=5", "optimizer.eps=1e-3",
)  # fmt: skip
ROWS_PER_FORWARD = 6  # over all ranks


@dataclass(frozen=True)
class Case:
    overrides: tuple[str, ...] = ()
    rank: int = 16  # rank of projected gradients
    steps: int = 12
    resample_every: int = 3
    num_ranks: int | None = None  # None: --ranks
    within: float | None = 5e-6  # allowed difference of weights
    threads: int | None = None  # compare with one process on this many threads: the effect of rounding only


LARGE = dict(rank=128, steps=20, resample_every=1, within=None)
CASES = {
    "baseline": Case(),
    "accumulation of 2": Case(("gradient_accumulation_steps=2",)),
    "activation checkpointing": Case(("enable_activation_checkpointing=true",)),
    "embeddings, norm trained": Case(("owlore.train_embeddings=true", "owlore.train_norm=true")),
    "all weights on every rank": Case(("fsdp=false",)),
    "NF4": Case(("owlore.weights=nf4",), within=1e-5),
    "rank 128, a draw every step": Case(**LARGE),
    "the same, 1 process, 2 threads": Case(**LARGE, num_ranks=1, threads=2),
    "one rank": Case(num_ranks=1, within=0),
    "one rank, bf16": Case(("dtype=bf16",), num_ranks=1, within=0),
}


@dataclass(frozen=True)
class Run:
    weights: dict[str, torch.Tensor]
    steps: list[dict]
    num_draws: int


def train(case: Case, num_ranks: int | None, scratch: Path, device: str, threads: int = 1) -> Run:
    """Train ``case`` on ``num_ranks`` ranks, or without torchrun if None."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # set it for one process too: the order of sums affects rounding
    recipe = ["owlore_full_finetune", "--config", "smollm2/135M_owlore"]
    if num_ranks is not None:
        recipe = [f"--nproc_per_node={num_ranks}", "owlore_full_finetune", "--config"]
        recipe += ["smollm2/135M_owlore"]
    overrides = (
        *SETTINGS, *case.overrides, f"output_dir={scratch}/run", f"device={device}",
        f"batch_size={ROWS_PER_FORWARD // (num_ranks or 1)}", f"owlore.rank={case.rank}",
        f"max_steps_per_epoch={case.steps}", f"owlore.resample_every={case.resample_every}",
    )  # fmt: skip
    scratch.mkdir()
    run_process(["tune", "run", *recipe, *overrides], log=scratch / "log.txt")
    run = scratch / "run"
    files = (run / f"step_{case.steps}").glob("*.safetensors")
    return Run(
        {name: weight for file in files for name, weight in load_file(file).items()},
        [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()],
        len((run / "draws.jsonl").read_text().splitlines()),
    )


def compare(name: str, num_ranks: int) -> tuple[str, str | None]:
    """Return a row of the table, and a failure message or None."""
    case = CASES[name]
    num_ranks = case.num_ranks or num_ranks
    device = "cuda" if torch.cuda.device_count() >= num_ranks else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        one = train(case, None, Path(scratch) / "one", device)
        ranks = num_ranks if case.threads is None else None
        several = train(case, ranks, Path(scratch) / "several", device, case.threads or 1)
    weights = max((w.float() - several.weights[key].float()).abs().max().item() for key, w in one.weights.items())
    losses = max(abs(a["loss"] - b["loss"]) for a, b in zip(one.steps, several.steps, strict=True))
    missed = None
    if case.within is not None and weights > case.within:
        missed = f"{name}: weights differ by {weights:.1e}, more than {case.within:.1e}"
    return f"| {name} | {num_ranks} | {len(one.steps)}, {one.num_draws} | {weights:.1e} | {losses:.1e} |", missed


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


def steps_section(model: Model, num_ranks: int, rounds: int, steps: int) -> list[str]:
    """The table of step times."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_ranks))
    results = {row: Result(tokens=num_ranks * model.seq_len) for row in RECIPES}
    for row, result in tqdm(list(results.items()) * rounds, unit="run"):
        time_row(row, model, num_ranks, steps, result)
    mean = {row: statistics.mean(result.seconds) for row, result in results.items()}
    return [
        "## A step on several ranks", "",
        f"MMLU dev packed {model.batch_size} × {model.seq_len} tokens per rank, {model.dtype}, rank 128, LoRA on all "
        f"Linears; {rounds} interleaved rounds of {steps} steps.", "",
        "| run | mean step, s | median | tokens/s | peak memory per rank, GB | step / torchtune full "
        "| step / torchtune LoRA, r=16 |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row} | {mean[row]:.2f} | {statistics.median(result.seconds):.2f} | {result.tokens / mean[row]:.0f} "
            f"| {result.peak:.2f} | {mean[row] / mean['torchtune full']:.2f} "
            f"| {mean[row] / mean['torchtune LoRA, r=16']:.2f} |"
            for row, result in results.items()
        ),
    ]  # fmt: skip


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--steps", type=int, default=12)
    arguments.add_argument("--rows", nargs="+", choices=CASES, default=list(CASES))
    args = arguments.parse_args()
    if ROWS_PER_FORWARD % args.ranks:
        arguments.error(f"--ranks {args.ranks} does not divide {ROWS_PER_FORWARD} rows")
    fetch()
    rows, missed = zip(*(compare(name, args.ranks) for name in tqdm(args.rows)), strict=True)
    lines = [
        "# Several ranks",
        "",
        f"SmolLM2-135M, fp32 unless a row says otherwise, γ=2, gradients at rank 16, {ROWS_PER_FORWARD} × 128 tokens "
        f"per forward over all ranks; {machine()}. Command: {command()}.",
        "",
        "The 2-thread row compares one process with itself on 1 thread. It shows the effect of summation order in 20 "
        "draws at rank 128.",
        "",
        "| run | ranks | steps, draws | weight difference | loss difference |",
        "|---|---|---|---|---|",
        *rows,
        "",
        *steps_section(replace(MODELS["smollm2"], batch_size=1), args.ranks, args.rounds, args.steps),
    ]
    publish(lines, args.output)
    if any(missed):
        sys.exit("\n".join(filter(None, missed)))


if __name__ == "__main__":
    main()
