"""Step time and held-out loss with quantized frozen layers, next to full precision, on SmolLM2-135M.

    python benchmarks/frozen.py [--seeds 3] [--epochs 4] [--rounds 3] [--output benchmarks/frozen.md]

Step time: packed 2 × 512 tokens, float32, rows interleaved, median of the steps after the second. Loss: the demo's
data, 4 rows per step, measured in full precision at the end, one row for each format and seed. Finished rows are kept
in frozen.jsonl beside the output and are not run again.
"""

import json
import statistics
import tempfile
from pathlib import Path

from report import machine, parser, publish
from tune_run import tune_run

from owlore_tune.models.smollm2 import fetch

FORMATS = {
    "full": [],
    "int8": ["owlore.frozen_weights=int8"],
    "int8, int8 products": ["owlore.frozen_weights=int8", "owlore.frozen_products=int8"],
    "nf4": ["owlore.frozen_weights=nf4"],
}
TIMED = ["full", "int8, int8 products", "nf4"]


def run(overrides: list[str]) -> dict:
    """The manifest and the steps of a run."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "run"
        tune_run(
            "owlore_full_finetune", "smollm2/135M_owlore", f"output_dir={output}", *overrides, log=Path(name) / "log"
        )
        steps = [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]
        return json.loads((output / "manifest.json").read_text()) | {"step_records": steps}


def time_steps(kind: str, gamma: int) -> dict:
    manifest = run([
        "dataset.packed=true", "batch_size=2", "dataset_val=null", "max_steps_per_epoch=10", "owlore.resample_every=4",
        "owlore.calibration_batches=1", f"owlore.num_active_layers={gamma}", *FORMATS[kind],
    ])  # fmt: skip
    seconds = [step["step_seconds"] for step in manifest["step_records"][2:]]
    return {"seconds": statistics.median(seconds), "peak": manifest["memory_bytes"]["measured"]["total"] / 1e9}


def train(kind: str, seed: int, epochs: int) -> dict:
    manifest = run([f"seed={seed}", f"epochs={epochs}", *FORMATS[kind]])
    return {"loss": manifest["held_out_loss"]["after"], "steps": manifest["steps"]}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--epochs", type=int, default=4, help="of 59 steps")
    arguments.add_argument("--rounds", type=int, default=3)
    args = arguments.parse_args()
    fetch()
    kept = Path(args.output or "frozen.md").with_suffix(".jsonl")
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []

    def once(key: list, measure) -> dict:
        for row in rows:
            if row["key"] == key:
                return row
        row = {"key": key, **measure()}
        rows.append(row)
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
        return row

    timed: dict[tuple[str, int], list[dict]] = {}
    for number in range(args.rounds):
        for gamma in (2, 5):
            for kind in TIMED:
                row = once(["time", kind, gamma, number], lambda kind=kind, gamma=gamma: time_steps(kind, gamma))
                timed.setdefault((kind, gamma), []).append(row)
    losses: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        for kind in FORMATS:
            row = once(["loss", kind, seed, args.epochs], lambda kind=kind, seed=seed: train(kind, seed, args.epochs))
            losses.setdefault(kind, []).append(row["loss"])
    lines = [
        "# Quantized frozen layers",
        "",
        f"SmolLM2-135M, rank 128, the rest in float32; {machine()}. Command: `python benchmarks/frozen.py`.",
        "",
        "## Steps",
        "",
        f"Packed 2 × 512 tokens; {args.rounds} interleaved rounds of 10 steps over 3 draws. The ratio divides the step "
        "time by that of full precision in the same round; it is the median over the rounds.",
        "",
        "| frozen layers | γ | median step, s | step / full | peak memory, GB |",
        "|---|---|---|---|---|",
    ]
    for (kind, gamma), found in timed.items():
        ratios = [row["seconds"] / full["seconds"] for row, full in zip(found, timed["full", gamma], strict=True)]
        seconds, peak = (statistics.median(row[key] for row in found) for key in ("seconds", "peak"))
        lines.append(f"| {kind} | {gamma} | {seconds:.2f} | {statistics.median(ratios):.2f} | {peak:.2f} |")
    lines += [
        "",
        "## Loss",
        "",
        f"γ=5, {59 * args.epochs} steps of 4 rows, {args.seeds} seeds. Held-out loss, measured in full precision.",
        "",
        "| frozen layers | held-out loss by seed | mean | mean / full |",
        "|---|---|---|---|",
    ]
    whole = statistics.mean(losses["full"])
    for kind, found in losses.items():
        mean = statistics.mean(found)
        lines.append(f"| {kind} | {', '.join(f'{loss:.4f}' for loss in found)} | {mean:.4f} | {mean / whole:.4f} |")
    publish(lines, args.output)


if __name__ == "__main__":
    main()
