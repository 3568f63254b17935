"""Held-out loss with quantized frozen layers, next to full precision, on SmolLM2-135M.

    python benchmarks/frozen.py [--seeds 3] [--output benchmarks/frozen.md]

The demo's data, packed 1 × 512 tokens. The loss is measured in full precision at the end, one row for each format and
seed. Finished rows are kept in frozen.jsonl beside the output and are not run again. Step times are in methods.md.
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from report import command, machine, parser, publish
from tune_run import tune_run

from owlore_tune.models.smollm2 import fetch

FORMATS = {
    "full": [],
    "int8, int8 products": ["owlore.frozen_weights=int8", "owlore.frozen_products=int8"],
    "nf4": ["owlore.frozen_weights=nf4"],
}
STEPS = 200  # of a row that measures the loss


def run(overrides: list[str]) -> dict:
    """The manifest of a run."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "run"
        tune_run(
            "owlore_full_finetune", "smollm2/135M_owlore", f"output_dir={output}", *overrides, log=Path(name) / "log"
        )
        return json.loads((output / "manifest.json").read_text())


def train(kind: str, seed: int) -> dict:
    data = ["dataset.packed=true", "batch_size=1", "epochs=4", f"max_steps_per_epoch={STEPS // 4}"]
    method = ["optimizer.lr=3e-4", "owlore.resample_every=10"]
    manifest = run([f"seed={seed}", *data, *method, *FORMATS[kind]])
    return {"loss": manifest["held_out_loss"]["after"], "steps": manifest["steps"]}


class Rows:
    """Measurements, kept in a file: each is made once."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def once(self, key: list, measure: Callable[[], dict]) -> dict:
        for row in self._rows:
            if row["key"] == key:
                return row
        row = {"key": key, **measure()}
        self._rows.append(row)
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
        return row


def table_of_losses(rows: Rows, seeds: int) -> list[str]:
    losses: dict[str, list[float]] = {}
    for seed in range(seeds):
        for kind in FORMATS:
            row = rows.once(["loss", kind, seed, STEPS], partial(train, kind, seed))
            losses.setdefault(kind, []).append(row["loss"])
    lines = [
        f"γ=5, {STEPS} steps of packed 1 × 512 tokens, {seeds} seeds. Held-out loss, measured in full precision.",
        "",
        "| frozen layers | held-out loss by seed | mean | mean / full |",
        "|---|---|---|---|",
    ]
    whole = statistics.mean(losses["full"])
    for kind, found in losses.items():
        mean = statistics.mean(found)
        lines.append(f"| {kind} | {', '.join(f'{loss:.4f}' for loss in found)} | {mean:.4f} | {mean / whole:.4f} |")
    return lines


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, default=3)
    args = arguments.parse_args()
    fetch()
    rows = Rows(Path(args.output or "frozen.md").with_suffix(".jsonl"))
    lines = [
        "# Quantized frozen layers",
        "",
        f"SmolLM2-135M, rank 128, the rest in float32; {machine()}. Command: {command()}.",
        "",
        *table_of_losses(rows, args.seeds),
    ]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
