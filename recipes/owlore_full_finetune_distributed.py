"""Fine-tune all weights of a model on several devices, a few layers at a time (OwLore, arXiv 2405.18380, on FSDP2).

tune run --nproc_per_node N owlore_full_finetune_distributed --config llama2/7B_owlore_distributed [field=value ...]
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torchtune import training, utils

from owlore_full_finetune import DEFAULTS, OwLoreFullFinetuneRecipe, log
from owlore_tune.config import ConfigError, RunError, check_positive, check_type, parse
from owlore_tune.memory_plan import Sharding
from owlore_tune.meta import build_optimizer
from owlore_tune.rendezvous import join_process_group
from owlore_tune.world import RankError, current_world, reshard

DISTRIBUTED_DEFAULTS: dict[str, Any] = {
    "fsdp_cpu_offload": False,  # parameters, gradients and optimizer state in host memory
    "fsdp_reshard_after_forward": True,
    "dist_timeout_s": 600,  # seconds
    "tensor_parallel_dim": 1,
    "optimizer_in_bwd": False,
}


class OwLoreFullFinetuneDistributedRecipe(OwLoreFullFinetuneRecipe):
    """OwLore on several devices: FSDP2 shards weights, gradients and optimizer state by rows.

    The loop is `OwLoreFullFinetuneRecipe`'s; here is what differs before it. All processes take the first one's draw.
    A projected gradient's basis is made by all of them together when it is refreshed, and nothing more is exchanged
    between refreshes than FSDP2 exchanges anyway. Checkpoints are read by any number of processes, one included.

    One step trains on batch_size × gradient_accumulation_steps × processes rows, the same ones for any number of
    processes with the same product.

    Args:
        cfg: the parsed config; its fields are those of the single-device recipe and of DISTRIBUTED_DEFAULTS.

    Raises:
        ConfigError: if a key is unknown or a value cannot work.
    """

    defaults = DEFAULTS | DISTRIBUTED_DEFAULTS

    def __init__(self, cfg: DictConfig) -> None:
        self._world = current_world()
        super().__init__(cfg)
        cfg = self._cfg
        for key in ("fsdp_cpu_offload", "fsdp_reshard_after_forward"):
            check_type(key, cfg[key], bool)
        refused = {
            "tensor_parallel_dim": (cfg.tensor_parallel_dim != 1, "only data is parallel here: set it to 1"),
            "optimizer_in_bwd": (
                cfg.optimizer_in_bwd,
                "gradients are projected in backward already, and clipped after it: set it to false",
            ),
            "eval": (cfg.eval is not None, "set it to null, and evaluate checkpoints with owlore_eval"),
            "compile": (cfg.compile, "for one device alone: set it to false"),
        }
        for key, (bad, way_out) in refused.items():
            if bad:
                raise ConfigError(f"{key}={cfg[key]}; {way_out}")

    def _sharding_over(self, world_size: int, gpu: bool = False) -> Sharding | None:
        return Sharding(world_size, self._offloads(gpu), self._cfg.fsdp_reshard_after_forward)

    def _offloads(self, gpu: bool = False) -> bool:
        return self._cfg.fsdp_cpu_offload and (gpu or self._device.type != "cpu")  # where everything is in any case

    def _prepare_model(self, cfg: DictConfig) -> None:
        """Shard the model, layer by layer, and make the optimizer anew over what is sharded."""
        super()._prepare_model(cfg)
        assert dist.group.WORLD is not None
        mesh = DeviceMesh.from_group(dist.group.WORLD, self._device.type)  # a group of its own has another timeout
        training.shard_model(
            self._model,
            [training.get_shard_conditions],
            cpu_offload=self._offloads(),
            reshard_after_forward=cfg.fsdp_reshard_after_forward,
            dp_mesh=mesh,
        )
        root, *_ = modules = [module for module in self._model.modules() if isinstance(module, FSDPModule)]
        # Embeddings, norm and head stay together after forward, since the loss reads the head then.
        root.set_reshard_after_forward(False, recurse=False)
        for module in modules:
            module.set_gradient_divide_factor(1.0)  # each process's loss is its share of the mean
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        if self._offloads():
            self._weights_device = torch.device("cpu")
        self._optimizer = build_optimizer(cfg, self._model)

    def _validate(self, when: str) -> None:
        super()._validate(when)
        reshard(self._model)


@contextmanager
def process_group(cfg: DictConfig) -> Iterator[None]:
    """torch.distributed, as torchrun's variables say; a process that is lost becomes a RunError on the others.

    Raises:
        ConfigError: if the recipe was not launched by torchrun.
        RunError: if another process died, or did not answer within ``dist_timeout_s``.
    """
    if not training.is_distributed():
        raise ConfigError(
            "this recipe runs under torchrun: tune run --nproc_per_node N owlore_full_finetune_distributed --config ..."
        )
    seconds = cfg.get("dist_timeout_s", DISTRIBUTED_DEFAULTS["dist_timeout_s"])
    check_type("dist_timeout_s", seconds, float)
    check_positive("dist_timeout_s", seconds)
    try:
        device = utils.get_device(cfg.get("device"))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"device={cfg.get('device')}, rank {os.environ['RANK']}: {error}") from error
    offload = bool(cfg.get("fsdp_cpu_offload")) and device.type != "cpu"
    backend = training.get_distributed_backend(device.type, offload_ops_to_cpu=offload)
    try:
        join_process_group(backend, timedelta(seconds=seconds))
    except RuntimeError as error:
        raise RunError(f"rank {os.environ['RANK']} cannot join the others: {error}") from error
    try:
        if dist.get_rank() > 0:
            utils.get_logger("INFO").setLevel(logging.ERROR)  # what all have to say, the first one says
        yield
    except RankError as error:
        raise RunError(str(error)) from error
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise RunError(
            f"rank {os.environ['RANK']}: another process of the run died or did not answer for dist_timeout_s="
            f"{seconds} s ({str(error).splitlines()[0]}). Checkpoints are intact: go on from the newest by "
            "resume_from_checkpoint=true"
        ) from error
    # Not after an error: the others may never come to it.
    dist.destroy_process_group()


def is_lost_process(error: RuntimeError) -> bool:
    """Whether torch.distributed says that a process went away, or is silent."""
    words = (
        "connection closed by peer",
        "connection reset",
        "timed out",
        "timeout",
        "broken pipe",
        "connection refused",
        "communicator was aborted",
        "remote process exited",
    )
    return any(word in str(error).lower() for word in words)


@parse
def recipe_main(cfg: DictConfig) -> None:
    """Fine-tune with OwLore on several devices; see `OwLoreFullFinetuneDistributedRecipe`."""
    with process_group(cfg):
        recipe = OwLoreFullFinetuneDistributedRecipe(cfg=cfg)
        log.info(f"Running OwLoreFullFinetuneDistributedRecipe with config:\n\n{OmegaConf.to_yaml(cfg)}")
        try:
            recipe.setup()
            recipe.train()
        finally:
            recipe.cleanup()


if __name__ == "__main__":
    recipe_main()
