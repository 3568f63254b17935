"""Loss curve and size of 8-bit moments and bfloat16 bases against float32 optimizer state.

    python benchmarks/few_bits.py [--steps 200] [--output benchmarks/few_bits.md]

Two runs of configs/smollm2/135M_owlore.yaml with one row of data per step, K=10 and learning rate 3e-4; only these two
options differ. They run concurrently with half of the threads each, because time is not measured.
"""

import json
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure
from report import command, machine, parser, publish
from tune_run import tune_run

from owlore_tune.models.smollm2 import fetch
from owlore_tune.run.plots import BLUE, ORANGE

RUNS = {
    "float32 moments and bases": [],
    "8-bit moments, bf16 bases": ["optimizer.state_bits=8", "optimizer.basis_bits=16"],
}
WINDOW = 20  # steps in a loss average


def train(overrides: list[str], steps: int, scratch: Path) -> tuple[list[float], dict]:
    """Return the loss of each step, and the manifest."""
    scratch.mkdir()
    tune_run(
        "owlore_full_finetune", "smollm2/135M_owlore", f"output_dir={scratch / 'run'}",
        f"max_steps_per_epoch={steps}", "batch_size=1", "optimizer.lr=3e-4", "owlore.resample_every=10",
        "metric_logger._component_=step_logger.StepLogger", f"metric_logger.path={scratch / 'steps.jsonl'}",
        "~metric_logger.log_dir", *overrides, log=scratch / "log.txt",
    )  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (scratch / "steps.jsonl").read_text().splitlines()]
    return losses, json.loads((scratch / "run" / "manifest.json").read_text())


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=200)
    args = arguments.parse_args()
    fetch()
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 2) // 2))
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(train, overrides, args.steps, Path(name) / str(number))
            for number, overrides in enumerate(RUNS.values())
        ]
        results = [job.result() for job in jobs]
    full, small = (statistics.mean(losses[-WINDOW:]) for losses, _ in results)
    held_out = [manifest["held_out_loss"]["after"] for _, manifest in results]
    measured = [manifest["memory_bytes"]["measured"] for _, manifest in results]
    sizes = [(memory["moments"] + memory["bases"]) / 1e6 for memory in measured]
    marks = [args.steps // 4 * i for i in range(1, 5)]
    lines = [
        "# Training with low-bit optimizer state",
        "",
        f"SmolLM2-135M, {args.steps} steps of configs/smollm2/135M_owlore.yaml (γ=5, rank 128, a draw every 10 steps), "
        "one row each; "
        f"losses are means over {WINDOW} steps; {machine()}. Command: {command()}.",
        "",
        "| optimizer state | MB | " + " | ".join(f"loss at {mark}" for mark in marks) + " | held-out loss after |",
        "|---|---" + "|---" * (len(marks) + 1) + "|",
        *(
            f"| {run} | {size:.1f} | "
            + " | ".join(f"{statistics.mean(losses[mark - WINDOW : mark]):.4f}" for mark in marks)
            + f" | {manifest['held_out_loss']['after']:.4f} |"
            for run, size, (losses, manifest) in zip(RUNS, sizes, results, strict=True)
        ),
        "",
        f"At the end: training loss × {small / full:.4f}, held-out loss × {held_out[1] / held_out[0]:.4f}, bytes "
        f"× {sizes[1] / sizes[0]:.3f}.",
    ]
    publish(lines, args.output)
    if args.output:
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        for (run, (losses, _)), colour, style in zip(
            zip(RUNS, results, strict=True), (BLUE, ORANGE), ("-", "--"), strict=True
        ):
            axes.plot(range(1, len(losses) + 1), losses, style, color=colour, linewidth=1.2, label=run)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("training loss, nats per token")
        axes.legend()
        figure.savefig(args.output.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
