"""A `LayerStore` that uses the disk while the device trains."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from owlore_tune.quantized.store import LayerStore


class _Pending(NamedTuple):
    """New weights of a layer, in host memory until they are on disk."""

    weights: dict[str, Tensor]
    copied: torch.cuda.Event | None  # when the device has copied them; None without a GPU

    def wait(self) -> dict[str, Tensor]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.weights


class BackgroundStore(LayerStore):
    """Reads layers ahead, and writes them in the background, for a GPU that would wait for the disk.

    Layers on their way are in host memory, which a run on a CPU does not have. It is pinned, so that the device copies
    while the host goes on. A write that fails is tried again when another layer or a checkpoint is written; that call
    raises the error. A process that ends during a write loses nothing that a checkpoint has, because a checkpoint waits
    for all writes.

    With several processes, the first one writes. Each of them has the weights in memory until it knows that they are
    written.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._threads = ThreadPoolExecutor(2, "owlore")
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}
        self._pending: dict[int, _Pending] = {}
        self._writes: dict[int, tuple[Path, Future[None]]] = {}  # of pending layers, on the process that writes

    def read_ahead(self, indices: Iterable[int]) -> None:
        self.finish(self._done(failed=False))
        wanted = set(indices) - self._pending.keys()
        self._ahead = {index: read for index, read in self._ahead.items() if index in wanted}
        for index in wanted - self._ahead.keys():
            self._ahead[index] = self._threads.submit(self._read_now, index)

    def _read_now(self, index: int) -> dict[str, Tensor]:
        return {name: _pinned(tensor) for name, tensor in super().tensors(index)}

    def tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        if (pending := self._pending.get(index)) is not None:
            return ((name, weight.clone()) for name, weight in pending.wait().items())
        ahead = self._ahead.pop(index, None)
        return super().tensors(index) if ahead is None else iter(ahead.result().items())

    def write(self, index: int, weights: dict[str, Tensor]) -> Path:
        self.finish([index, *self._done(failed=True)])
        file = self._new_file(index)
        self._hold(index, weights)
        self._writes[index] = file, self._threads.submit(self._write_pending, file, self._pending[index])
        return file

    def follow(self, index: int, weights: dict[str, Tensor], unwritten: set[int]) -> None:
        self._pending = {other: pending for other, pending in self._pending.items() if other in unwritten}
        self._hold(index, weights)

    def _hold(self, index: int, weights: dict[str, Tensor]) -> None:
        held = {name: _held(weight.detach()) for name, weight in weights.items()}
        self._pending[index] = _Pending(held, _event())

    def _write_pending(self, file: Path, pending: _Pending) -> None:
        self._write(file, pending.wait())

    def nbytes(self, indices: Sequence[int]) -> int:
        pending = [self._pending[index].weights for index in indices if index in self._pending]
        written = super().nbytes([index for index in indices if index not in self._pending])
        return written + sum(weight.nbytes for weights in pending for weight in weights.values())

    def use(self, index: int, file: Path) -> None:
        self._ahead.pop(index, None)
        super().use(index, file)

    def unwritten(self) -> set[int]:
        return set(self._writes)

    def _done(self, *, failed: bool) -> list[int]:
        done = {index: written for index, (_, written) in self._writes.items() if written.done()}
        return [index for index, written in done.items() if (written.exception() is not None) == failed]

    def finish(self, indices: Iterable[int] | None = None) -> None:
        for index in set(self._writes if indices is None else indices) & self._writes.keys():
            file, written = self._writes[index]
            if written.exception() is not None:
                self._write_pending(file, self._pending[index])
            del self._writes[index], self._pending[index]


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _held(weight: Tensor) -> Tensor:
    """A copy in host memory, complete after `_event`."""
    return torch.empty_like(weight, device="cpu", pin_memory=torch.cuda.is_available()).copy_(weight, non_blocking=True)


def _event() -> torch.cuda.Event | None:
    """The end of all copies so far; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event()
    event.record()
    return event
