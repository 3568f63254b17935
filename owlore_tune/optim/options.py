"""Check the options of `owlore_tune.optim.adamw.OwLoreAdamW`."""

import math
import warnings
from typing import Any

from torch import Tensor

from owlore_tune.optim.projection import BASES, SIDES

MOMENTS = ("keep", "project", "reset")
STATE_BITS = (32, 8)
BASIS_BITS = (32, 16, 8)


def is_projected(parameter: Tensor, rank: int | None) -> bool:
    """Whether a projection to ``rank`` shrinks the gradient of ``parameter``."""
    return rank is not None and parameter.ndim == 2 and rank < min(parameter.shape)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_group(group: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if a value is out of range, or ``rank`` is too large for every weight of the group.
    """
    choices_of = {
        "side": SIDES, "moments": MOMENTS, "basis": BASES, "state_bits": STATE_BITS, "basis_bits": BASIS_BITS
    }  # fmt: skip
    for key, choices in choices_of.items():
        if group[key] not in choices or isinstance(group[key], float | bool):
            raise ValueError(f"{key}={group[key]!r}; choose one of {', '.join(map(str, choices))}")
    for key in ("lr", "eps", "weight_decay", "scale"):
        if not _is_number(group[key]) or not 0 <= group[key] < math.inf:
            raise ValueError(f"{key}={group[key]!r}; it must be a finite number >= 0")
    if len(group["betas"]) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']}; it must have two values, each >= 0 and < 1")
    if not _is_count(group["update_gap"]):
        raise ValueError(f"update_gap={group['update_gap']}; it must be an integer >= 1 (optimizer steps)")
    if not isinstance(group["stochastic_rounding"], bool):
        raise ValueError(f"stochastic_rounding={group['stochastic_rounding']!r}; it must be true or false")
    rank = group["rank"]
    if rank is None:
        return
    if not _is_count(rank):
        raise ValueError(f"rank={rank}; it must be an integer >= 1, or null for full rank")
    matrices = [parameter for parameter in group["params"] if parameter.ndim == 2]
    unprojected = [tuple(p.shape) for p in matrices if not is_projected(p, rank)]
    if not unprojected:
        return
    sides = sorted({min(shape) for shape in unprojected})
    if len(unprojected) == len(matrices):
        raise ValueError(
            f"rank={rank}; no weight's shorter side is above it (shorter sides: {sides}); lower it, or set rank=null"
        )
    warnings.warn(
        f"rank={rank} is not below the shorter side ({', '.join(map(str, sides))}) of {len(unprojected)} of "
        f"{len(matrices)} weights; these are trained at full rank",
        stacklevel=4,
    )
