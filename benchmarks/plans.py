"""Planned memory: of OwLore and other methods for LLaMA-2-7B, and of all packaged configs on cards of several sizes.

    python benchmarks/plans.py [--output benchmarks/memory_7b.md] [--picture docs/pictures/memory_7b.png]
    python benchmarks/plans.py --fit [--configs NAME ...]

No weights are needed: the plans run the model's forward and backward on tensors without data. --fit prints the table of
docs/memory.md: the fastest settings of each config that fit each card, as `owlore memory --fit` finds them.
"""

from dataclasses import asdict
from pathlib import Path

from lib.report import command, parser, publish

from owlore_tune.config.load import load_config, packaged_configs
from owlore_tune.errors import ConfigError
from owlore_tune.memory.plan import MemoryPlan
from owlore_tune.training.config import TrainingSettings
from owlore_tune.training.plan import FREE_SHARE, SEQ_LEN, Setting, fastest_that_fits, plan_run, plans_of_config
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
CARDS_OF_CONFIGS = CARDS[1:]


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


def print_settings_that_fit(names: list[str]) -> None:
    """Print a line for each config as soon as it is planned."""
    print(f"| config | rows per step | {' | '.join(f'{card} GB' for card in CARDS_OF_CONFIGS)} |")
    print("|---|---|" + "---|" * len(CARDS_OF_CONFIGS))
    for name in names:
        cfg = load_config(name, ["device=cpu", "dtype=bf16", "fsdp=false"])
        try:
            found = fastest_that_fits(cfg, SEQ_LEN, [1e9 * card for card in CARDS_OF_CONFIGS])
        except ConfigError:
            found = {}
        cells = [cell(found[1e9 * card][0]) if 1e9 * card in found else "–" for card in CARDS_OF_CONFIGS]
        print(f"| `{name}` | {cfg.batch_size * cfg.gradient_accumulation_steps} | {' | '.join(cells)} |", flush=True)


def cell(setting: Setting) -> str:
    """Rows of a micro-batch, the format, and whether layers are checkpointed."""
    weights = {"full": "bf16", "nf4": "NF4"}.get(setting.format, setting.format)
    return f"{setting.batch_size} · {weights}{' · ckpt' if setting.checkpointing else ''}"


def main() -> None:
    names = [name for name, _ in packaged_configs() if name.endswith("_owlore")]
    arguments = parser(__doc__)
    arguments.add_argument("--picture", type=Path, help="also draw the plans to this PNG file")
    arguments.add_argument("--fit", action="store_true", help="print the settings that fit cards, for all configs")
    arguments.add_argument("--configs", nargs="+", choices=names, default=names, metavar="NAME", help="with --fit")
    args = arguments.parse_args()
    if args.fit:
        print_settings_that_fit(args.configs)
        return
    found = plans()
    publish(report(found), args.output)
    if args.picture:
        plot_memory(args.picture, {name.replace(", ", "\n"): asdict(plan) for name, plan in found.items()})


if __name__ == "__main__":
    main()
