"""Peak memory of a LLaMA-2-7B run, from process start to exit, against the memory plan.

    python benchmarks/llama2_7b.py [--size 7B] [--model /tmp/Llama-2-7b-hf] [--output benchmarks/llama2_7b.md]

Each row is a complete `tune run` of configs/llama2/7B_owlore.yaml: load 13.5 GB from disk, score the layers, train
three steps of 1 × 512 tokens over two draws, and save. If ``--model`` does not exist, random weights in the real
layout are created there (random_checkpoint.py). Memory and time do not depend on the values of the weights. With
``--size 13B``, the model is LLaMA-2-13B (26 GB on disk).
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from report import machine, parser, publish
from tune_run import tune_run

from owlore_tune.data.builders import mmlu_dev_rows
from owlore_tune.run.records import read_records

RUN = [
    "dataset.source=null", "dataset.packed=true", "tokenizer.max_seq_len=512", "batch_size=1",
    "gradient_accumulation_steps=1", "max_steps_per_epoch=3", "save_every_n_steps=null", "owlore.resample_every=2",
    "owlore.calibration_batches=1", "optimizer.rank=128", "device=cpu",
]  # fmt: skip
LISA = ["owlore.num_active_layers=2", "owlore.score=uniform", "optimizer.rank=null"]
INT8 = ["owlore.frozen_weights=int8", "owlore.frozen_products=int8"]
NF4 = ["owlore.frozen_weights=nf4"]
ROWS = {
    "OwLore, γ=5, rank 128": [],
    "OwLore, γ=5, rank 128, frozen layers in int8": INT8,
    "OwLore, γ=5, rank 128, frozen layers in NF4": NF4,
    "OwLore, γ=2, rank 128, frozen layers in NF4": [*NF4, "owlore.num_active_layers=2"],
    "LISA, γ=2": LISA,
    "LISA, γ=2, 8-bit moments": [*LISA, "optimizer.state_bits=8"],
}


def measure(size: str, overrides: list[str], model: Path) -> tuple[float, dict, list[dict]]:
    """Return the peak resident size of a run in GB, its manifest, and its steps."""
    with tempfile.TemporaryDirectory(dir=model.parent) as name:
        scratch = Path(name)
        run, data = scratch / "run", scratch / "data.json"
        rows = [{"instruction": "Go on.", "output": row["instruction"] + row["output"]} for row in mmlu_dev_rows()]
        data.write_text(json.dumps(rows))
        places = [f"checkpointer.checkpoint_dir={model}", f"output_dir={run}", f"dataset.data_files={data}"]
        peak = tune_run(
            "owlore_full_finetune", f"llama2/{size}_owlore", *places, *RUN, *overrides, log=scratch / "log.txt"
        )
        return peak, json.loads((run / "manifest.json").read_text()), read_records(run / "steps.jsonl")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--size", default="7B", choices=("7B", "13B"))
    arguments.add_argument("--model", type=Path, help="model directory; omitted: /tmp/Llama-2-7b-hf or -13b-hf")
    arguments.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), help="rows to run")
    args = arguments.parse_args()
    model = args.model or Path(f"/tmp/Llama-2-{args.size.lower()}-hf")
    if not (model / "config.json").is_file():
        script = Path(__file__).with_name("random_checkpoint.py")
        config = f"--config=llama2/{args.size}_owlore"
        subprocess.run([sys.executable, script, config, "--output", model], check=True)
    lines = [
        f"# LLaMA-2-{args.size} on one machine",
        "",
        "Real shape in bfloat16, 1 × 512 tokens, activation checkpointing, embeddings and head frozen; load from disk, "
        f"score, 3 steps over 2 draws, save; {machine()}. Peak memory covers the whole process from start to "
        "exit. Command: `python benchmarks/llama2_7b.py`.",
        "",
        "The time of a step is the median without its draw. Loading includes scoring and quantizing. A redraw writes "
        "and reads layers, and quantizes those that stop training.",
        "",
        "| run | peak memory, GB | planned, GB | measured / planned | optimizer state, GB | step, s | loading, s "
        "| redraw, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in args.rows:
        peak, manifest, steps = measure(args.size, ROWS[row], model)
        planned, measured = manifest["memory_bytes"].values()
        state = measured["moments"] + measured["bases"]
        expected = planned["total"] / 1e9
        seconds = statistics.median(step["step_seconds"] - step["redraw_seconds"] for step in steps)
        loading = manifest["seconds"]["load"] + manifest["seconds"].get("score", 0.0)
        lines.append(
            f"| {row} | {peak:.2f} | {expected:.2f} | {peak / expected:.3f} "
            f"| {state / 1e9:.2f} | {seconds:.1f} | {loading:.0f} | {steps[-1]['redraw_seconds']:.1f} |"
        )
        print(lines[-1], flush=True)
    publish(lines, args.output)


if __name__ == "__main__":
    main()
