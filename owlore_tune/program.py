"""Run a recipe as a program: its command line, one-line errors, and signals."""

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torchtune.config._errors import InstantiationError
from torchtune.utils import get_logger
from tqdm.contrib.logging import logging_redirect_tqdm

from owlore_tune.config import load_config
from owlore_tune.errors import CheckpointError, ConfigError, RunError
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
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # of torchdata's loader
        # Print log lines above progress bars, not in the middle of them.
        with obey_signals(), errors_in_one_line(), logging_redirect_tqdm([get_logger()]):
            recipe_main(load_config(args.config, [*args.overrides, *rest]))

    return main


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Exit with ``error: ...`` on a problem with the config, its files or the run that the user can solve."""
    try:
        yield
    except (
        ConfigError, RunError, CheckpointError, InstantiationError, OmegaConfBaseException, OSError,
        torch.OutOfMemoryError,
    ) as error:  # fmt: skip
        sys.exit(f"error: {' '.join(str(error).split())}")
