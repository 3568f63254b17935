"""A model sharded by FSDP2, layer by layer."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torchtune import training


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 divides a model."""

    world_size: int = 1
    cpu_offload: bool = False  # parameters, gradients and optimizer state are in host memory
    reshard_after_forward: bool = True  # only shards of a layer are kept between forward and backward


def shard_model(model: nn.Module, device: torch.device, sharding: Sharding) -> torch.device:
    """Shard the parameters of ``model``, on the meta device, by rows over all processes of torch.distributed.

    Gradients are summed over the processes, not averaged: each process's loss is its share of the mean.

    Returns:
        The device that parameters are kept on; they are computed with on ``device``.
    """
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)  # a group of its own would have another timeout
    training.shard_model(
        model,
        [training.get_shard_conditions],
        cpu_offload=sharding.cpu_offload,
        reshard_after_forward=sharding.reshard_after_forward,
        dp_mesh=mesh,
    )
    root, *_ = modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    # Embeddings, norm and head stay together after forward, because the loss then reads the head.
    root.set_reshard_after_forward(False, recurse=False)
    for module in modules:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    return torch.device("cpu") if sharding.cpu_offload else device


def reshard(model: nn.Module) -> None:
    """After forward passes alone, shard again the parameters that FSDP2 keeps whole for a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
