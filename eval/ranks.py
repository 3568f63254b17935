"""One evaluation on several ranks: rank 0 drives the harness and deals out the model's work, the others lend a hand."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Between two pieces of work rank 0 may load datasets, or wait for a judge.
_PATIENCE = timedelta(days=7)


class Ranks:
    """The process group's ranks as one worker; a single process without a group is a group of one.

    Since rank 0 alone talks to the harness, results do not depend on the number of ranks: few-shot examples are drawn
    once, and there is one cache and one set of files.
    """

    def __init__(self) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if initialized else 0
        self.world_size = dist.get_world_size() if initialized else 1
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.world_size > 1 else None

    def share(self, method: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """``[method(item) for item in items]``, every rank doing its share of it; on rank 0, in order.

        All ranks make equally many calls, as sharded weights need: who has one item less does the last one again.
        """
        mine = [method(item) for item in items[self.rank :: self.world_size]]
        if self._group is None:
            return mine
        if len(items) % self.world_size and self.rank >= len(items) % self.world_size:
            method(items[-1])
        gathered: list[Any] = [None] * self.world_size
        dist.gather_object(mine, gathered if self.rank == 0 else None, group=self._group)
        if self.rank != 0:
            return []
        return [gathered[number % self.world_size][number // self.world_size] for number in range(len(items))]

    def from_driver(self, work: Any) -> Any:
        """What rank 0 passed, on all ranks."""
        if self._group is None:
            return work
        box = [work]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on some rank."""
        if self._group is None:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        return bool(flags)
