"""Shard a model with FSDP2, layer by layer."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torchtune import training


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
