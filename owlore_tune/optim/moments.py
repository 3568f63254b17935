"""The optimizer's state of a trained parameter: its moments at a new basis, in host memory, and its size."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

MOMENTS = ("keep", "project", "reset")


def carry_moments(optimizer: Optimizer, parameter: Tensor, turn: Tensor, moments: str, right: bool) -> None:
    """Carry the optimizer's moments of A over to a new basis, in place.

    Args:
        turn: (r, r) old basisᵀ · new basis.
        moments: ``keep`` does nothing; ``reset`` drops the state; ``project`` rotates ``exp_avg`` with ``turn``, and
            ``exp_avg_sq`` with its elementwise square.
        right: whether A is (m, r), and not (r, n).

    Raises:
        ValueError: if the optimizer has no such moments to project.
    """
    if moments == "reset":
        optimizer.state.pop(parameter, None)
    if moments != "project" or not (state := optimizer.state.get(parameter)):
        return
    check_moments(optimizer, parameter)
    turns = {"exp_avg": turn, "exp_avg_sq": turn.square(), "max_exp_avg_sq": turn.square()}  # the last one of AMSGrad
    for key, matrix in ((key, turns[key]) for key in turns if key in state):
        moment = state[key] if type(state[key]) is Tensor else state[key].dequantize()
        state[key].copy_(moment @ matrix if right else matrix.T @ moment)


def check_moments(optimizer: Optimizer, parameter: Tensor) -> None:
    """Raise ValueError if the optimizer has a state of ``parameter`` without moments that can be projected."""
    state = optimizer.state.get(parameter)
    if state and not state.keys() >= {"exp_avg", "exp_avg_sq"}:
        raise ValueError(f"moments=project; {type(optimizer).__name__} has no exp_avg and exp_avg_sq to project")


def check_optimizer(optimizer: Optimizer) -> None:
    """
    Raises:
        ValueError: if the optimizer has weight decay that is not known to be decoupled, which could act on A and not on
            the weight; or a state of parameters that have no values yet.
    """
    states = (value for state in optimizer.state.values() for value in state.values())
    if any(torch.is_tensor(value) and value.ndim and not value.numel() for value in states):
        raise ValueError(
            f"{type(optimizer).__name__} makes its state before A has values; use one that makes it in its first "
            "step, such as AdamW"
        )
    for group in optimizer.param_groups:
        is_decoupled = group.get("decoupled_weight_decay", "AdamW" in type(optimizer).__name__)
        if group.get("weight_decay", 0.0) and not is_decoupled:
            raise ValueError(
                f"weight_decay={group['weight_decay']}; that of {type(optimizer).__name__} is not known to be "
                "decoupled: set it to 0, or use AdamW"
            )


def move_state(optimizer: Optimizer, parameter: Tensor, device: torch.device) -> None:
    """Move the optimizer's state of a parameter, but for its step counter, to ``device``."""
    if state := optimizer.state.get(parameter):
        moved = {key: value for key, value in state.items() if key != "step"}
        state |= tree_map_only(Tensor, lambda value: value.to(device), moved)


def state_bytes(optimizer: Optimizer, device: torch.device | None = None) -> int:
    """Bytes of the optimizer's state on this process; only those on the kind of ``device``, if it is given."""
    return sum(
        num_bytes(value)
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and (device is None or value.device.type == device.type)
    )


def num_bytes(value: Any) -> int:
    """Bytes of a tensor on this process: of its shard, or of the codes and scales of torchao's 8-bit state."""
    if hasattr(value, "to_local"):
        value = value.to_local()
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return sum(num_bytes(getattr(value, name)) for name in names)
    return value.nbytes
