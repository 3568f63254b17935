"""SmolLM2-135M trained on several ranks and in one process: how far apart weights and losses end, and what each holds.

    python benchmarks/distributed.py [--ranks 2] [--output FILE]

Every row is two runs by `tune run`, on the same rows of data in each step. Adam's eps is 1e-3: with a small one the
rounding of a gradient that is next to nothing makes a whole step. Data is packed, since padding counts in outlier
scores. Ranks are GPUs where there are enough, else processes on the CPU. It fails where weights end further apart than
a row allows, or where optimizer state changes or a rank's is more than 0.75 of that of one process.
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from report import machine, parser, publish
from safetensors.torch import load_file
from tqdm import tqdm
from tune_run import run_process

from owlore_tune.models.smollm2 import fetch

SETTINGS = (
    "dataset.packed=true", "dataset_val=null", "tokenizer.max_seq_len=128", "lr_scheduler=null",
    "owlore.num_active_layers=2", "optimizer.update_gap=5", "optimizer.eps=1e-3",
)  # fmt: skip
ROWS_PER_FORWARD = 6  # over all ranks


@dataclass(frozen=True)
class Case:
    overrides: tuple[str, ...] = ()
    rank: int = 16  # of gradients
    steps: int = 12
    resample_every: int = 3
    num_ranks: int | None = None  # as many as are asked for
    within: float | None = 5e-6  # how far apart weights may end
    threads: int | None = None  # no ranks, but one process again with as many threads: what rounding alone does


LARGE = dict(rank=128, steps=20, resample_every=1, within=None)
CASES = {
    "as it comes": Case(),
    "accumulation of 2": Case(("gradient_accumulation_steps=2",)),
    "activation checkpointing": Case(("enable_activation_checkpointing=true",)),
    "embeddings, norm trained": Case(("owlore.train_embeddings=true", "owlore.train_norm=true")),
    "rank 128, a draw a step": Case(**LARGE),
    "the same, one process on 2 threads": Case(**LARGE, num_ranks=1, threads=2),
    "one rank": Case(num_ranks=1, within=0),
    "one rank, bf16": Case(("dtype=bf16",), num_ranks=1, within=0),
}


@dataclass(frozen=True)
class Run:
    weights: dict[str, torch.Tensor]
    steps: list[dict]
    num_draws: int

    @property
    def state_mb(self) -> list[float]:
        """After each step, on the first rank, which has the most."""
        return [1e3 * step["optimizer_state_gb"] for step in self.steps]


def train(case: Case, num_ranks: int | None, scratch: Path, device: str, threads: int = 1) -> Run:
    """``case`` on ``num_ranks`` ranks, or by the recipe for one device."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for one process too: sums of another order are other sums
    recipe = ["owlore_full_finetune", "--config", "smollm2/135M_owlore"]
    if num_ranks is not None:
        recipe = [f"--nproc_per_node={num_ranks}", "owlore_full_finetune", "--config"]
        recipe += ["smollm2/135M_owlore"]
    overrides = (
        *SETTINGS, *case.overrides, f"output_dir={scratch}/run", f"device={device}",
        f"batch_size={ROWS_PER_FORWARD // (num_ranks or 1)}", f"optimizer.rank={case.rank}",
        f"max_steps_per_epoch={case.steps}", f"owlore.resample_every={case.resample_every}",
    )  # fmt: skip
    scratch.mkdir()
    run_process(["tune", "run", *recipe, *overrides], log=scratch / "log.txt")
    run = scratch / "run"
    return Run(
        load_file(run / f"step_{case.steps}" / "model.safetensors"),
        [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()],
        len((run / "draws.jsonl").read_text().splitlines()),
    )


def compare(name: str, num_ranks: int) -> tuple[str, str | None]:
    """A row of the table, and what it misses."""
    case = CASES[name]
    num_ranks = case.num_ranks or num_ranks
    device = "cuda" if torch.cuda.device_count() >= num_ranks else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        one = train(case, None, Path(scratch) / "one", device)
        ranks = num_ranks if case.threads is None else None
        several = train(case, ranks, Path(scratch) / "several", device, case.threads or 1)
    weights = max((w.float() - several.weights[key].float()).abs().max().item() for key, w in one.weights.items())
    losses = max(abs(a["loss"] - b["loss"]) for a, b in zip(one.steps, several.steps, strict=True))
    held, share = max(one.state_mb), max(several.state_mb)
    constant = min(several.state_mb) == share and min(one.state_mb) == held
    missed = None
    if case.within is not None and weights > case.within:
        missed = f"{name}: weights {weights:.1e} apart, more than {case.within:.1e}"
    elif not constant or (num_ranks > 1 and share > 0.75 * held):
        missed = f"{name}: optimizer state {share:.2f} MB of {held:.2f}, {'' if constant else 'not '}constant"
    row = (
        f"| {name} | {num_ranks} | {len(one.steps)}, {one.num_draws} | {weights:.1e} | {losses:.1e} | {held:.2f} "
        f"| {share:.2f} | {share / held:.3f} | {'no' if constant else 'yes'} |"
    )
    return row, missed


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--rows", nargs="+", choices=CASES, default=list(CASES))
    args = arguments.parse_args()
    if ROWS_PER_FORWARD % args.ranks:
        arguments.error(f"--ranks {args.ranks} does not divide {ROWS_PER_FORWARD} rows")
    fetch()
    rows, missed = zip(*(compare(name, args.ranks) for name in tqdm(args.rows)), strict=True)
    lines = [
        "# Several ranks against one process",
        "",
        f"SmolLM2-135M, fp32 unless a row says otherwise, γ=2, gradients at rank 16, {ROWS_PER_FORWARD} × 128 tokens a "
        f"forward over all ranks; {machine()}. Made by `python benchmarks/distributed.py`.",
        "",
        "One process on two threads is against itself on one: what the order of sums does, in 20 draws at rank 128.",
        "",
        "| run | ranks | steps, draws | weights apart | losses apart | optimizer state of one process, MB | of a rank "
        "| share | does it change? |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    publish(lines, args.output)
    if any(missed):
        sys.exit("\n".join(filter(None, missed)))


if __name__ == "__main__":
    main()
