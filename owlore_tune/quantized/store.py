"""Full-precision weights of every layer, on disk.

A store begins with the files of a model directory. Then each layer gets a file of its own, which never changes again. A
layer that has trained gets a new one. So a checkpoint consists of hard links to these files and the layers that train
now. A `BackgroundStore` uses the disk while a GPU trains.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from owlore_tune.errors import ConfigError, RunError
from owlore_tune.files import readable_by_others

OUTSIDE = -1  # the index of everything outside the layers
BEFORE_UPDATES = "base"  # folder of a checkpoint: what the layers that train had before their last updates
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_OWN = re.compile(r"(?:outside|layer_\d+)\.\d+\.safetensors|\.tmp\w{6}")  # safetensors writes to the latter first


class _BaseTensor(NamedTuple):
    """A tensor of the model directory."""

    file: Path
    name: str
    numel: int


class LayerStore:
    """Weights by layer, in the run's dtype and a layout such as Hugging Face's.

    Args:
        layout: converts weights between the model's names and those in files, as `HFCheckpointer` does: it has
            ``checkpoint_dir``, ``to_tune`` and ``write_tensors``.
        files: weights of a model directory, or of a checkpoint of this run.
        directory: of the store's own files, two levels below ``output_dir``. No other run has it; `fill` makes it.
        dtype: of the run.

    Raises:
        ConfigError: if a file is not in the safetensors format.
    """

    def __init__(self, layout: Any, files: Iterable[Path], directory: Path, dtype: torch.dtype) -> None:
        self._layout = layout
        self._directory = directory
        self._dtype = dtype
        self._generation = 0
        self.files: dict[int, Path] = {}  # of layers with a file of their own
        self._base: dict[int, list[_BaseTensor]] = {}  # of all others
        self._base_files: dict[Path, tuple[int, int]] = {}  # size and modification time
        for file in files:
            if file.suffix != ".safetensors":
                raise ConfigError(f"{file}: owlore.weights needs safetensors; convert the model directory first")
            self._base_files[file] = _identity(file)
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    numel = math.prod(opened.get_slice(name).get_shape())
                    self._base.setdefault(layer_of(name), []).append(_BaseTensor(file, name, numel))

    @property
    def place(self) -> Path:
        """Where the weights are from."""
        return self._layout.checkpoint_dir

    def indices(self) -> set[int]:
        """The layers that have weights; OUTSIDE is one of them."""
        return {*self._base, *self.files}

    def nbytes(self, indices: Sequence[int]) -> int:
        """Bytes of the files of layers."""
        return sum(self.files[index].stat().st_size for index in indices if index in self.files)

    def adopt(self) -> None:
        """Link to the files of a checkpoint with a file for each layer, so that the checkpoint may be removed.

        For layers that train, these are the weights before their last updates, which the run's state has.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        for index, tensors in self._base.items():
            (file,) = {tensor.file for tensor in tensors}
            base = file.parent / BEFORE_UPDATES / _file_name(index)
            target = self._new_file(index)
            _link(base if base.is_file() else file, target)
            self.files[index] = target
        self._base.clear()

    def read(self, index: int) -> dict[str, Tensor]:
        """The weights of a layer, or of OUTSIDE, by torchtune's names.

        Raises:
            OSError: if a file of the model directory changed since the start.
        """
        return dict(self.tensors(index))

    def tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """`read`, one weight at a time."""
        for name, tensor in self._read(index):
            for key, value in self._layout.to_tune(name, tensor).items():
                yield key, value.to(self._dtype, copy=True)

    def read_ahead(self, indices: Iterable[int]) -> None:
        """Prepare the next `read` of these layers, and of no others. For a store that reads in the background."""

    def write(self, index: int, weights: dict[str, Tensor]) -> Path:
        """Write new weights of a layer to a new file, for `use`.

        Raises:
            OSError: if the disk is full or refuses.
        """
        file = self._new_file(index)
        self._write(file, weights)
        return file

    def follow(self, index: int, weights: dict[str, Tensor], unwritten: set[int]) -> None:
        """Take note of a `write` of the first process, on another one.

        Args:
            unwritten: layers whose files may not be complete.
        """

    def unwritten(self) -> set[int]:
        """The layers that are still being written."""
        return set()

    def finish(self, indices: Iterable[int] | None = None) -> None:
        """Wait until layers are written; all if omitted. For a store that writes in the background.

        Raises:
            OSError: as `write`.
        """

    def use(self, index: int, file: Path) -> None:
        """Read a layer from ``file`` from now on. The earlier file is removed; checkpoints still have it."""
        old, self.files[index] = self.files.get(index), file
        if old is not None:
            old.unlink(missing_ok=True)  # another process may have removed it

    def check_space(self) -> None:
        """
        Raises:
            RunError: if the disk has too little space for the files that `fill` writes.
        """
        tensors = (tensor for index, some in self._base.items() if index not in self.files for tensor in some)
        num_bytes = sum(tensor.numel for tensor in tensors) * self._dtype.itemsize
        if (free := shutil.disk_usage(self._directory.parents[1]).free) < num_bytes:
            raise RunError(
                f"{self._directory} needs {num_bytes:,} bytes for the full-precision weights, and only "
                f"{free:,} are free; choose another output_dir"
            )

    def fill(self, names: dict[int, set[str]]) -> None:
        """Copy layers of the model directory to files of their own. Checkpoints then copy only the layers that train.

        Args:
            names: torchtune's names of the model's weights, by layer.

        Raises:
            OSError: if the disk refuses, or the model directory changed.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        for index in tqdm(sorted(names.keys() - self.files), desc="Copying layers", unit="layer", leave=False):
            weights = self.read(index)
            self.files[index] = self.write(index, {name: weights[name] for name in names[index]})
            self.finish()
            del weights  # before the next layer is read
        self._base.clear()

    def write_checkpoint(
        self, directory: Path, active: list[int], weights_of: Callable[[int], dict[str, Tensor]]
    ) -> None:
        """Write a model directory's weights: links to the store's files, and what trains now from memory.

        Args:
            active: the layers, or OUTSIDE, that train now. The folder `BEFORE_UPDATES` gets links to the layers' files.
            weights_of: returns their weights, by torchtune's names.
        """
        self.finish()
        (directory / BEFORE_UPDATES).mkdir()
        weight_map: dict[str, str] = {}
        total = 0
        for number, index in enumerate(sorted(self.files), start=1):
            file = directory / f"model-{number:05}-of-{len(self.files):05}.safetensors"
            if index in active:
                self._save(weights_of(index), file)
                if index != OUTSIDE:
                    _link(self.files[index], directory / BEFORE_UPDATES / _file_name(index))
            else:
                _link(self.files[index], file)
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    weight_map[name] = file.name
                    total += math.prod(opened.get_slice(name).get_shape()) * self._dtype.itemsize
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))

    def remove_leftovers(self) -> None:
        """Remove files that the store does not use: those of an interrupted process, known by their names."""
        for file in self._directory.glob("*"):
            if _OWN.fullmatch(file.name) and file.is_file() and file not in self.files.values():
                file.unlink()

    def _read(self, index: int) -> Iterator[tuple[str, Tensor]]:
        if index in self.files:
            with safe_open(self.files[index], framework="pt") as opened:
                places = [(self.files[index], name) for name in opened.keys()]  # noqa: SIM118
        else:
            places = [(tensor.file, tensor.name) for tensor in self._base.get(index, ())]
        for file, name in places:
            if file in self._base_files and _identity(file) != self._base_files[file]:
                raise OSError(f"{file} changed during the run; restore it, then resume")
            with safe_open(file, framework="pt") as opened:  # anew, or pages of the file count as memory
                yield name, opened.get_tensor(name)

    def _write(self, file: Path, weights: dict[str, Tensor]) -> None:
        self._save(weights, file)
        readable_by_others(file, 0o444)  # checkpoints share it

    def _save(self, weights: dict[str, Tensor], file: Path) -> None:
        try:
            self._layout.write_tensors({key: value.detach().cpu() for key, value in weights.items()}, file)
        except SafetensorError as error:  # its way to report a full disk
            raise OSError(str(error)) from error

    def _new_file(self, index: int) -> Path:
        name = "outside" if index == OUTSIDE else f"layer_{index}"
        while True:
            self._generation += 1
            file = self._directory / f"{name}.{self._generation}.safetensors"
            if not os.path.lexists(file):
                return file


def layer_of(name: str) -> int:
    """The layer that a weight belongs to, by its name in Hugging Face's layout; OUTSIDE if it is in none."""
    found = _LAYER.search(name)
    return int(found[1]) if found else OUTSIDE


def _file_name(index: int) -> str:
    return f"layer_{index}.safetensors"


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except FileExistsError:
        raise
    except OSError:  # another disk, or one without links
        shutil.copyfile(file, target)


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
