"""The settings of a training run: the fields of its config, checked and parsed once."""

import logging
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import utils

from owlore_tune.config.components import check_config, check_keys, device_and_dtype, find_component
from owlore_tune.config.schema import (
    COUNT,
    LARGEST_COUNT,
    POSITIVE,
    Range,
    check_fields,
    check_type,
    config_field,
    defaults,
    required,
)
from owlore_tune.distributed.fsdp import Sharding
from owlore_tune.errors import ConfigError
from owlore_tune.files import user_path
from owlore_tune.layers.sampler import DRAWS
from owlore_tune.layers.schedule import INACTIVE_STATES
from owlore_tune.layers.scores import SCORES
from owlore_tune.optim.bases import BASIS_KINDS, SIDES
from owlore_tune.optim.moments import MOMENTS
from owlore_tune.quantized.formats import FORMATS
from owlore_tune.training.output_dir import check_creatable

log = utils.get_logger("INFO")

# Arguments that the recipe passes to components.
SUPPLIED = {
    "dataset": ("*",), "dataset_val": ("*",), "optimizer": ("*",),
    "lr_scheduler": ("*", "num_training_steps", "last_epoch"),
}  # fmt: skip
# Paths inside other fields that can change on resume. Digests of their content are compared instead.
FREE_PATHS = (
    ("checkpointer", "checkpoint_dir"), ("model", "path"), ("tokenizer", "path"), ("dataset", "data_files"),
)  # fmt: skip


def tokenizer_files(cfg: DictConfig) -> list[Path]:
    """The files that the fields of a torchtune tokenizer name."""
    texts = (value for key, value in cfg.tokenizer.items() if key != "_component_" and isinstance(value, str))
    return [path for path in map(user_path, texts) if path.is_file()]


@dataclass(frozen=True)
class TrainingConfig:
    """All fields of a training config. Those of type Any are blocks, which components are built from.

    Free fields can change on resume. Another device or a compiled model rounds differently, so the result is then no
    longer bit-identical.
    """

    model: Any
    tokenizer: Any
    checkpointer: Any
    dataset: Any
    owlore: Any
    optimizer: Any
    output_dir: str = config_field(free=True)
    dataset_val: Any = config_field(None, free=True)
    collate_fn: str = "torchtune.data.padded_collate_sft"
    # Only the product of these two must match on resume, see `TrainingData.rows_per_step`.
    batch_size: int = config_field(1, COUNT, free=True)
    gradient_accumulation_steps: int = config_field(1, COUNT, free=True)
    batch_size_val: int | None = config_field(None, COUNT, free=True)  # null: same as batch_size
    shuffle: bool = True
    seed: int = config_field(42, Range(0, 2**31))  # torchtune adds the rank, and NumPy seeds have 32 bits
    epochs: int = config_field(1, COUNT)
    max_steps_per_epoch: int | None = config_field(None, COUNT)
    lr_scheduler: Any = None  # constant
    loss: Any = config_field({"_component_": "owlore_tune.loss.LinearCrossEntropyLoss"})
    clip_grad_norm: float | None = config_field(1.0, POSITIVE)
    device: str | None = config_field(None, free=True)  # null: the best available
    device_memory_limit: float | None = config_field(None, POSITIVE, free=True)  # GB
    dtype: str = "bf16"
    compile: bool = config_field(False, free=True)
    enable_activation_checkpointing: bool = config_field(False, free=True)
    fsdp: bool | None = config_field(None, free=True)  # null: true for full weights, else false
    fsdp_cpu_offload: bool = config_field(False, free=True)  # A, bases and moments stay on the device
    fsdp_reshard_after_forward: bool = config_field(True, free=True)
    dist_timeout_s: float = config_field(600, Range(0, 10**6, without_least=True), free=True)
    metric_logger: Any = config_field(
        {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": "${output_dir}/logs"}, free=True
    )
    log_every_n_steps: int = config_field(1, COUNT, free=True)
    run_val_every_n_steps: int | None = config_field(None, COUNT, free=True)
    profiler: Any = config_field(
        {
            "_component_": "torchtune.training.setup_torch_profiler",
            "enabled": False,
            "output_dir": "${output_dir}/profiling",
        },
        free=True,
    )
    save_every_n_steps: int | None = config_field(None, COUNT, free=True)  # in addition to the end of each epoch
    keep_last_n: int | None = config_field(None, COUNT, free=True)  # null: all
    resume_from_checkpoint: bool | str = config_field(False, free=True)
    max_skipped_steps: int = config_field(10, COUNT, free=True)


REQUIRED, DEFAULTS = required(TrainingConfig), defaults(TrainingConfig)
FIXED = [each.name for each in fields(TrainingConfig) if not each.metadata.get("free")]


@dataclass(frozen=True)
class OwLoreConfig:
    """The ``owlore:`` block of a training config, checked on construction.

    Raises:
        ConfigError: if a value has the wrong type or is out of range.
    """

    num_active_layers: int | None = config_field(5, COUNT)  # γ; null for all layers
    resample_every: int = config_field(50, COUNT)  # K, optimizer steps
    score: str = config_field("outlier", choices=SCORES)
    outlier_threshold: float = config_field(13.0, Range(0, LARGEST_COUNT, without_least=True))  # τ
    calibration_batches: int = config_field(8, COUNT)
    scores_file: str | None = None
    draw: str = config_field("systematic", choices=DRAWS)
    inactive_state: str = config_field("drop", choices=INACTIVE_STATES)
    train_embeddings: bool = False
    train_output: bool = False
    train_norm: bool = False
    rank: int | None = config_field(128, COUNT)  # r; null for full rank
    update_gap: int = config_field(100, COUNT)  # optimizer steps
    scale: float = config_field(1.0, Range(0, LARGEST_COUNT))
    side: str = config_field("right", choices=SIDES)
    basis: str = config_field("randomized", choices=BASIS_KINDS)
    moments: str = config_field("keep", choices=MOMENTS)
    weights: str = "full"
    products: str = "full"

    def __post_init__(self) -> None:
        check_fields(OwLoreConfig, vars(self), "owlore.")
        if self.weights not in ("full", *FORMATS):
            raise ConfigError(f"owlore.weights={self.weights}; choose one of full, {', '.join(FORMATS)}")
        able = [kind.name for kind in FORMATS.values() if self.products in kind.products]
        if self.products != "full" and not able:
            known = {name: None for kind in FORMATS.values() for name in kind.products}
            raise ConfigError(f"owlore.products={self.products}; choose one of {', '.join(known)}")
        if self.products != "full" and self.weights not in able:
            raise ConfigError(f"owlore.products={self.products} needs owlore.weights={able[0]}, not {self.weights}")

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "OwLoreConfig":
        if not isinstance(cfg, DictConfig):
            raise ConfigError(f"owlore={cfg}; it must be a block of fields")
        check_keys(cfg, [field.name for field in fields(cls)], "owlore")
        return cls(**OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]

    def train_outside(self) -> dict[str, Any]:
        """Which parameters outside the layers train: keyword arguments of `ProjectedLayers`."""
        return {
            "train_embeddings": self.train_embeddings,
            "train_output": self.train_output,
            "train_norm": self.train_norm,
        }

    def projection(self) -> dict[str, Any]:
        """How weights are projected: keyword arguments of `ProjectedLayers`."""
        return {"rank": self.rank, "side": self.side, "scale": self.scale, "basis": self.basis}


@dataclass(frozen=True)
class TrainingSettings:
    """A checked training config with parsed values.

    Attributes:
        cfg: all fields of `TrainingConfig`. Components are built from its blocks.
        clip_grad_norm: infinity for null.
    """

    cfg: DictConfig
    owlore: OwLoreConfig
    device: torch.device
    dtype: torch.dtype
    output_dir: Path
    clip_grad_norm: float

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "TrainingSettings":
        """
        Raises:
            ConfigError: if a key is unknown or missing, or a value is invalid.
        """
        cfg = check_config(cfg, REQUIRED, DEFAULTS, SUPPLIED)
        for key in ("loss", "metric_logger"):
            if cfg[key] is None:
                raise ConfigError(f"{key}=null; the run needs one: leave the field out for the default")
        owlore = OwLoreConfig.from_config(cfg.owlore)
        cfg.owlore = OmegaConf.merge(asdict(OwLoreConfig()), cfg.owlore)
        device, dtype = device_and_dtype(cfg)
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"dtype={cfg.dtype}; choose bf16 or fp32 (fp16 gradients overflow without a scaler)")
        check_fields(TrainingConfig, cfg)
        find_component("collate_fn", cfg.collate_fn)
        if cfg.device_memory_limit is not None and owlore.draw == "bernoulli":
            raise ConfigError(
                "device_memory_limit cannot be guaranteed with owlore.draw=bernoulli, which may draw all layers"
            )
        if owlore.weights != "full" and cfg.fsdp:
            raise ConfigError(f"fsdp=true; owlore.weights={owlore.weights} cannot be sharded: leave fsdp out")
        if cfg.profiler is not None:
            check_type("profiler.enabled", cfg.profiler.get("enabled", False), bool)
        clip_grad_norm = float("inf") if cfg.clip_grad_norm is None else float(cfg.clip_grad_norm)
        return cls(cfg, owlore, device, dtype, Path(cfg.output_dir).absolute(), clip_grad_norm)

    def for_gpu(self) -> "TrainingSettings":
        """The same settings on a GPU, to plan for one on any machine."""
        return replace(self, device=torch.device("cuda"))

    def check_log_directories(self) -> None:
        """Raise ConfigError if the metric logger or the profiler could not write. They are built after weights load."""
        nodes = {"metric_logger.log_dir": self.cfg.metric_logger}
        if self.cfg.profiler is not None and self.cfg.profiler.get("enabled"):
            nodes["profiler.output_dir"] = self.cfg.profiler
        for field, node in nodes.items():
            if (key := field.rpartition(".")[2]) in node:
                check_type(field, node[key], str)
                check_creatable(field, node[key])
        if (name := self.cfg.metric_logger.get("filename")) is not None:
            check_type("metric_logger.filename", name, str)
            if Path(name).name != name or Path(self.cfg.metric_logger.get("log_dir", "."), name).is_dir():
                raise ConfigError(f"metric_logger.filename={name}; it must be the name of a file in log_dir")

    def check_launch(self, *, sharded: bool) -> None:
        """Raise ConfigError for a value that does not work on one device."""
        if not sharded and self.cfg.fsdp_cpu_offload:
            raise ConfigError(
                "fsdp_cpu_offload=true; it needs FSDP2: launch with tune run --nproc_per_node N and "
                "owlore.weights=full, or set it to false"
            )

    def warn_if_short(self, num_steps: int, num_layers: int) -> None:
        """Warn if the run ends before its learning rate is full, or before a second draw."""
        warn = partial(utils.log_rank_zero, log, level=logging.WARNING)
        warmup = (self.cfg.lr_scheduler or {}).get("num_warmup_steps", 0)
        if warmup >= num_steps:
            warn(
                f"lr_scheduler.num_warmup_steps={warmup}, and the run has {num_steps} steps, so the learning rate "
                "never reaches optimizer.lr. Lower num_warmup_steps, or train for more steps."
            )
        num_active = self.owlore.num_active_layers or num_layers
        if num_active < num_layers and num_steps <= self.owlore.resample_every:
            warn(
                f"owlore.resample_every={self.owlore.resample_every}, and the run has {num_steps} steps, so only the "
                f"first draw, {num_active} of {num_layers} layers, trains. Lower it, or train for more steps."
            )

    def shards(self) -> bool:
        """Whether a run on several devices shards the weights. Else each device has all of them."""
        return self.owlore.weights == "full" if self.cfg.fsdp is None else self.cfg.fsdp

    def sharding(self, world_size: int) -> Sharding:
        """FSDP2 settings for ``world_size`` devices."""
        offload = self.cfg.fsdp_cpu_offload and self.device.type != "cpu"  # a CPU only has host memory
        return Sharding(world_size, offload, self.cfg.fsdp_reshard_after_forward)
