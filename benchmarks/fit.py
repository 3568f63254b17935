"""The fastest settings of each packaged OwLore config that fit cards of several sizes, as `owlore memory --fit`.

    python benchmarks/fit.py [--configs NAME ...]

Prints the table of docs/memory.md. Nothing trains; each cell is planned.
"""

import argparse

from owlore_tune.config.load import load_config, packaged_configs
from owlore_tune.errors import ConfigError
from owlore_tune.training.plan import SEQ_LEN, Setting, fastest_that_fits

CARDS = (8, 12, 16, 24, 48, 80)  # GB


def cell(setting: Setting) -> str:
    """Rows of a micro-batch, the format, and whether layers are checkpointed."""
    weights = {"full": "bf16", "nf4": "NF4"}.get(setting.format, setting.format)
    return f"{setting.batch_size} · {weights}{' · ckpt' if setting.checkpointing else ''}"


def row(name: str) -> str:
    """A line of the table."""
    cfg = load_config(name, ["device=cpu", "dtype=bf16", "fsdp=false"])
    try:
        found = fastest_that_fits(cfg, SEQ_LEN, [1e9 * card for card in CARDS])
    except ConfigError:
        found = {}
    cells = {card: cell(setting) for card, (setting, _) in found.items()}
    fits = " | ".join(cells.get(1e9 * card, "–") for card in CARDS)
    return f"| `{name}` | {cfg.batch_size * cfg.gradient_accumulation_steps} | {fits} |"


def main() -> None:
    names = [name for name, _ in packaged_configs() if name.endswith("_owlore")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=names, default=names, metavar="NAME")
    args = parser.parse_args()
    print(f"| config | rows per step | {' | '.join(f'{card} GB' for card in CARDS)} |")
    print("|---|---|" + "---|" * len(CARDS))
    for name in args.configs:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
