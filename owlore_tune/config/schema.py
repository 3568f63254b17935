"""Fields of a config: their defaults, types and ranges in one place."""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf

from owlore_tune.errors import ConfigError


def plain(cfg: Any) -> Any:
    """``cfg`` as dicts, lists, text and numbers. Interpolations stay unresolved, because values may be secret."""
    return OmegaConf.to_container(cfg, resolve=False)


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


LARGEST_COUNT = 10**9


@dataclass(frozen=True)
class Range:
    """Numbers from ``least``, or above it, to ``most``."""

    least: float
    most: float = math.inf
    without_least: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.least or value == self.least and not self.without_least) and value <= self.most

    def __str__(self) -> str:
        if self.without_least:
            return f"above {self.least}" + (f", and at most {self.most:,}" if self.most < math.inf else "")
        return f"{self.least:,} to {self.most:,}"


COUNT = Range(1, LARGEST_COUNT)
POSITIVE = Range(0, without_least=True)


def config_field(
    default: Any = MISSING, within: Range | None = None, *, choices: Iterable[str] | None = None, free: bool = False
) -> Any:
    """A field of a config.

    Args:
        within: the range of its value, unless that is None.
        choices: its values.
        free: a resumed run may have another value, because the field affects how a run executes, not what it computes.
    """
    metadata = {"within": within, "choices": choices, "free": free}
    if default is MISSING:
        return field(metadata=metadata)
    return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)


def required(kind: Any) -> list[str]:
    """The fields without a default."""
    return [each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]


def defaults(kind: Any) -> dict[str, Any]:
    """The other fields, with their default values."""
    return {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(kind)
        if each.name not in required(kind)
    }


def check_fields(kind: Any, values: Mapping[str, Any], block: str = "") -> None:
    """Raise ConfigError for a value with the wrong type or out of its range, of fields in ``block``."""
    for each in fields(kind):
        name, value = f"{block}{each.name}", values[each.name]
        within, choices = each.metadata.get("within"), each.metadata.get("choices")
        if each.type is not Any:
            check_type(name, value, each.type)
        if within is not None and value is not None and value not in within:
            null = ", or null" if isinstance(None, each.type) else ""  # type: ignore[arg-type]
            raise ConfigError(f"{name}={value}; it must be {within}{null}")
        if choices is not None and value not in choices:
            raise ConfigError(f"{name}={value}; choose one of {', '.join(choices)}")
