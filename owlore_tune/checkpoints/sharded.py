"""The state of an optimizer in a checkpoint, whatever number of processes wrote it or reads it."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchao.optim.subclass_8bit import OptimState8bit

from owlore_tune.distributed.world import ALONE, World, from_local, full, rows_of, shard_like


class OptimizerState:
    """Saves whole tensors of sharded state, and loads the rows of each process.

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
