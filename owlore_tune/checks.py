"""Checks of single values of a config."""

from collections.abc import Iterable
from typing import Any, get_args

from omegaconf import DictConfig

from owlore_tune.errors import ConfigError

LARGEST_COUNT = 10**9


def check_counts(cfg: DictConfig, required: Iterable[str], optional: Iterable[str]) -> None:
    """Raise ConfigError for a field that is not a whole number from 1 (or null, if ``optional``)."""
    for keys, wanted in ((required, int), (optional, int | None)):
        for key in keys:
            check_type(key, cfg[key], wanted)
            if cfg[key] is not None and not 1 <= cfg[key] <= LARGEST_COUNT:
                raise ConfigError(
                    f"{key}={cfg[key]}; it must be 1 to {LARGEST_COUNT:,}{'' if wanted is int else ', or null'}"
                )


def check_block(path: str, node: Any) -> None:
    """Raise ConfigError if ``node`` is not a component with its fields."""
    if not isinstance(node, DictConfig) or "_component_" not in node:
        raise ConfigError(f"{path}={node}; it must be a block of fields with _component_")


def check_positive(path: str, value: Any) -> float:
    """``value`` as a number above 0; infinity for null.

    Raises:
        ConfigError: if it is neither.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    number = float("inf") if value is None else float(value) if is_number else 0.0
    if not number > 0:
        raise ConfigError(f"{path}={value}; it must be a number above 0, or null")
    return number


def check_type(path: str, value: Any, wanted: Any) -> None:
    """Raise ConfigError if ``value`` is not of type ``wanted``. A bool is not a number."""
    allowed = wanted | int if wanted is float else wanted
    takes_bool = bool in (get_args(wanted) or (wanted,))
    if not isinstance(value, allowed) or (isinstance(value, bool) and not takes_bool):
        name = getattr(wanted, "__name__", str(wanted)).replace("None", "null")
        raise ConfigError(f"{path}={value!r}; it must be {name}")
