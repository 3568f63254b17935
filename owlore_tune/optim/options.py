"""Check how weights are to be projected."""

import math
import warnings
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from owlore_tune.optim.projection import BASES, SIDES


def check_options(rank: Any, side: str, scale: Any, basis: str) -> None:
    for name, value, choices in (("side", side, SIDES), ("basis", basis, BASES)):
        if value not in choices:
            raise ValueError(f"{name}={value!r}; choose one of {', '.join(choices)}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank={rank}; it must be an integer >= 1, or null for full rank")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 <= scale < math.inf:
        raise ValueError(f"scale={scale!r}; it must be a finite number >= 0")


def check_rank(rank: int, layers: list[dict[str, nn.Parameter]], projected: Collection[Tensor]) -> None:
    """Refuse a rank that projects nothing, and warn of one that projects only some matrices."""
    matrices = [parameter for layer in layers for parameter in layer.values() if parameter.ndim == 2]
    others = [parameter for parameter in matrices if parameter not in projected]
    if not others:
        return
    sides = sorted({min(parameter.shape) for parameter in others})
    if not projected:
        raise ValueError(
            f"rank={rank}; no weight's shorter side is above it (shorter sides: {sides}); lower it, or set rank=null"
        )
    warnings.warn(
        f"rank={rank} is not below the shorter side ({', '.join(map(str, sides))}) of {len(others)} of "
        f"{len(matrices)} weights; these are trained at full rank",
        stacklevel=3,
    )
