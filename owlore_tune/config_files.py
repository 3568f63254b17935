"""Load configs by name with their bases, and apply overrides."""

import argparse
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune.config._utils import _merge_yaml_and_cli_args

from owlore_tune.catalog import find_config
from owlore_tune.checks import check_type
from owlore_tune.config import plain
from owlore_tune.errors import ConfigError
from owlore_tune.paths import user_path


def load_config(name: str, overrides: Iterable[str] = ()) -> DictConfig:
    """Load a packaged config by name, or a file, and apply ``field=value`` overrides.

    The field ``base`` names a config with the fields that the file does not have; see `merge`. It is a packaged name,
    or a file relative to this one.

    Raises:
        ConfigError: if a file is not a YAML mapping, a base does not exist or leads back to its file, or an override is
            malformed or cannot be applied.
    """
    merged = reduce(merge, (plain(fields) for _, fields in reversed(with_bases(name))))
    merged.pop("base", None)
    return override(OmegaConf.create(merged), overrides)


def with_bases(name: str) -> list[tuple[Path, DictConfig]]:
    """The file of a config with its fields, that of its base, and so on.

    Raises:
        ConfigError: if a file is not a YAML mapping, or a base does not exist or leads back to its file.
    """
    file = find_config(name)
    found = [(file, _read(file))]
    while (base := found[-1][1].get("base")) is not None:
        here = found[-1][0]
        check_type(f"{here}: base", base, str)
        beside = here.parent / user_path(base)
        try:
            file = beside if beside.is_file() else find_config(base)
        except ConfigError as error:
            raise ConfigError(f"{here}: base={base}; {error}") from None
        if any(file.samefile(known) for known, _ in found):
            raise ConfigError(f"{here}: base={base} leads back to {file}; remove one of these bases")
        found.append((file, _read(file)))
    return found


def merge(base: Any, changes: Any) -> Any:
    """``base`` with ``changes``. Blocks are merged, but one with another ``_component_`` replaces that of ``base``."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    if changes.get("_component_", base.get("_component_")) != base.get("_component_"):
        return changes
    return base | {key: merge(base[key], value) if key in base else value for key, value in changes.items()}


def _read(file: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(file)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(loaded, DictConfig) or not loaded:
        raise ConfigError(f"{file} is {'not a mapping of fields' if loaded else 'empty'}")
    if bad := [key for key in loaded if not isinstance(key, str)]:
        raise ConfigError(f"{file}: the key {bad[0]!r} is not text")
    return loaded


def override(cfg: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """``cfg`` with ``field=value`` overrides, or ``~field`` to remove one, as torchtune's recipes take them.

    Raises:
        ConfigError: if an override is malformed or cannot be applied.
    """
    overrides = list(overrides)
    for text in overrides:
        if not text.startswith("~") and (text.count("=") != 1 or text.endswith("=???")):
            raise ConfigError(f"override {text!r} is not of the form field=value")
    try:
        return _merge_yaml_and_cli_args(argparse.Namespace(**plain(cfg)), overrides)
    except (ValueError, TypeError, AttributeError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"overrides {' '.join(overrides)}: {error}") from error
