"""A `LayerStore` that uses the disk while the device trains."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from owlore_tune.quantized.store import LayerStore


class _Write(NamedTuple):
    """New weights of a layer, held until they are in ``file``."""

    file: Path
    weights: dict[str, Tensor]
    written: Future[None]


class BackgroundStore(LayerStore):
    """Reads layers ahead, and writes them in the background, for a GPU that would wait for the disk.

    Layers on their way are in host memory, which a run on a CPU does not have. It is pinned, so that the device copies
    while the host goes on. A write that fails is tried again when
    its layer is next read, or a checkpoint or another layer is written; that call raises the error. A process that ends
    during a write loses nothing that a checkpoint has, because a checkpoint waits for all writes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._threads = ThreadPoolExecutor(2, "owlore")
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}
        self._writes: dict[int, _Write] = {}

    def read_ahead(self, indices: Iterable[int]) -> None:
        wanted = set(indices)
        self._ahead = {index: read for index, read in self._ahead.items() if index in wanted}
        for index in wanted - self._ahead.keys():
            self._ahead[index] = self._threads.submit(self._read_now, index, self._writes.get(index))

    def _read_now(self, index: int, write: _Write | None) -> dict[str, Tensor]:
        if write is not None:
            write.written.result()  # threads take work in order, so the write does not wait for this one
        return {name: _pinned(tensor) for name, tensor in super().tensors(index)}

    def tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        self.finish([index])
        ahead = self._ahead.pop(index, None)
        if ahead is None or ahead.exception() is not None:  # it fails if a write failed, which `finish` has repeated
            return super().tensors(index)
        return iter(ahead.result().items())

    def write(self, index: int, weights: dict[str, Tensor]) -> Path:
        self.finish([index, *(other for other, write in self._writes.items() if write.written.done())])
        file = self._new_file(index)
        held = {name: _held(weight.detach()) for name, weight in weights.items()}
        copied = _event()
        self._writes[index] = _Write(file, held, self._threads.submit(self._write_when, copied, file, held))
        return file

    def _write_when(self, copied: torch.cuda.Event | None, file: Path, weights: dict[str, Tensor]) -> None:
        if copied is not None:
            copied.synchronize()
        self._write(file, weights)

    def use(self, index: int, file: Path) -> None:
        self._ahead.pop(index, None)
        super().use(index, file)

    def finish(self, indices: Iterable[int] | None = None) -> None:
        for index in set(self._writes if indices is None else indices) & self._writes.keys():
            file, weights, written = self._writes[index]
            if written.exception() is not None:
                self._write(file, weights)
            del self._writes[index]


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
