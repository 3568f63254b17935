"""The state of a run in a checkpoint, for an exact resume: it is saved beside the weights, and loaded part by part."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchao.optim.subclass_8bit import OptimState8bit

from owlore_tune.checkpoints.steps import sealed_directory
from owlore_tune.distributed.world import ALONE, RankError, World, from_local, full, rows_of, shard_like
from owlore_tune.errors import CheckpointError
from owlore_tune.optim.moments import num_bytes

STATE_FILE = "recipe_state.pt"
ENTRY = 512  # bytes that a tensor takes in the file besides its values
OTHER_FILES = 2**16  # about the bytes of config, tokenizer and seal on a disk


def save_checkpoint(
    directory: Path,
    run_id: str,
    write_weights: Callable[[Path], None],
    num_weight_bytes: int,
    state: dict[str, Any],
    world: World = ALONE,
) -> None:
    """Write a model's weights and ``state`` into ``directory``.

    The directory gets its name only when it is complete, checksummed and on disk. All processes call this together, and
    the first one writes ``state``. An error on one process raises on all.

    Args:
        directory: must not exist.
        write_weights: writes them into the directory that it is given; all processes call it.
        num_weight_bytes: about how many bytes that takes.
        state: tensors, numbers, text, and lists and dicts of them.

    Raises:
        CheckpointError: if ``directory`` exists or cannot be written, for example on a full disk.
    """
    total = num_weight_bytes + _tensor_bytes(state) + OTHER_FILES
    try:
        with ExitStack() as stack:
            writing = sealed_directory(directory, total, run_id)
            partial_dir = world.share(world.call(lambda: stack.enter_context(writing), on_rank_zero=True))
            assert partial_dir is not None
            write_weights(partial_dir)
            world.call(lambda: _write_state(state, partial_dir), on_rank_zero=True)
            world.call(stack.close, on_rank_zero=True)
    except (OSError, RankError, CheckpointError) as error:  # all of them raised on all processes, by `World.call`
        raise CheckpointError(str(error)) from error


def load_state(directory: Path) -> dict[str, Any]:
    """The ``state`` of `save_checkpoint`.

    Raises:
        CheckpointError: if the checkpoint has no state, or it cannot be read.
    """
    file = directory / STATE_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory} has no {STATE_FILE}, so a run cannot resume from it")
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of pickle, torch or the file's own content
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("optimizer"), dict) or "identity" not in state:
        raise CheckpointError(f"{file} is not the state of a run of this program")
    return state


def _write_state(state: dict[str, Any], directory: Path) -> None:
    try:
        torch.save(state, directory / STATE_FILE)
    except RuntimeError as error:  # torch raises it on a full disk
        raise OSError(str(error)) from error


def _tensor_bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return num_bytes(state) + ENTRY
    if isinstance(state, dict):
        return sum(map(_tensor_bytes, state.values()))
    return sum(map(_tensor_bytes, state)) if isinstance(state, list | tuple) else 0


def load_parts(parts: dict[str, Any], saved: dict[str, Any], checkpoint: Path) -> None:
    """Load the state of each part of a run.

    Raises:
        CheckpointError: if a part has no state in ``saved``, or that of another part.
    """
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint} holds another state than this run saves: {error!r}") from error


class RngState:
    """The random generators of all processes of ``world``, as part of a run's state."""

    def __init__(self, world: World) -> None:
        self._world = world

    def state_dict(self) -> dict[str, Any]:
        return {"by_rank": self._world.gather(get_rng_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        by_rank = state_dict["by_rank"]
        set_rng_state(by_rank[self._world.rank % len(by_rank)])


def get_rng_state() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, on the CPU and CUDA; loadable with ``weights_only=True``."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the states of `get_rng_state`. CUDA states are skipped if the number of devices has changed."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class OptimizerState:
    """The state of an optimizer, whatever number of processes wrote it or reads it.

    Saves whole tensors of sharded state, and loads the rows of each process.

    Args:
        optimizer: of torch, torchao or a user.
        world: processes that share its parameters.
    """

    def __init__(self, optimizer: Optimizer, world: World = ALONE) -> None:
        self._optimizer = optimizer
        self._world = world

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, with sharded tensors gathered one by one, in the first process' host memory.

        A sharded tensor in few bits becomes the list of its parts by rank. All processes call it together. Others get
        no values of sharded tensors.
        """
        saved = self._optimizer.state_dict()
        state = {
            index: {key: self._gathered(value) for key, value in values.items()}
            for index, values in saved["state"].items()
        }
        return {**saved, "state": state}

    def _gathered(self, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        part = value.to_local()
        if any(self._world.gather(hasattr(part, "__tensor_flatten__"))):  # torch cannot gather these
            parts = self._world.gather(part.cpu())
            return parts if self._world.rank == 0 else []
        whole = full(value)
        return whole.cpu() if self._world.rank == 0 else torch.empty(0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {key: _of_process(value, parameters[index]) for key, value in values.items()}
            for index, values in state_dict["state"].items()
        }
        self._optimizer.load_state_dict({**state_dict, "state": state})


def _of_process(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, list):
        if isinstance(parameter, DTensor) and parameter.device_mesh.size() == len(value):
            return from_local(value[parameter.device_mesh.get_local_rank()], parameter)
        value = _joined(value)
    if not (isinstance(parameter, DTensor) and torch.is_tensor(value) and value.shape == parameter.shape):
        return value
    if isinstance(value, OptimState8bit):
        return from_local(_rows(value, *rows_of(parameter)), parameter)
    return shard_like(value, parameter)


def _joined(parts: list[Tensor]) -> Tensor:
    """The whole of a tensor; in float32 if its parts are not all in 8 bits, in which each block has a scale."""
    parts = [part for part in parts if part.numel()]
    in_8_bits = [part for part in parts if isinstance(part, OptimState8bit)]
    if len(in_8_bits) < len(parts):
        return torch.cat([part.dequantize() if hasattr(part, "__tensor_flatten__") else part.float() for part in parts])
    codes, scales = (torch.cat([getattr(part, name) for part in in_8_bits]) for name in ("codes", "scale"))
    return OptimState8bit(codes, scales, in_8_bits[0].qmap, in_8_bits[0].signed)


def _rows(value: OptimState8bit, first: int, end: int) -> Tensor:
    """Rows of a quantized tensor; in float32 if a block of values with one scale is not in one part."""
    blocks_of_row = value.codes[0].numel() / value.block_size
    start, stop = first * blocks_of_row, end * blocks_of_row
    if first == end or not (start.is_integer() and stop.is_integer()):
        return value.dequantize()[first:end]
    return OptimState8bit(value.codes[first:end], value.scale[int(start) : int(stop)], value.qmap, value.signed)
