"""The processes that train together, and what a sharded tensor has on this one."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


class RankError(RuntimeError):
    """What failed on another rank."""


class World:
    """A group of processes with what they exchange. In a world of one nothing is exchanged, so no bit changes.

    Args:
        group: of torch.distributed; None for this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @classmethod
    def of(cls, tensor: Tensor) -> "World":
        """The processes that ``tensor`` is sharded over; this one alone for a plain tensor."""
        if not isinstance(tensor, DTensor) or tensor.device_mesh.size() == 1:
            return ALONE
        return cls(tensor.device_mesh.get_group())

    def sum_(self, tensor: Tensor) -> Tensor:
        """``tensor`` replaced by its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def sums(self, numbers: list[int], device: torch.device) -> list[int]:
        """Each of ``numbers`` summed over all processes, by way of ``device``."""
        if self.size == 1:
            return numbers  # without a wait for the device
        return self.sum_(torch.tensor(numbers, device=device)).tolist()

    def largest(self, number: int, device: torch.device) -> int:
        """The largest ``number`` of all processes, by way of ``device``."""
        return number if self.size == 1 else int(self.max_(torch.tensor(number, device=device)))

    def max_(self, tensor: Tensor) -> Tensor:
        """``tensor`` replaced by its largest over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def from_first_(self, tensor: Tensor) -> Tensor:
        """``tensor`` replaced by that of the first process."""
        if self.size > 1:
            dist.broadcast(tensor, src=dist.get_global_rank(self._group, 0), group=self.group)
        return tensor

    def share(self, value: T) -> T:
        """The first process's ``value``, any object."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=dist.get_global_rank(self._group, 0), group=self.group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every process's ``value``, on all of them, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def attempt(self, action: Callable[[], T], *, first_alone: bool = False) -> T | None:
        """Run ``action`` here, or on the first process alone; an error of one is an error of all.

        So no process waits for one that has given up. The exchange after it lets all of them go on together.

        Raises:
            Exception: the one that ``action`` raised here.
            RankError: if it failed on another rank, with that one's message.
        """
        result, error = None, None
        if self.rank == 0 or not first_alone:
            try:
                result = action()
            except Exception as raised:
                error = raised
        messages = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            vars(error)["known_to_all"] = True
            raise error
        failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
        if failed:
            raise RankError(f"rank {failed[0][0]} failed: {failed[0][1]}")
        return result

    @property
    def _group(self) -> dist.ProcessGroup:
        assert self.group is not None
        return self.group


ALONE = World()


def is_known_to_all(error: Exception) -> bool:
    """Whether all processes have an error of the same call, so that they can go on together."""
    return isinstance(error, RankError) or getattr(error, "known_to_all", False)


def current_world() -> World:
    """All processes that torch.distributed was initialized with; this one alone without it."""
    return World(dist.group.WORLD) if dist.is_initialized() and dist.get_world_size() > 1 else ALONE


def local(tensor: Tensor) -> Tensor:
    """What this process has of a sharded tensor, sharing its memory; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, gathered from all processes; a plain tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's rows of ``value``, as a tensor sharded as ``like`` is; for a plain ``like`` all of it."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)  # each has it: none sends


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """Which rows of ``tensor``, sharded along its first dimension, are here: from, to. All rows of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0]
    mesh = tensor.device_mesh
    each = -(-tensor.shape[0] // mesh.size())  # as torch.chunk divides: the last ones have fewer, or none
    first = min(mesh.get_local_rank() * each, tensor.shape[0])
    return first, min(first + each, tensor.shape[0])


def is_finite(parameter: Tensor) -> bool:
    """Whether all values that are here are finite; by a norm, which needs no copy of them."""
    values = local(parameter.detach())
    return not values.numel() or bool(torch.linalg.vector_norm(values, ord=torch.inf).isfinite())


def peak(tensor: Tensor) -> Tensor:
    """The largest magnitude in ``tensor``, (); 0 where it has no values."""
    return tensor.abs().amax() if tensor.numel() else torch.zeros((), dtype=tensor.dtype, device=tensor.device)
