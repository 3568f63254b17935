"""The memory plan of a run, its check against the limit, and the settings that fit a card."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from omegaconf import DictConfig
from torchtune.utils import get_logger
from tqdm import tqdm

from owlore_tune.config.load import override
from owlore_tune.distributed.fsdp import Sharding
from owlore_tune.errors import ConfigError
from owlore_tune.measure import free_bytes
from owlore_tune.memory.peers import peer_plans
from owlore_tune.memory.plan import MemoryPlan, Method, plan_memory, state_per_value
from owlore_tune.memory.step import StepShape
from owlore_tune.quantized.formats import FORMATS
from owlore_tune.training.components import (
    Inputs,
    TrainedModel,
    attends_by_sample,
    build_inputs,
    build_optimizer,
    build_trained_model,
    is_packed,
    row_length,
)
from owlore_tune.training.config import TrainingSettings

# The last overrides to try if a plan exceeds device_memory_limit, see `savings`
SAVINGS = (
    ("owlore.train_embeddings=false", "owlore.train_output=false"),
    ("owlore.inactive_state=drop",),
    ("owlore.num_active_layers=2",),
    ("owlore.rank=128",),
    ("dtype=bf16",),
)
OFFLOAD = "fsdp_cpu_offload=true"
FREE_SHARE = 0.9  # of a card's memory; the rest is for the CUDA context and fragmentation

log = get_logger("INFO")


def plan_run(
    settings: TrainingSettings,
    seq_len: int,
    sharding: Sharding | None = None,
    framework: int | None = None,
    *,
    trained: TrainedModel | None = None,
) -> MemoryPlan:
    """The plan of a run on the device of ``settings``; see `TrainingSettings.for_gpu`.

    Args:
        seq_len: tokens of the longest row.
        sharding: plan for one of several devices.
        framework: bytes; the current `owlore_tune.memory.plan.framework_bytes` if omitted.
        trained: that of ``settings``, without weights; built if omitted.

    Raises:
        ConfigError: if the model does not take rows of ``seq_len`` tokens, or its parts are incompatible.
    """
    trained = build_trained_model(settings) if trained is None else trained
    if seq_len > trained.model.max_seq_len:
        raise ConfigError(
            f"rows can have {seq_len} tokens, and the model takes {trained.model.max_seq_len}; set "
            "tokenizer.max_seq_len"
        )
    owlore = settings.owlore
    offloads_state = owlore.inactive_state == "offload" and settings.device.type != "cpu"
    try:
        state = partial(state_per_value, partial(build_optimizer, settings), owlore.moments)
        per_value, per_16_bits = state(), state(torch.bfloat16)
    except Exception as error:  # of any optimizer
        raise ConfigError(
            f"optimizer._component_={settings.cfg.optimizer._component_} cannot be used: {error}"
        ) from error
    method = Method(
        {**owlore.projection(), **owlore.train_outside()},
        owlore.num_active_layers,
        per_value,
        per_16_bits,
        holds_all_state=owlore.inactive_state != "drop" and not offloads_state,
    )
    shape = _step_shape(settings.cfg, seq_len)
    has_masks = shape.packed and not attends_by_sample(settings)
    return plan_memory(
        trained.model,
        trained.loss_fn,
        method,
        replace(shape, packed=has_masks, weights=owlore.weights, products=owlore.products),
        device=settings.device,
        framework=framework,
        sharding=sharding,
    )


def seq_len_to_plan(settings: TrainingSettings, seq_len: int | None) -> int:
    """Tokens of the longest row: ``seq_len``, or read from the config's data if omitted.

    If data or tokenizer do not exist yet, it is ``tokenizer.max_seq_len``.
    """
    if seq_len is not None:
        return seq_len
    try:
        return row_length(settings, build_inputs(settings))
    except ConfigError as error:
        most = settings.cfg.tokenizer.get("max_seq_len")
        if type(most) is not int or most < 1:
            raise
        log.warning(f"{error}. Planning for rows of tokenizer.max_seq_len={most} tokens.")
        return most


def plans_of_config(
    settings: TrainingSettings, seq_len: int | None = None, world_size: int = 1
) -> dict[str, MemoryPlan]:
    """The plan of the config's run as ``this config``, and those of other methods on the same model and data.

    Args:
        seq_len: see `seq_len_to_plan`.
        world_size: devices that the model is sharded over. The plan is for one of them.
    """
    seq_len = seq_len_to_plan(settings, seq_len)
    sharding = settings.sharding(world_size) if world_size > 1 and settings.shards() else None
    trained = build_trained_model(settings)
    own = plan_run(settings, seq_len, sharding, trained=trained)
    peers = peer_plans(
        trained.model,
        trained.loss_fn,
        _step_shape(settings.cfg, seq_len),
        device=settings.device,
        rank=settings.owlore.rank or 128,
        framework=own.framework,
        train_outside=settings.owlore.train_outside(),
        sharding=sharding,
    )
    return {"this config": own} | dict(tqdm(peers, desc="Planning other methods", unit="method", leave=False))


def checked_plan(
    settings: TrainingSettings, inputs: Inputs, trained: TrainedModel, sharding: Sharding | None = None
) -> MemoryPlan:
    """The plan of a run for its longest row.

    Raises:
        ConfigError: if it exceeds ``device_memory_limit``, or without one the free memory of a GPU, or if the parts are
            incompatible.
    """
    seq_len = row_length(settings, inputs)
    plan = plan_run(settings, seq_len, sharding, trained=trained)
    check_limit(settings, plan, seq_len, sharding)
    return plan


def check_limit(settings: TrainingSettings, plan: MemoryPlan, seq_len: int, sharding: Sharding | None) -> None:
    """Raise ConfigError, naming settings that would fit, if ``plan`` exceeds the limit, see `checked_plan`."""
    cfg = settings.cfg
    if cfg.device_memory_limit is None:
        free = free_bytes(settings.device)
        limit = math.inf if free is None else free
        source = f"the device has {limit / 1e9:.1f} GB free, without the CUDA context"
    else:
        limit = 1e9 * float(cfg.device_memory_limit)
        source = f"device_memory_limit={cfg.device_memory_limit} GB"
    if plan.total <= limit:
        return

    def planned_with(overrides: Sequence[str]) -> float:
        """Bytes of the plan with ``overrides``; infinite if they are invalid."""
        devices = sharding and replace(sharding, cpu_offload=sharding.cpu_offload or OFFLOAD in overrides)
        try:
            other = TrainingSettings.from_config(override(cfg, overrides))
            return plan_run(other, seq_len, devices, plan.framework).total
        except ConfigError:
            return math.inf

    together: dict[str, str] = {}  # the last override of each field
    found: list[str] = []
    for overrides in savings(settings, sharding):
        saved = planned_with(overrides)
        if saved < plan.total:
            together |= {text.partition("=")[0]: text for text in overrides}
        if saved <= limit:
            found.append(" ".join(overrides))
    if not found and planned_with(list(together.values())) <= limit:
        found.append(" ".join(together.values()))
    way_out = f"it fits with {', or with '.join(found)}" if found else "none of the settings tried makes it fit"
    raise ConfigError(f"{source}, and the plan is {plan.total / 1e9:.2f} GB; {way_out}")


def format_overrides(name: str) -> tuple[str, str]:
    """The overrides of a format, with its fastest products; those of full precision for ``full``."""
    products = FORMATS[name].products[-1] if name in FORMATS else "full"
    return f"owlore.weights={name}", f"owlore.products={products}"


def savings(settings: TrainingSettings, sharding: Sharding | None) -> list[tuple[str, ...]]:
    """The overrides to try if a plan exceeds its limit: first each one, then all helpful ones together."""
    rows = settings.cfg.batch_size * settings.cfg.gradient_accumulation_steps
    eight_bits = (
        "optimizer=torchao.optim.AdamW8bit",
        *(["~optimizer.fused"] if "fused" in settings.cfg.optimizer else []),
    )
    offload = [(OFFLOAD,)] if sharding is not None and settings.device.type != "cpu" else []
    return [
        ("batch_size=1", f"gradient_accumulation_steps={rows}"),
        eight_bits,
        ("enable_activation_checkpointing=true",),
        *(map(format_overrides, FORMATS) if sharding is None else []),
        *SAVINGS,
        *offload,
    ]


def _step_shape(cfg: DictConfig, seq_len: int) -> StepShape:
    return StepShape(
        batch_size=cfg.batch_size,
        seq_len=seq_len,
        packed=is_packed(cfg.dataset),
        accumulates=cfg.gradient_accumulation_steps > 1,
        checkpointing=cfg.enable_activation_checkpointing,
        validates=cfg.dataset_val is not None,
    )


def settings_that_fit(cfg: DictConfig, seq_len: int, card_bytes: float) -> tuple[list[str], MemoryPlan]:
    """The overrides, with the same rows per optimizer step, of the largest plan that leaves a tenth of a card free.

    More memory mostly means a faster step: larger batches, and activations that are kept.

    Raises:
        ConfigError: if nothing fits.
    """
    settings = TrainingSettings.from_config(cfg)
    rows = settings.cfg.batch_size * settings.cfg.gradient_accumulation_steps
    kinds = ("full",) if settings.cfg.fsdp else ("full", *FORMATS)  # FSDP2 does not shard quantized weights
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]

    @cache
    def plan_of(overrides: tuple[str, ...]) -> MemoryPlan:
        return plan_run(TrainingSettings.from_config(override(cfg, overrides)).for_gpu(), seq_len)

    def step_of(size: int, kind: str, recomputes: bool) -> tuple[str, ...]:
        return (
            f"batch_size={size}",
            f"gradient_accumulation_steps={rows // size}",
            f"enable_activation_checkpointing={str(recomputes).lower()}",
            *format_overrides(kind),
        )

    fitting: list[tuple[str, ...]] = []
    for kind, recomputes in tqdm(list(itertools.product(kinds, (False, True))), desc="Planning", leave=False):
        for size in sizes:  # a larger one takes more
            if plan_of(overrides := step_of(size, kind, recomputes)).total > FREE_SHARE * card_bytes:
                break
            fitting.append(overrides)
    if fitting:
        best = max(fitting, key=lambda overrides: plan_of(overrides).total)
        return list(best), plan_of(best)
    least = min((step_of(1, kind, True) for kind in kinds), key=lambda overrides: plan_of(overrides).total)
    plan = plan_of(least)
    rest = "Set a smaller owlore.num_active_layers or tokenizer.max_seq_len"
    if plan.weights > FREE_SHARE * card_bytes:
        rest = f"Its weights alone take {plan.weights / 1e9:.1f} GB"
    raise ConfigError(
        f"nothing fits {card_bytes / 1e9:g} GB with a tenth free; the smallest plan is {plan.total / 1e9:.1f} GB, "
        f"with {' '.join(least)}. {rest}"
    )
