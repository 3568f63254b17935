"""The settings of a training run: the fields of its config, checked and parsed once."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from owlore_tune.checks import LARGEST_COUNT, check_counts, check_positive, check_type
from owlore_tune.config import check_config, check_keys, device_and_dtype
from owlore_tune.distributed.fsdp import Sharding
from owlore_tune.errors import ConfigError
from owlore_tune.layers.sampler import DRAWS
from owlore_tune.layers.schedule import INACTIVE_STATES
from owlore_tune.layers.scores import SCORES
from owlore_tune.optim.moments import MOMENTS
from owlore_tune.optim.projection import BASES, SIDES
from owlore_tune.quantized.formats import FORMATS
from owlore_tune.quantized.linear import PRODUCTS
from owlore_tune.run.directory import check_creatable

REQUIRED = (
    "model", "tokenizer", "checkpointer", "dataset", "owlore", "optimizer", "output_dir"
)  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "dataset_val": None,
    "collate_fn": "torchtune.data.padded_collate_sft",
    "batch_size": 1,
    "batch_size_val": None,  # same as batch_size
    "gradient_accumulation_steps": 1,
    "shuffle": True,
    "seed": 42,
    "epochs": 1,
    "max_steps_per_epoch": None,
    "lr_scheduler": None,  # constant
    "loss": {"_component_": "owlore_tune.loss.LinearCrossEntropyLoss"},
    "clip_grad_norm": 1.0,
    "device": None,  # the best available
    "device_memory_limit": None,  # GB
    "dtype": "bf16",
    "compile": False,
    "enable_activation_checkpointing": False,
    "fsdp": None,  # on several devices: true for full weights, else false (every device has all weights)
    "fsdp_cpu_offload": False,  # weights in host memory; what trains in the projected form stays on the device
    "fsdp_reshard_after_forward": True,
    "dist_timeout_s": 600,
    "metric_logger": {
        "_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": "${output_dir}/logs"
    },
    "log_every_n_steps": 1,
    "run_val_every_n_steps": None,
    "profiler": {
        "_component_": "torchtune.training.setup_torch_profiler", "enabled": False,
        "output_dir": "${output_dir}/profiling",
    },
    "save_every_n_steps": None,  # in addition to the end of each epoch
    "keep_last_n": None,  # all
    "resume_from_checkpoint": False,
    "max_skipped_steps": 10,
}  # fmt: skip
COUNTS = ("batch_size", "epochs", "gradient_accumulation_steps", "max_skipped_steps", "log_every_n_steps")
OPTIONAL_COUNTS = (
    "batch_size_val", "max_steps_per_epoch", "save_every_n_steps", "run_val_every_n_steps", "keep_last_n"
)  # fmt: skip
LARGEST_SEED = 2**31  # torchtune adds the rank, and NumPy seeds have 32 bits
SWITCHES = ("shuffle", "compile", "enable_activation_checkpointing", "fsdp_cpu_offload", "fsdp_reshard_after_forward")
# Arguments that the recipe passes to components.
SUPPLIED = {
    "dataset": ("*",), "dataset_val": ("*",), "optimizer": ("*",),
    "lr_scheduler": ("*", "num_training_steps", "last_epoch"),
}  # fmt: skip
# Fields that can change on resume. They affect where and how a run executes, not what it computes. Another device or a
# compiled model rounds differently, so the result is then no longer bit-identical.
FREE = frozenset(
    (
        "batch_size", "gradient_accumulation_steps",  # only their product must match, see `TrainingData.rows_per_step`
        "output_dir", "device", "device_memory_limit", "compile", "enable_activation_checkpointing",
        "fsdp", "fsdp_cpu_offload", "fsdp_reshard_after_forward", "dist_timeout_s", "metric_logger",
        "log_every_n_steps", "run_val_every_n_steps", "dataset_val", "batch_size_val", "profiler",
        "save_every_n_steps", "keep_last_n", "resume_from_checkpoint", "max_skipped_steps",
    )
)  # fmt: skip
# Paths inside other fields that can change too. Digests of their content are compared instead.
FREE_PATHS = (
    ("checkpointer", "checkpoint_dir"), ("model", "path"), ("tokenizer", "path"), ("dataset", "data_files"),
)  # fmt: skip


@dataclass(frozen=True)
class OwLoreConfig:
    """The ``owlore:`` block of a training config, checked on construction.

    Raises:
        ConfigError: if a value has the wrong type or is out of range.
    """

    num_active_layers: int | None = 5  # γ; null for all layers
    resample_every: int = 50  # K, optimizer steps
    score: str = "outlier"
    outlier_threshold: float = 13.0  # τ
    calibration_batches: int = 8
    scores_file: str | None = None
    draw: str = "systematic"
    inactive_state: str = "drop"
    train_embeddings: bool = False
    train_output: bool = False
    train_norm: bool = False
    rank: int | None = 128  # r; null for full rank
    update_gap: int = 100  # optimizer steps
    scale: float = 1.0
    side: str = "right"
    basis: str = "randomized"
    moments: str = "keep"
    weights: str = "full"
    products: str = "full"

    def __post_init__(self) -> None:
        for field in fields(self):
            check_type(f"owlore.{field.name}", getattr(self, field.name), field.type)
        choices_of = {
            "score": SCORES, "draw": DRAWS, "inactive_state": INACTIVE_STATES,
            "side": SIDES, "basis": BASES, "moments": MOMENTS, "weights": ("full", *FORMATS), "products": PRODUCTS,
        }  # fmt: skip
        for key, choices in choices_of.items():
            if getattr(self, key) not in choices:
                raise ConfigError(f"owlore.{key}={getattr(self, key)}; choose one of {', '.join(choices)}")
        counts = ("num_active_layers", "resample_every", "calibration_batches", "rank", "update_gap")
        for key in (*counts, "outlier_threshold"):
            value = getattr(self, key)
            if value is not None and not 0 < value <= LARGEST_COUNT:
                raise ConfigError(f"owlore.{key}={value}; it must be above 0, and at most {LARGEST_COUNT:,}")
        if not 0 <= self.scale < float("inf"):
            raise ConfigError(f"owlore.scale={self.scale}; it must be a finite number >= 0")
        if self.products == "int8" and self.weights != "int8":
            raise ConfigError(f"owlore.products=int8 needs owlore.weights=int8, not {self.weights}")

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
        cfg: all fields of REQUIRED and DEFAULTS. Components are built from its blocks.
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
        check_counts(cfg, COUNTS, OPTIONAL_COUNTS)
        check_type("seed", cfg.seed, int)  # without a seed, a run cannot be repeated or resumed
        if not 0 <= cfg.seed <= LARGEST_SEED:
            raise ConfigError(f"seed={cfg.seed}; it must be 0 to {LARGEST_SEED:,}")
        check_positive("device_memory_limit", cfg.device_memory_limit)
        if cfg.device_memory_limit is not None and owlore.draw == "bernoulli":
            raise ConfigError(
                "device_memory_limit cannot be guaranteed with owlore.draw=bernoulli, which may draw all layers"
            )
        for key in SWITCHES:
            check_type(key, cfg[key], bool)
        check_type("dist_timeout_s", cfg.dist_timeout_s, float)
        check_positive("dist_timeout_s", cfg.dist_timeout_s)
        check_type("fsdp", cfg.fsdp, bool | None)
        if owlore.weights != "full" and cfg.fsdp:
            raise ConfigError(f"fsdp=true; owlore.weights={owlore.weights} cannot be sharded: leave fsdp out")
        if cfg.profiler is not None:
            check_type("profiler.enabled", cfg.profiler.get("enabled", False), bool)
        check_type("resume_from_checkpoint", cfg.resume_from_checkpoint, bool | str)
        clip_grad_norm = check_positive("clip_grad_norm", cfg.clip_grad_norm)
        return cls(cfg, owlore, device, dtype, Path(cfg.output_dir).absolute(), clip_grad_norm)

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
        """Raise ConfigError for a value that does not work on one device, or with a sharded model."""
        if not sharded and self.cfg.fsdp_cpu_offload:
            raise ConfigError(
                "fsdp_cpu_offload=true; it needs FSDP2: launch with tune run --nproc_per_node N and "
                "owlore.weights=full, or set it to false"
            )

    def shards(self) -> bool:
        """Whether a run on several devices shards the weights. Else each device has all of them."""
        return self.owlore.weights == "full" if self.cfg.fsdp is None else self.cfg.fsdp

    def sharding(self, world_size: int, *, gpu: bool = False) -> Sharding:
        """FSDP2 settings for ``world_size`` devices; for GPUs if ``gpu``, even on a machine without one."""
        offload = self.cfg.fsdp_cpu_offload and (gpu or self.device.type != "cpu")  # a CPU only has host memory
        return Sharding(world_size, offload, self.cfg.fsdp_reshard_after_forward)
