"""Peak memory of runs of LLaMA-2-7B and 13B, from process start to exit, against the memory plan.

    python benchmarks/llama2_7b.py [--models /tmp/random] [--rows NAME ...] [--tokens 512] [--output FILE]

Each row is a complete `tune run` of configs/llama2/7B_owlore.yaml or 13B_owlore.yaml: load 13.5 or 26 GB from disk,
score the layers, train three steps of one row over two draws, and save. Random weights in the real layout are
created below ``--models`` if they are not there (`owlore random`). Memory and time do not depend on the values of
the weights.
"""

import json
import statistics
import subprocess
import tempfile
from pathlib import Path

from lib.report import command, machine, parser, publish
from lib.tune_run import tune_run

from owlore_tune.data.datasets import mmlu_dev_rows
from owlore_tune.training.report import read_records

RUN = [
    "dataset.source=null", "dataset.packed=true", "batch_size=1", "enable_activation_checkpointing=true",
    "gradient_accumulation_steps=1", "max_steps_per_epoch=3", "save_every_n_steps=null", "owlore.resample_every=2",
    "owlore.calibration_batches=1", "owlore.rank=128", "device=cpu",
]  # fmt: skip
LISA = ["owlore.num_active_layers=2", "owlore.score=uniform", "owlore.rank=null"]
INT8 = ["owlore.weights=int8", "owlore.products=int8"]
NF4 = ["owlore.weights=nf4"]
GAMMA_2 = ["owlore.num_active_layers=2"]
EVERY = ["owlore.num_active_layers=null", "owlore.score=uniform"]
EIGHT_BITS = ["optimizer=torchao.optim.AdamW8bit", "~optimizer.fused"]
ROWS = {
    "OwLore, γ=5": ("7B", []),
    "OwLore, γ=5, int8": ("7B", INT8),
    "OwLore, γ=2, NF4": ("7B", [*NF4, *GAMMA_2]),
    "OwLore, γ=5, NF4": ("7B", NF4),
    "OwLore, all layers, NF4, 8-bit moments": ("7B", [*NF4, *EVERY, *EIGHT_BITS]),
    "LISA, γ=2, 8-bit moments": ("7B", [*LISA, *EIGHT_BITS, "optimizer.bf16_stochastic_round=true"]),
    "LLaMA-2-13B, OwLore, γ=2, NF4": ("13B", [*NF4, *GAMMA_2]),
}


def measure(size: str, overrides: list[str], model: Path, tokens: int) -> tuple[float, dict, list[dict]]:
    """Return the peak resident size of a run in GB, its manifest, and its steps."""
    with tempfile.TemporaryDirectory(dir=model.parent) as name:
        scratch = Path(name)
        run, data = scratch / "run", scratch / "data.json"
        rows = [{"instruction": "Go on.", "output": row["instruction"] + row["output"]} for row in mmlu_dev_rows()]
        data.write_text(json.dumps(rows))
        own = [
            f"checkpointer.checkpoint_dir={model}", f"output_dir={run}", f"dataset.data_files={data}",
            f"tokenizer.max_seq_len={tokens}",
        ]  # fmt: skip
        peak = tune_run(
            "owlore_full_finetune", f"llama2/{size}_owlore", *own, *RUN, *overrides, log=scratch / "log.txt"
        )
        return peak, json.loads((run / "manifest.json").read_text()), read_records(run / "steps.jsonl")


def random_model(size: str, models: Path) -> Path:
    """Return the directory of a model of this size. Create it if it does not exist."""
    model = models / f"Llama-2-{size.lower()}-hf"
    if not (model / "config.json").is_file():
        subprocess.run(["owlore", "random", f"--config=llama2/{size}_owlore", "--output", model], check=True)
    return model


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", type=Path, default=Path("/tmp/random"), help="directory of the models, 40 GB")
    arguments.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), help="rows to run")
    arguments.add_argument("--tokens", type=int, default=512, help="per row; fewer on a CPU without bf16")
    args = arguments.parse_args()
    lines = [
        "# LLaMA-2-7B and 13B on one machine",
        "",
        f"Real shape in bfloat16, 1 × {args.tokens} tokens, activation checkpointing, embeddings and head frozen; load "
        f"from disk, score, 3 steps over 2 draws, save; {machine()}. Peak memory covers the whole process from start "
        f"to exit. Command: {command()}.",
        "",
        "Rank 128. The time of a step is the median of three without the draw. Two of the three make bases, and with "
        "all layers one of them. Loading includes scoring and quantizing. A redraw writes layers that leave, and "
        "quantizes them anew.",
        "",
        "| run | peak memory, GB | planned, GB | measured / planned | A, bases and moments, GB | step, s | loading, s "
        "| redraw, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in args.rows:
        size, overrides = ROWS[row]
        peak, manifest, steps = measure(size, overrides, random_model(size, args.models), args.tokens)
        planned, measured = manifest["memory_bytes"].values()
        state = measured["projected"] + measured["moments"] + measured["bases"]
        expected = planned["total"] / 1e9
        seconds = statistics.median(step["step_seconds"] - step["redraw_seconds"] for step in steps)
        loading = manifest["seconds"]["load"] + manifest["seconds"].get("score", 0.0)
        lines.append(
            f"| {row} | {peak:.2f} | {expected:.2f} | {peak / expected:.3f} "
            f"| {state / 1e9:.2f} | {seconds:.1f} | {loading:.0f} | {steps[-1]['redraw_seconds']:.1f} |"
        )
        publish(lines, args.output)  # after every row, because each takes minutes


if __name__ == "__main__":
    main()
