"""Evaluation on several ranks. Rank 0 drives the harness and distributes the model's work to all ranks."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# The other ranks wait while rank 0 loads datasets or waits for a judge.
_PATIENCE = timedelta(days=7)


class Ranks:
    """The process group as one worker. A single process needs no process group.

    Only rank 0 talks to the harness, so results do not depend on the number of ranks: few-shot examples are drawn once,
    and there is one cache and one set of files.
    """

    def __init__(self) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if initialized else 0
        self.world_size = dist.get_world_size() if initialized else 1
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.world_size > 1 else None

    def share(self, method: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Compute ``[method(item) for item in items]``, split over the ranks. Rank 0 gets the ordered results."""
        mine = [method(item) for item in items[self.rank :: self.world_size]]
        if self._group is None:
            return mine
        gathered: list[Any] = [None] * self.world_size
        dist.gather_object(mine, gathered if self.rank == 0 else None, group=self._group)
        if self.rank != 0:
            return []
        return [gathered[number % self.world_size][number // self.world_size] for number in range(len(items))]

    def from_driver(self, work: Any) -> Any:
        """Broadcast ``work`` from rank 0."""
        if self._group is None:
            return work
        box = [work]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def smallest(self, number: int | None) -> int | None:
        """The smallest ``number`` of all ranks, or None if they have none."""
        if self._group is None or number is None:
            return number
        least = torch.tensor(number)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self._group)
        return int(least)
