"""Step time and peak memory of OwLore against torchtune's own full and LoRA recipes, on SmolLM2 and the same data.

    python benchmarks/steps.py [--rounds 3] [--steps 24] [--output benchmarks/steps.md]

Each row is a whole `tune run` process; the rows take turns, round by round, so that a noisy machine treats them alike.
Step time is the median over all rounds of the seconds between two logged steps, the first two left out. Memory is the
largest resident size of the process, loading and saving included.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from omegaconf import OmegaConf
from report import machine, parser, publish

from owlore_tune.smollm2 import fetch

ROWS = {
    "torchtune full": ("full_finetune_single_device", []),
    "torchtune LoRA, r=16": ("lora_finetune_single_device", []),
    "OwLore, γ=2": ("owlore_full_finetune", []),
    "OwLore, γ=2, embeddings trained": ("owlore_full_finetune", ["owlore.train_embeddings=true"]),
}
DATA = {
    "tokenizer": {
        "_component_": "owlore_tune.tokenizer.HFChatTokenizer", "path": "${checkpointer.checkpoint_dir}",
        "max_seq_len": 512,
    },
    "dataset": {"_component_": "owlore_tune.data.mmlu_dev_dataset", "packed": True},
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "shuffle": True,
    "seed": 42,
    "epochs": 1,
    "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
    "device": "cpu",
    "dtype": "fp32",
    "compile": False,
    "enable_activation_checkpointing": False,
}  # fmt: skip


def recipe_config(recipe: str, model_dir: Path, scratch: Path, steps: int) -> dict:
    """The config of one row: the data above, and what its recipe wants."""
    run = {
        "output_dir": str(scratch / "run"),
        "max_steps_per_epoch": steps,
        "metric_logger": {"_component_": "step_logger.StepLogger", "path": str(scratch / "steps.jsonl")},
    }
    checkpointer = {"checkpoint_dir": str(model_dir), "model_type": "LLAMA3_2"}
    if recipe == "owlore_full_finetune":
        return DATA | run | {
            "model": {"_component_": "owlore_tune.smollm2.smollm2_135m"},
            "checkpointer": {"_component_": "owlore_tune.checkpoints.HFCheckpointer", **checkpointer},
            "owlore": {"num_active_layers": 2, "resample_every": 5},
            "optimizer": {"_component_": "owlore_tune.optim.OwLoreAdamW", "lr": 3e-4, "rank": 128},
        }  # fmt: skip
    peer = DATA | run | {
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_files": ["model.safetensors"],
            "output_dir": "${output_dir}", **checkpointer,
        },
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-5, "fused": True},
        "resume_from_checkpoint": False,
        "collate_fn": "torchtune.data.padded_collate_sft",
        "lr_scheduler": None,
        "log_every_n_steps": 1,
    }  # fmt: skip
    if recipe == "full_finetune_single_device":
        return peer | {"model": {"_component_": "owlore_tune.smollm2.smollm2_135m"}, "optimizer_in_bwd": False}
    lora = {
        "_component_": "owlore_tune.smollm2.lora_smollm2_135m", "apply_lora_to_mlp": True, "lora_rank": 16,
        "lora_alpha": 32, "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    }  # fmt: skip
    scheduler = {
        "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
        "num_warmup_steps": 2,
    }
    return peer | {"model": lora, "save_adapter_weights_only": False, "lr_scheduler": scheduler}


def run_row(row: str, model_dir: Path, steps: int) -> tuple[list[float], float]:
    """Seconds of each step after the second, and peak resident GB."""
    recipe, overrides = ROWS[row]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        config = scratch / "config.yaml"
        OmegaConf.save(OmegaConf.create(recipe_config(recipe, model_dir, scratch, steps)), config)
        command = ["tune", "run", recipe, "--config", str(config), *overrides]
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        with (scratch / "log.txt").open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if status != 0:
            sys.exit(f"{row} failed:\n{(scratch / 'log.txt').read_text()[-3000:]}")
        clock = [json.loads(line)["seconds"] for line in (scratch / "steps.jsonl").read_text().splitlines()]
    seconds = [after - before for before, after in zip(clock, clock[1:], strict=False)]
    return seconds[1:], usage.ru_maxrss * 1024 / 1e9


def table(seconds: dict[str, list[float]], memory: dict[str, list[float]]) -> list[str]:
    median = {row: statistics.median(values) for row, values in seconds.items()}
    peak = {row: statistics.median(values) for row, values in memory.items()}
    full, lora = list(ROWS)[:2]
    lines = [
        "| run | median step, s | spread (quartiles) | peak memory, GB | step / full | memory / full "
        "| step / LoRA | memory / LoRA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        low, _, high = statistics.quantiles(seconds[row], n=4)
        lines.append(
            f"| {row} | {median[row]:.2f} | {low:.2f} to {high:.2f} | {peak[row]:.2f} "
            f"| {median[row] / median[full]:.2f} | {peak[row] / peak[full]:.2f} "
            f"| {median[row] / median[lora]:.2f} | {peak[row] / peak[lora]:.2f} |"
        )
    return lines


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=24)
    args = arguments.parse_args()
    model_dir = fetch()
    seconds: dict[str, list[float]] = {row: [] for row in ROWS}
    memory: dict[str, list[float]] = {row: [] for row in ROWS}
    for number in range(args.rounds):
        for row in ROWS:
            row_seconds, row_memory = run_row(row, model_dir, args.steps)
            seconds[row] += row_seconds
            memory[row].append(row_memory)
            print(f"round {number + 1}: {row}: {statistics.median(row_seconds):.2f} s, {row_memory:.2f} GB", flush=True)
    lines = [
        "# Step time and memory against torchtune's recipes",
        "",
        f"SmolLM2-135M, MMLU dev packed 2 × 512 tokens, float32 on the CPU, rank 128, a draw every 5 steps; "
        f"{args.rounds} interleaved rounds of {args.steps} steps; {machine()}. Each recipe runs as it ships; on the "
        "CPU OwLore's has glibc keep freed memory (owlore_tune/memory.py). Made by `python benchmarks/steps.py`.",
        "",
        *table(seconds, memory),
    ]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
