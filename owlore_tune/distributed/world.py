"""The processes that train together, and the local part of sharded tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")


class RankError(RuntimeError):
    """A failure on another rank."""


class World:
    """A group of processes and its collectives. With one process, collectives do nothing.

    Args:
        group: a torch.distributed group; None for only this process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @classmethod
    def of(cls, tensor: Tensor) -> "World":
        """The processes that ``tensor`` is sharded over; only this one for a plain tensor."""
        if not isinstance(tensor, DTensor) or tensor.device_mesh.size() == 1:
            return ALONE
        return cls(tensor.device_mesh.get_group())

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` with its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def sums(self, numbers: list[int]) -> list[int]:
        """Each of ``numbers`` summed over all processes."""
        if self.size == 1:
            return numbers
        return self.sum_(torch.tensor(numbers)).tolist()  # in host memory, so that no process waits for a GPU

    def largest(self, number: int) -> int:
        """The largest ``number`` of all processes."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return int(value)

    def from_first_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` with that of rank 0."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def share(self, value: T) -> T:
        """Rank 0's ``value``, any object."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The ``value`` of every process in rank order, on all processes. It does not pass through a GPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def same_random_numbers(self, seed: int) -> Iterator[None]:
        """Let torch draw the same random numbers on all processes during the block, and go on as before after it."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield

    def call(self, action: Callable[[], T], *, on_rank_zero: bool = False) -> T | None:
        """Run ``action`` on every process, or only on rank 0. An error on one rank is raised on all.

        No process then waits for one that failed. The call also synchronizes all processes.

        Raises:
            Exception: the error that ``action`` raised on this rank.
            RankError: if it failed on another rank, with that rank's message.
        """
        result, error = None, None
        if self.rank == 0 or not on_rank_zero:
            try:
                result = action()
            except Exception as raised:
                error = raised
        errors = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, found in enumerate(errors):
            if found is not None:
                raise RankError(f"rank {rank} failed: {found}")
        return result


ALONE = World()


def compute_device(parameter: Tensor) -> torch.device:
    """The device that computes with ``parameter``, which FSDP2 may keep in host memory."""
    if isinstance(parameter, DTensor) and (kind := parameter.device_mesh.device_type) != parameter.device.type:
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    return parameter.device


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, without a copy. Returns a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes. Returns a plain tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's rows of ``value``, sharded like ``like``.

    If ``value`` is not on the mesh's device, only these rows are copied to it; ``distribute_tensor`` would copy all of
    ``value``. Returns ``value`` itself if ``like`` is a plain tensor.
    """
    if not isinstance(like, DTensor):
        return value
    first, end = rows_of(like)
    return from_local(value[first:end], like)


def from_local(part: Tensor, like: DTensor) -> DTensor:
    """The tensor, sharded like ``like``, of which this process has ``part``."""
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """First and end row of this process's part of ``tensor``, sharded along its first dimension.

    All rows for a plain tensor.
    """
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0]
    mesh = tensor.device_mesh
    each = -(-tensor.shape[0] // mesh.size())  # as torch.chunk: the last ranks have fewer rows, or none
    first = min(mesh.get_local_rank() * each, tensor.shape[0])
    return first, min(first + each, tensor.shape[0])


def is_finite(parameter: Tensor) -> bool:
    """Whether all values of this process's part are finite. A norm needs no copy of them."""
    values = local(parameter.detach())
    return not values.numel() or bool(torch.linalg.vector_norm(values, ord=torch.inf).isfinite())
