"""A `LayerStore` that uses the disk while the device trains."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from owlore_tune.quantized.store import LayerStore


class _Write(NamedTuple):
    """New weights of a layer, held until they are in ``file``."""

    file: Path
    weights: dict[str, Tensor]
    written: Future[None]


class BackgroundStore(LayerStore):
    """Reads layers ahead, and writes them in the background, for a GPU that would wait for the disk.

    Layers on their way are in host memory, which a run on a CPU does not have. A write that fails is tried again when
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
        return dict(super().tensors(index))

    def tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        self.finish([index])
        ahead = self._ahead.pop(index, None)
        if ahead is None or ahead.exception() is not None:  # it fails if a write failed, which `finish` has repeated
            return super().tensors(index)
        return iter(ahead.result().items())

    def write(self, index: int, weights: dict[str, Tensor]) -> Path:
        self.finish([index, *(other for other, write in self._writes.items() if write.written.done())])
        file = self._new_file(index)
        held = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
        self._writes[index] = _Write(file, held, self._threads.submit(self._write, file, held))
        return file

    def use(self, index: int, file: Path) -> None:
        self._ahead.pop(index, None)
        super().use(index, file)

    def finish(self, indices: Iterable[int] | None = None) -> None:
        for index in set(self._writes if indices is None else indices) & self._writes.keys():
            file, weights, written = self._writes[index]
            if written.exception() is not None:
                self._write(file, weights)
            del self._writes[index]
