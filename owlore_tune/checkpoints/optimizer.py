"""The state of an optimizer in a checkpoint, whatever number of processes wrote it or reads it."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from owlore_tune.distributed.world import ALONE, World, full, shard_like


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

        All processes call it together. Others get no values of sharded tensors.
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
    is_sharded = isinstance(parameter, DTensor) and torch.is_tensor(value) and value.shape == parameter.shape
    return shard_like(value, parameter) if is_sharded else value
