"""Planned memory: of OwLore and other methods for LLaMA-2-7B, and of all packaged configs.

    python benchmarks/plans.py [--output benchmarks/memory_7b.md] [--picture docs/pictures/memory_7b.png]
    python benchmarks/plans.py --packaged

No weights are needed: the plans run the model's forward and backward on tensors without data. --packaged prints the
table of packaged configs in docs/memory.md.
"""

from dataclasses import asdict
from pathlib import Path

from lib.report import command, parser, publish

from owlore_tune.config.load import load_config, packaged_configs
from owlore_tune.memory.plan import MemoryPlan
from owlore_tune.training.config import TrainingSettings
from owlore_tune.training.plan import FREE_SHARE, plan_run, plans_of_config
from owlore_tune.training.plots import plot_memory

RUN = [
    "device=cpu", "batch_size=1", "gradient_accumulation_steps=1", "enable_activation_checkpointing=true",
    "dataset.packed=true", "owlore.rank=128",
]  # fmt: skip
NF4 = "owlore.weights=nf4"
OWN = {
    "OwLore, γ=5, bf16": [],
    "OwLore, γ=5, int8": ["owlore.weights=int8", "owlore.products=int8"],
    "OwLore, γ=5, NF4": [NF4],
    "OwLore, γ=2, NF4": [NF4, "owlore.num_active_layers=2"],
    "OwLore, all layers, NF4, 8-bit moments": [
        NF4, "owlore.num_active_layers=null", "owlore.score=uniform", "optimizer=torchao.optim.AdamW8bit",
        "~optimizer.fused",
    ],
}  # fmt: skip
CARDS = (6, 8, 12, 16, 24, 48, 80)  # GB of common GPUs
# Numbers of GPUs to plan packaged configs for, other than one
GPUS = {
    "llama2/13B_owlore": (1, 4), "llama2/7B_owlore": (1, 2), "llama3_1/70B_owlore": (8,), "llama3_1/8B_owlore": (1, 2),
    "mistral/7B_owlore": (1, 2), "smollm2/135M_owlore": (1, 2),
}  # fmt: skip
SEQ_LEN = 512


def plans() -> dict[str, MemoryPlan]:
    """Plans of LLaMA-2-7B by method."""
    configs = {name: load_config("llama2/7B_owlore", [*RUN, *some]) for name, some in OWN.items()}
    settings = {name: TrainingSettings.from_config(cfg).for_gpu() for name, cfg in configs.items()}
    peers = plans_of_config(settings["OwLore, γ=5, bf16"], SEQ_LEN)
    del peers["this config"]
    return peers | {name: plan_run(some, SEQ_LEN) for name, some in settings.items()}


def report(found: dict[str, MemoryPlan]) -> list[str]:
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
    return lines


def print_packaged(names: list[str]) -> None:
    """Print a line for each packaged config and number of GPUs, as soon as it is planned."""
    print("| config | GPUs | rows × tokens | GB per GPU |\n|---|---|---|---|")
    for name, num_gpus in [(each, number) for each in names for number in GPUS.get(each, (1,))]:
        settings = TrainingSettings.from_config(load_config(name, ["device=cpu"])).for_gpu()
        seq_len, rows = settings.cfg.tokenizer.max_seq_len, settings.cfg.batch_size
        plan = plan_run(settings, seq_len, settings.sharding(num_gpus) if num_gpus > 1 else None)
        print(f"| `{name}` | {num_gpus} | {rows} × {seq_len} | {plan.total / 1e9:.1f} |", flush=True)


def main() -> None:
    others = ("eval/", "hf/any", "smollm2/135M_lora", "smollm2/135M_generate")  # need files, or other recipes
    names = [name for name, _ in packaged_configs() if not name.startswith(others)]
    arguments = parser(__doc__)
    arguments.add_argument("--picture", type=Path, help="also draw the plans to this PNG file")
    arguments.add_argument("--packaged", action="store_true", help="print the table of docs/memory.md instead")
    args = arguments.parse_args()
    if args.packaged:
        print_packaged(names)
        return
    found = plans()
    publish(report(found), args.output)
    if args.picture:
        plot_memory(args.picture, {name.replace(", ", "\n"): asdict(plan) for name, plan in found.items()})


if __name__ == "__main__":
    main()
