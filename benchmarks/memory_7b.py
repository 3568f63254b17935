"""Planned memory of OwLore and other methods for LLaMA-2-7B on one GPU: a table and a picture.

    python benchmarks/memory_7b.py [--output benchmarks/memory_7b.md] [--picture docs/pictures/memory_7b.png]

No weights are needed: the plans run the model's forward and backward on tensors without data. OwLore's plans are
measured by llama2_7b.py, on a CPU.
"""

from dataclasses import asdict
from pathlib import Path

from lib.report import command, parser, publish

from owlore_tune.config.load import load_config
from owlore_tune.memory.plan import MemoryPlan
from owlore_tune.training.config import TrainingSettings
from owlore_tune.training.plan import FREE_SHARE, SEQ_LEN, plan_run, plans_of_config
from owlore_tune.training.plots import plot_memory

CONFIG = "llama2/7B_owlore"
INT8 = ("owlore.weights=int8", "owlore.products=int8")
NF4 = ("owlore.weights=nf4",)
RUN = [
    "device=cpu", "batch_size=1", "gradient_accumulation_steps=1", "enable_activation_checkpointing=true",
    "dataset.packed=true", "owlore.rank=128",
]  # fmt: skip
OWN = {
    "OwLore, γ=5, bf16": (),
    "OwLore, γ=5, int8": INT8,
    "OwLore, γ=5, NF4": NF4,
    "OwLore, γ=2, NF4": (*NF4, "owlore.num_active_layers=2"),
    "OwLore, all layers, NF4, 8-bit moments": (
        *NF4, "owlore.num_active_layers=null", "owlore.score=uniform", "optimizer=torchao.optim.AdamW8bit",
        "~optimizer.fused",
    ),
}  # fmt: skip
CARDS = (6, 8, 12, 16, 24, 48, 80)  # GB of common GPUs


def plans() -> dict[str, MemoryPlan]:
    configs = {name: load_config(CONFIG, [*RUN, *some]) for name, some in OWN.items()}
    settings = {name: TrainingSettings.from_config(cfg).for_gpu() for name, cfg in configs.items()}
    peers = plans_of_config(settings["OwLore, γ=5, bf16"], SEQ_LEN)
    del peers["this config"]
    return peers | {name: plan_run(some, SEQ_LEN) for name, some in settings.items()}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--picture", type=Path, help="also draw the plans to this PNG file")
    args = arguments.parse_args()
    found = plans()
    lines = [
        "# Memory of LLaMA-2-7B on one GPU, planned",
        "",
        f"bfloat16, 1 × {SEQ_LEN} tokens, activation checkpointing; embeddings and head frozen, except for full "
        "fine-tuning. Plans count torch's allocations. A card fits if the plan is at most "
        f"{FREE_SHARE:.0%} of its memory. Command: {command()}.",
        "",
        "| method | weights, GB | A, bases and moments, GB | total, GB | smallest card, GB |",
        "|---|---|---|---|---|",
    ]
    for name, plan in found.items():
        card = next((size for size in CARDS if plan.total / 1e9 <= FREE_SHARE * size), None)
        state = (plan.projected + plan.moments + plan.bases) / 1e9
        lines.append(f"| {name} | {plan.weights / 1e9:.2f} | {state:.2f} | {plan.total / 1e9:.2f} | {card or '-'} |")
    publish(lines, args.output)
    if args.picture:
        plot_memory(args.picture, {name.replace(", ", "\n"): asdict(plan) for name, plan in found.items()})


if __name__ == "__main__":
    main()
