"""Run a recipe as a program: its command line and signals."""

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune.utils import get_logger
from tqdm.contrib.logging import logging_redirect_tqdm

from owlore_tune.config_files import load_config
from owlore_tune.errors import errors_in_one_line
from owlore_tune.run.signals import obey_signals


def parse(recipe_main: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """torchtune's ``config.parse``, which here also takes packaged config names and prints errors in one line."""

    @functools.wraps(recipe_main)
    def main() -> None:
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
