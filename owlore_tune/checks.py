"""Checks of single values of a config."""

from typing import Any, get_args

from omegaconf import DictConfig

from owlore_tune.errors import ConfigError


def check_block(path: str, node: Any) -> None:
    """Raise ConfigError if ``node`` is not a component with its fields."""
    if not isinstance(node, DictConfig) or "_component_" not in node:
        raise ConfigError(f"{path}={node}; it must be a block of fields with _component_")


def check_type(path: str, value: Any, wanted: Any) -> None:
    """Raise ConfigError if ``value`` is not of type ``wanted``. A bool is not a number."""
    kinds = get_args(wanted) or (wanted,)
    allowed = wanted | int if float in kinds else wanted
    takes_bool = bool in kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and not takes_bool):
        name = getattr(wanted, "__name__", str(wanted)).replace("None", "null").replace("float", "a number")
        raise ConfigError(f"{path}={value!r}; it must be {name}")
