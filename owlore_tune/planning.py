"""A config's memory plan, those of other methods beside it, and the refusal of one that is over its limit."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from omegaconf import DictConfig, OmegaConf

from owlore_tune.config import ConfigError, OwLoreConfig, device_and_dtype
from owlore_tune.data import is_packed
from owlore_tune.memory_plan import MemoryPlan, Sharding, StepShape, peer_plans, plan_memory
from owlore_tune.meta import Parts, build_parts

# What a plan over device_memory_limit is tried again with: one after the other, then all that help together.
SAVINGS = (
    ("enable_activation_checkpointing=true",),
    ("optimizer.state_bits=8", "optimizer.basis_bits=16"),
    ("owlore.train_embeddings=false", "owlore.train_output=false"),
    ("owlore.inactive_state=drop", "owlore.project_in_backward=true"),
    ("owlore.num_active_layers=2",),
    ("optimizer.rank=128",),
    ("dtype=bf16",),
)
OUTSIDE = ("train_embeddings", "train_output", "train_norm")
OFFLOAD = "fsdp_cpu_offload=true"


def plan_run(
    cfg: DictConfig,
    parts: Parts,
    seq_len: int,
    sharding: Sharding | None = None,
    framework: int | None = None,
    *,
    gpu: bool = False,
) -> MemoryPlan:
    """The plan of a config's run.

    Args:
        cfg: with defaults filled in.
        parts: of ``cfg``, without weights.
        seq_len: tokens of the longest row.
        sharding: plan for one of several devices.
        framework: bytes; `owlore_tune.memory_plan.framework_bytes` as it is now where left out.
        gpu: plan for a GPU, whatever device there is.

    Raises:
        ConfigError: if the model does not take rows of ``seq_len`` tokens.
    """
    if seq_len > parts.model.max_seq_len:
        raise ConfigError(
            f"rows can have {seq_len} tokens, and the model takes {parts.model.max_seq_len}; set tokenizer.max_seq_len"
        )
    owlore = OwLoreConfig.from_config(cfg.owlore)
    device, _ = device_and_dtype(cfg)
    offloads_state = owlore.inactive_state == "offload" and (gpu or device.type != "cpu")
    plan = plan_memory(
        parts.model,
        parts.loss_fn,
        parts.optimizer,
        _step_shape(cfg, seq_len),
        device=device,
        num_active=owlore.num_active_layers,
        holds_all_state=owlore.inactive_state != "drop" and not offloads_state,
        projects_in_backward=owlore.project_in_backward,
        framework=framework,
        sharding=sharding,
    )
    return plan.on_gpu() if gpu else plan


def plan_with_peers(
    cfg: DictConfig, parts: Parts, seq_len: int, sharding: Sharding | None = None, *, gpu: bool = False
) -> dict[str, MemoryPlan]:
    """`plan_run` as ``this config``, and the plans of other methods on the same model and data."""
    own = plan_run(cfg, parts, seq_len, sharding, gpu=gpu)
    peers = peer_plans(
        parts.model,
        parts.loss_fn,
        _step_shape(cfg, seq_len),
        device=device_and_dtype(cfg)[0],
        rank=parts.optimizer.param_groups[0]["rank"] or 128,
        framework=own.framework,
        train_outside={key: cfg.owlore.get(key, False) for key in OUTSIDE},
        sharding=sharding,
    )
    return {"this config": own} | {name: plan.on_gpu() if gpu else plan for name, plan in peers.items()}


def check_limit(cfg: DictConfig, plan: MemoryPlan, seq_len: int, sharding: Sharding | None = None) -> None:
    """Raise ConfigError if ``plan`` is over ``device_memory_limit``, naming the settings that would bring it under."""
    if cfg.device_memory_limit is None or plan.total <= (limit := 1e9 * float(cfg.device_memory_limit)):
        return

    def planned_with(overrides: Sequence[str]) -> float:
        """Bytes of the plan with some fields changed; infinite where the model does not allow it."""
        other = DictConfig(OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides))))
        devices = sharding and replace(sharding, cpu_offload=sharding.cpu_offload or OFFLOAD in overrides)
        try:
            return plan_run(other, build_parts(other), seq_len, devices, plan.framework).total
        except ConfigError:
            return math.inf

    together: list[str] = []
    found: list[str] = []
    for overrides in savings(cfg, sharding, device_and_dtype(cfg)[0]):
        saved = planned_with(overrides)
        if saved < plan.total:
            together += overrides
        if saved <= limit:
            found.append(" ".join(overrides))
    if not found and planned_with(together) <= limit:
        found.append(" ".join(together))
    way_out = f"it fits with {', or with '.join(found)}" if found else "no setting that is tried here makes it fit"
    raise ConfigError(
        f"device_memory_limit={cfg.device_memory_limit} GB, and the plan is {plan.total / 1e9:.2f} GB; {way_out}"
    )


def savings(cfg: DictConfig, sharding: Sharding | None, device: torch.device) -> list[tuple[str, ...]]:
    """The overrides that are tried on a plan over its limit."""
    rows = cfg.batch_size * cfg.gradient_accumulation_steps
    offload = [(OFFLOAD,)] if sharding is not None and device.type != "cpu" else []
    return [("batch_size=1", f"gradient_accumulation_steps={rows}"), *SAVINGS, *offload]


def _step_shape(cfg: DictConfig, seq_len: int) -> StepShape:
    return StepShape(
        batch_size=cfg.batch_size,
        seq_len=seq_len,
        packed=is_packed(cfg.dataset),
        accumulates=cfg.gradient_accumulation_steps > 1,
        checkpointing=cfg.enable_activation_checkpointing,
    )
