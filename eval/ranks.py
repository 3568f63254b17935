"""Evaluation on several ranks. Rank 0 drives the harness and distributes the model's work to all ranks.

Only rank 0 talks to the harness, so results do not depend on the number of ranks: few-shot examples are drawn once, and
there is one cache and one set of files.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from owlore_tune.distributed.launch import current_world
from owlore_tune.distributed.world import ALONE, World

# The other ranks wait while rank 0 loads datasets or waits for a judge.
_PATIENCE = timedelta(days=7)


def patient_world() -> World:
    """All processes, over gloo. They wait for each other for days."""
    return ALONE if current_world().size == 1 else World(dist.new_group(backend="gloo", timeout=_PATIENCE))


def share(world: World, method: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Compute ``[method(item) for item in items]``, split over the ranks."""
    gathered = world.gather([method(item) for item in items[world.rank :: world.size]])
    return [gathered[number % world.size][number // world.size] for number in range(len(items))]
