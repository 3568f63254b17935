"""Bases of several weights at once: the host waits once for the eigenvalue decompositions of a batch."""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import Variable

from owlore_tune.optim.projection import Sketch, truncate

_BATCH = 2**28  # bytes of the sketches of a batch


class BasisMaker:
    """Makes the bases that backward passes ask for.

    A batch ends with its pass, or earlier: when its sketches take ``_BATCH`` bytes, or when another pass begins inside
    the pass, as that of a reentrant checkpoint does.
    """

    def __init__(self) -> None:
        # By the number of a pass. If a pass ends with an error, autograd frees its callback, and so its sketches.
        self._passes: WeakValueDictionary[int, _Pass] = WeakValueDictionary()

    def __reduce__(self) -> tuple[Any, ...]:  # a copy has no part of a pass
        return BasisMaker, ()

    def defer(self, weight: Any, make: Callable[[], Sketch], more: Callable[[Tensor], Tensor]) -> bool:
        """Make the basis of ``weight``, and the gradient of A with it, later in the current backward pass.

        Returns False if the weight has just got a basis from another use of its Linear. The caller then computes the
        gradient of this use.

        Args:
            weight: a `ProjectedWeight`.
            make: makes the sketch.
            more: (n, w) → (m, w), the gradient of this use times columns.
        """
        current = torch._C._current_graph_task_id()
        own = self._passes.get(current)
        if own is None:
            for outer in list(self._passes.values()):
                outer.finish()
            own = self._passes[current] = _Pass()
            Variable._execution_engine.queue_callback(own.finish)  # type: ignore[attr-defined]
        if weight.basis is not None:
            return False
        own.add(weight, make, more)
        return True


class _Pass:
    """A backward pass, with the sketches of its current batch."""

    def __init__(self) -> None:
        self._sketches: dict[Any, Sketch] = {}

    def add(self, weight: Any, make: Callable[[], Sketch], more: Callable[[Tensor], Tensor]) -> None:
        try:
            with weight.clock("basis"):
                if (known := self._sketches.get(weight)) is not None:
                    known.low += more(known.columns)
                else:
                    self._sketches[weight] = make()
        except BaseException:
            self._sketches.clear()  # the traceback keeps this object
            raise
        if sum(sketch.nbytes for sketch in self._sketches.values()) >= _BATCH:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Make the bases of the batch."""
        groups: dict[Any, list[Any]] = {}
        for weight in self._sketches:
            groups.setdefault((self._sketches[weight].kind, weight.rank), []).append(weight)
        try:
            for weights in groups.values():
                first = weights[0]
                with first.clock("basis"):  # its time is that of the group
                    sketches = [self._sketches.pop(weight) for weight in weights]
                    for weight, basis in zip(weights, truncate(sketches, first.rank, first.world), strict=True):
                        weight.take_basis(basis)
        finally:
            self._sketches.clear()
