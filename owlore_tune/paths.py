"""Paths that a user writes. Imports nothing heavy."""

import os
from pathlib import Path

from owlore_tune.errors import ConfigError


def way_out(directory: Path) -> str:
    """What to do about a model directory that lacks a file: choose a checkpoint if it is that of a run."""
    steps = [path for path in directory.glob("step_*") if path.name[5:].isdigit()]
    if steps:
        return f"name a checkpoint in it, such as {max(steps, key=lambda path: int(path.name[5:]))}"
    return "download the model first (see the top of the config)"


def user_path(text: str | Path) -> Path:
    """The path that ``text`` names, with ``~`` replaced by the home directory.

    Raises:
        ConfigError: if it has a character that no path can have, or names the home of a user who does not exist.
    """
    if "\0" in str(text):
        raise ConfigError(f"{str(text)!r} has a NUL character, which no path or name can have")
    path = os.path.expanduser(str(text))
    if path.startswith("~") and "/" in path:
        name = path[1:].split("/")[0]
        raise ConfigError(f"{path}: there is no user {name}; a file name that begins with ~ is written ./~{name}")
    return Path(path)
