"""Shard a model with FSDP2, layer by layer; and gradients of one step over all processes: their sum, and their norm."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torchtune import training

from owlore_tune.distributed.world import World, local


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 shards a model."""

    world_size: int = 1
    cpu_offload: bool = False  # parameters, gradients and full-rank optimizer state are in host memory
    reshard_after_forward: bool = True  # keep only shards of a layer between forward and backward


def shard_model(model: nn.Module, device: torch.device, sharding: Sharding) -> None:
    """Shard the parameters of ``model``, on the meta device, by rows over all processes of torch.distributed.

    Gradients are summed over the processes, not averaged, because each process's loss is its share of the mean. Those
    of 16 bits are summed in float32.

    With ``cpu_offload``, parameters are in host memory. Computation runs on ``device``.
    """
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)  # a new group would have another timeout
    shard = partial(
        fully_shard,
        mesh=mesh,
        reshard_after_forward=sharding.reshard_after_forward,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),  # torchtune's shard_model does not take one
        offload_policy=CPUOffloadPolicy() if sharding.cpu_offload else OffloadPolicy(),
    )
    for name, module in reversed(list(model.named_modules())):
        if training.get_shard_conditions(name, module):
            shard(module)
    shard(model)
    root, *_ = modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    # Embeddings, norm and head stay gathered after forward, because the loss reads the head.
    root.set_reshard_after_forward(False, recurse=False)
    for module in modules:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def reshard(model: nn.Module) -> None:
    """Reshard parameters that FSDP2 keeps gathered for a backward pass. Call it after forward passes without one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


_BUCKET = 2**24  # values that are sent at once


@torch.no_grad()
def sum_grads(parameters: Iterable[Tensor], world: World) -> None:
    """Replace the gradients of parameters that every process has with their sums. Call it once, after accumulation.

    FSDP2 sums those of the parameters that it shards. Nothing else is sent: 4 bytes for each value, also of 16 bits.
    """
    if world.size == 1:
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for bucket in _buckets([grad for grad in grads if not isinstance(grad, DTensor)]):
        values = torch.cat([grad.flatten() for grad in bucket])
        flat = world.sum_(values.to(torch.promote_types(values.dtype, torch.float32)))
        sizes = [grad.numel() for grad in bucket]
        for grad, summed in zip(bucket, flat.split(sizes), strict=True):
            grad.copy_(summed.view_as(grad))


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype and about `_BUCKET` values, in an order that all processes share."""
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        bucket: list[Tensor] = []
        for grad in (grad for grad in grads if grad.dtype == dtype):
            if bucket and sum(some.numel() for some in bucket) + grad.numel() > _BUCKET:
                yield bucket
                bucket = []
            bucket.append(grad)
        if bucket:
            yield bucket


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, world: World) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for plain and sharded parameters together. A norm that is not finite
    changes nothing.

    Returns:
        () the total 2-norm before clipping. ``max_norm=inf`` only measures.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sharded = [local(grad) for grad in grads if isinstance(grad, DTensor) and world.size > 1]
    plain = [local(grad) for grad in grads if not isinstance(grad, DTensor) or world.size == 1]
    if not grads:
        return torch.zeros(())
    total = torch.nn.utils.get_total_norm(plain)
    if sharded:
        of_shards = torch.nn.utils.get_total_norm([grad for grad in sharded if grad.numel()]).to(total.device)
        device = grads[0].device_mesh.device_type if isinstance(grads[0], DTensor) else total.device
        total = (total.square() + world.sum_(of_shards.square().to(device))).sqrt()
    if math.isfinite(max_norm):
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        factor = torch.where(total.isfinite(), factor, 1.0)  # else all gradients turn NaN
        for device in {grad.device for grad in (*sharded, *plain)}:
            torch._foreach_mul_([g for g in (*sharded, *plain) if g.device == device], factor.to(device))
    return total
