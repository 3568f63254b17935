"""Fine-tune all weights of a model on one device, a few layers at a time (OwLore, arXiv 2405.18380).

tune run owlore_full_finetune --config smollm2/135M_owlore [field=value ...]
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchtune import training, utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_packed
from torchtune.datasets import ConcatDataset
from torchtune.modules import TransformerDecoder
from torchtune.recipe_interfaces import FTRecipeInterface
from torchtune.training.lr_schedulers import get_lr
from torchtune.training.metric_logging import DiskLogger, StdoutLogger, TensorBoardLogger
from tqdm import tqdm

from owlore_tune.active_layers import ActiveLayers, WeightWatch
from owlore_tune.checkpoints import HFCheckpointer, load_recipe_state, saved_optimizer_state
from owlore_tune.config import (
    ConfigError,
    DivergedError,
    OwLoreConfig,
    RunError,
    build,
    build_ours,
    build_with,
    changed_fields,
    check_attributes,
    check_config,
    check_counts,
    check_positive,
    check_type,
    device_and_dtype,
    find_component,
    parse,
    plain,
    printable,
    shared_directory,
)
from owlore_tune.data import (
    check_samples,
    collate_with_valid,
    dataset_digest,
    dataset_nodes,
    is_packed,
    longest_row,
    refuse_longer_than,
)
from owlore_tune.digests import files_digest
from owlore_tune.layers import find_layers, model_parts, plain_name
from owlore_tune.manifest import MANIFEST, machine, versions, write_json
from owlore_tune.memory import peak_memory_bytes, return_freed_memory
from owlore_tune.memory_plan import MemoryPlan, Sharding
from owlore_tune.meta import build_parts
from owlore_tune.optim import OwLoreAdamW
from owlore_tune.phases import PhaseClock
from owlore_tune.planning import check_limit, plan_run, plan_with_peers
from owlore_tune.rng import get_rng_state, set_rng_state
from owlore_tune.run_dir import RunDirectory, step_of
from owlore_tune.run_log import DRAWS, PICTURES, STEPS, RunLog
from owlore_tune.sampling import LayerSampler
from owlore_tune.scores import NEEDS_DATA, SCORES_FILE, LayerScores, layer_scores
from owlore_tune.sealed import CheckpointError
from owlore_tune.signals import Stop, stop_request
from owlore_tune.tokenizer import HFChatTokenizer
from owlore_tune.world import ALONE, RankError, is_finite, is_known_to_all, local

log = utils.get_logger("INFO")

Batch = dict[str, torch.Tensor]

LOGGER_METHODS = ("log_dict", "log_config", "close")
HOW_TO_GO_ON = "go on with the same command and resume_from_checkpoint=true"

REQUIRED = (
    "model",
    "tokenizer",
    "checkpointer",
    "dataset",
    "owlore",
    "optimizer",
    "loss",
    "output_dir",
    "metric_logger",
)
DEFAULTS: dict[str, Any] = {
    "dataset_val": None,
    "eval": None,  # a suite to run before and after
    "collate_fn": "torchtune.data.padded_collate_sft",
    "batch_size": 1,
    "batch_size_val": None,  # as batch_size
    "gradient_accumulation_steps": 1,
    "shuffle": True,
    "seed": 0,
    "epochs": 1,
    "max_steps_per_epoch": None,
    "lr_scheduler": None,
    "clip_grad_norm": None,
    "device": None,  # the best there is
    "device_memory_limit": None,  # GB
    "dtype": "bf16",
    "compile": False,
    "enable_activation_checkpointing": False,
    "log_every_n_steps": 1,
    "run_val_every_n_steps": None,
    "profiler": None,
    "save_every_n_steps": None,  # besides the end of each epoch
    "keep_last_n": None,  # all
    "resume_from_checkpoint": False,
    "max_skipped_steps": 10,
}
COUNTS = ("batch_size", "epochs", "gradient_accumulation_steps", "max_skipped_steps", "log_every_n_steps")
OPTIONAL_COUNTS = (
    "batch_size_val", "max_steps_per_epoch", "save_every_n_steps", "run_val_every_n_steps", "keep_last_n"
)  # fmt: skip
# What the recipe passes to components itself.
SUPPLIED = {
    "dataset": ("*",), "dataset_val": ("*",), "optimizer": ("*",),
    "lr_scheduler": ("*", "num_training_steps", "last_epoch"),
}  # fmt: skip
# What a run writes into its output_dir besides checkpoints; the config file is what torchtune's loggers write.
OUTPUT_FILES = (MANIFEST, STEPS, DRAWS, SCORES_FILE, "torchtune_config.yaml", *(f"{name}.png" for name in PICTURES))
# What an error in the loop is of: data, files, memory. Any other one is a bug, whose traceback is shown.
EXPECTED_ERRORS = (ValueError, OSError, RunError, CheckpointError, torch.OutOfMemoryError)
# Fields that a resumed run may change: they say where and how it runs, not what it computes. (Another device or a
# compiled model rounds differently, so the bits are no longer those of the unbroken run.)
FREE = frozenset(
    # Of these the product counts, see `_rows_per_step`. (A micro-batch makes the bases, so of another size others.)
    ("batch_size", "gradient_accumulation_steps",
     "output_dir", "device", "device_memory_limit", "compile", "enable_activation_checkpointing", "metric_logger",
     "log_every_n_steps", "run_val_every_n_steps", "dataset_val", "batch_size_val", "eval", "profiler",
     "save_every_n_steps", "keep_last_n", "resume_from_checkpoint", "max_skipped_steps")
)  # fmt: skip


class OwLoreFullFinetuneRecipe(FTRecipeInterface):
    """OwLore on one device: cuda, cpu, or whatever else torchtune finds.

    Everything that can be refused is refused before weights load. Then `setup` goes: weights, layer scores, schedule
    of active layers; `train` asks that schedule for new layers before each step.

    Full fine-tuning, LISA and GaLore are settings of the ``owlore`` and ``optimizer`` blocks; see configs/smollm2.

    A run that stopped, however it stopped, goes on with ``resume_from_checkpoint=true`` and ends with the same bits as
    one that was never stopped. A step whose loss or gradient is not finite is skipped; ``max_skipped_steps`` of them
    in a row stop the run.

    Args:
        cfg: the parsed config; its fields are those of REQUIRED and DEFAULTS.

    Raises:
        ConfigError: if a key is unknown or a value cannot work.
    """

    _model: TransformerDecoder
    _loss_fn: Any
    _optimizer: OwLoreAdamW
    _resume_dir: Path | None
    _digests: dict[str, str]  # of data, tokenizer and weights
    _world = ALONE  # the processes that train together
    defaults = DEFAULTS

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg = check_config(cfg, REQUIRED, self.defaults, SUPPLIED)
        self._owlore = OwLoreConfig.from_config(cfg.owlore)
        self._device, self._dtype = device_and_dtype(cfg)
        self._weights_device = self._device  # where they are kept between steps
        if self._dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"dtype={cfg.dtype}; choose bf16 or fp32 (fp16 gradients overflow without a scaler)")
        check_counts(cfg, COUNTS, OPTIONAL_COUNTS)
        check_type("seed", cfg.seed, int)  # a run without one could be neither repeated nor resumed
        self._clip_grad_norm = check_positive("clip_grad_norm", cfg.clip_grad_norm)
        if cfg.device_memory_limit is not None and self._owlore.draw == "bernoulli":
            raise ConfigError(
                "device_memory_limit cannot be kept with owlore.draw=bernoulli, which may draw all layers"
            )
        check_positive("device_memory_limit", cfg.device_memory_limit)
        for key in ("shuffle", "compile", "enable_activation_checkpointing"):
            check_type(key, cfg[key], bool)
        if cfg.profiler is not None:
            check_type("profiler.enabled", cfg.profiler.get("enabled", False), bool)
        check_type("resume_from_checkpoint", cfg.resume_from_checkpoint, bool | str)
        self._output_dir = Path(cfg.output_dir).absolute()
        self._run_dir = RunDirectory(self._output_dir, "training")
        self._is_rank_zero = self._world.rank == 0
        self._run_log = RunLog(self._output_dir if self._is_rank_zero else None)

        self._gradient_accumulation_steps = cfg.gradient_accumulation_steps
        self._log_every_n_steps = cfg.log_every_n_steps
        self._run_val_every_n_steps = cfg.run_val_every_n_steps
        self._save_every_n_steps = cfg.save_every_n_steps
        try:
            self.seed = training.set_seed(seed=cfg.seed)
        except ValueError as error:
            raise ConfigError(f"seed={cfg.seed}: {error}") from error
        self.total_epochs = cfg.epochs
        self.max_steps_per_epoch = cfg.max_steps_per_epoch
        self.global_step = 0
        self._skipped_steps = 0
        self._skipped_in_a_row = 0
        self._clock = PhaseClock(self._device)
        self._has_unproven_checkpoint = False
        self._is_whole = True  # weights, optimizer and counters are those after ``global_step`` steps
        self._finished = False

    def setup(self) -> None:
        cfg = self._cfg
        shared_directory(cfg.output_dir, self._world)
        self._resume_dir = self._world.share(self._world.attempt(self._find_checkpoint, first_alone=True))
        self._run_dir.run_id = self._world.share(self._run_dir.run_id)
        saved = self._load_recipe_state()
        self._setup_inputs(cfg, saved)
        parts = self._loss_fn, self._model, self._optimizer = build_parts(cfg)
        for loader in filter(None, (self._dataloader, self._val_dataloader)):
            refuse_longer_than(loader.dataset, self._model.max_seq_len)
        self._digests = self._world.share(self._world.attempt(self._make_digests, first_alone=True) or {})
        if saved is not None:
            self._check_digests(saved["digests"])
        if self._suite is not None:
            self._suite.check_model(self._tokenizer, self._model.max_seq_len)
        seq_len, sharding = self._longest_row(), self._sharding_over(self._world.size)
        self._memory_plan = plan_run(cfg, parts, seq_len, sharding)
        check_limit(cfg, self._memory_plan, seq_len, sharding)
        check_attributes("metric_logger", cfg.metric_logger, LOGGER_METHODS)
        known_scores = self._load_scores() if saved is None else LayerScores(**saved["scores"])
        self._prepare_model(cfg)
        self.load_checkpoint()
        self._scores = known_scores or self._score_layers(cfg)
        self._world.attempt(self._start_run, first_alone=True)
        self._active_layers = self._setup_active_layers()
        self._weight_watch = WeightWatch(self._model, self._world)
        if cfg.compile:  # after scoring, whose hooks would be compiled too
            training.compile_model(self._model)
            if not hasattr(self._loss_fn, "set_model_output"):  # which makes gradients inside forward
                self._loss_fn = training.compile_loss(self._loss_fn)

        num_steps = self.total_epochs * self._steps_per_epoch
        self._lr_scheduler = None
        if cfg.lr_scheduler is not None:
            self._lr_scheduler = build(
                "lr_scheduler", cfg.lr_scheduler, self._optimizer, num_training_steps=num_steps, last_epoch=-1
            )
        if saved is not None:
            self._restore(saved)
        self._run_log.start()
        self._write_manifest()
        self._profiler = training.DummyProfiler()
        if cfg.profiler is not None and cfg.profiler.get("enabled"):
            self._profiler, _ = build("profiler", cfg.profiler)

    def _find_checkpoint(self) -> Path | None:
        """The verified checkpoint to resume from; None to start from the beginning."""
        run, wanted = self._run_dir, self._cfg.resume_from_checkpoint
        run.claim()
        if not wanted and run.is_known:
            raise ConfigError(
                f"output_dir={self._output_dir} holds run {run.run_id[:8]}; choose another directory, or go on with "
                "that run by resume_from_checkpoint=true"
            )
        found = None
        try:
            if isinstance(wanted, str):
                found = Path(wanted).absolute()
                run.resume_from(found)
            elif wanted:
                found = run.newest_checkpoint()
                if found is None and run.resumed_from is not None:
                    raise CheckpointError(
                        f"{self._output_dir} has no checkpoint of its own yet; its run began with "
                        f"resume_from_checkpoint={run.resumed_from}"
                    )
        except CheckpointError as error:
            raise ConfigError(f"resume_from_checkpoint={wanted}: {error}") from error
        run.check_free(OUTPUT_FILES)
        if wanted and found is None:
            log.info(f"No checkpoint in {self._output_dir} yet; starting from the beginning.")
        return found

    def _start_run(self) -> None:
        """Write what says that the directory is this run's, before anything else is written to it."""
        self._metric_logger = build_with("metric_logger", self._cfg.metric_logger, LOGGER_METHODS)
        self._run_dir.start()
        self._scores.save(self._output_dir / SCORES_FILE)
        # The others resolve the config before they send it elsewhere.
        writes_as_it_is = isinstance(self._metric_logger, DiskLogger | StdoutLogger | TensorBoardLogger)
        self._metric_logger.log_config(self._cfg if writes_as_it_is else printable(self._cfg))

    def _make_digests(self) -> dict[str, str]:
        """Of what a resumed run must find as it was."""
        digests = {
            "dataset": dataset_digest(self._dataloader.dataset),
            "base weights (checkpointer.checkpoint_dir)": self._checkpointer.fingerprint(),
        }
        if isinstance(self._tokenizer, HFChatTokenizer):
            return digests | self._tokenizer.digests()
        path = Path(str(self._cfg.tokenizer.get("path")))
        return digests | ({"tokenizer": files_digest([path])} if path.is_file() else {})

    def _check_digests(self, saved: dict[str, str]) -> None:
        found = self._digests
        changed = [name for name in {**saved, **found} if saved.get(name) != found.get(name)]
        if changed:
            raise ConfigError(
                f"{' and '.join(changed)} changed since {self._resume_dir} was saved, so the run cannot go on exactly; "
                f"put back what it had, or {self._new_run()}"
            )

    def _new_run(self) -> str:
        return (
            f"start a new run from its weights: checkpointer.checkpoint_dir={self._resume_dir}, another output_dir, "
            "resume_from_checkpoint=false"
        )

    def _load_recipe_state(self) -> dict[str, Any] | None:
        """The saved state to resume from, if any.

        Raises:
            ConfigError: if a field that decides what the run computes has changed since.
        """
        if self._resume_dir is None:
            return None
        try:
            saved = load_recipe_state(self._resume_dir)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        fixed = {*REQUIRED, *DEFAULTS} - FREE  # what only the recipe for several devices has is as free as they are
        old, new = ({key: config.get(key) for key in fixed} for config in (saved["config"], plain(self._cfg)))
        old["rows per step"], new["rows per step"] = saved["rows_per_step"], self._rows_per_step()
        if changes := changed_fields(old, new):
            raise ConfigError(
                f"the config differs from that of {self._resume_dir}: {'; '.join(changes)}; set them back, or "
                f"{self._new_run()}"
            )
        return saved

    def _restore(self, saved: dict[str, Any]) -> None:
        """Put everything back as it was saved."""
        assert self._resume_dir is not None
        self.global_step = saved["step"]
        self._run_log.load_state_dict(saved["run_log"])
        self._skipped_steps, self._skipped_in_a_row = saved["skipped_steps"]
        self._active_layers.load_state_dict(saved["active_layers"])
        self._weight_watch.load_state_dict(saved["weight_watch"])
        self._optimizer.load_state_dict(saved_optimizer_state(self._resume_dir, saved, self._world))
        self._optimizer.refreshes = [
            (seconds, torch.tensor(energy, dtype=torch.float64)) for seconds, energy in saved["refreshes"]
        ]
        if self._lr_scheduler is not None:
            self._lr_scheduler.load_state_dict(saved["lr_scheduler"])
            for group, lr in zip(self._optimizer.param_groups, self._lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = lr
        if steps := self.global_step % self._steps_per_epoch:
            rows = steps * self._gradient_accumulation_steps * self._cfg.batch_size
            self._dataloader.sampler.load_state_dict({StatefulDistributedSampler._YIELDED: rows})
        set_rng_state(saved["rng"][self._world.rank % len(saved["rng"])])
        self._world.attempt(lambda: self._run_dir.set_aside_after(self.global_step), first_alone=True)
        log.info(f"Resumed from {self._resume_dir}, step {self.global_step}.")

    def validate(self) -> str:
        """Check what can be checked without files; says what the model is and how much of it trains at once."""
        _, model, optimizer = build_parts(self._cfg)
        layers = model_parts(model).layers
        sizes = sorted(sum(parameter.numel() for parameter in layer.values()) for layer in layers)
        num_active = self._owlore.num_active_layers or len(layers)
        total = sum(parameter.numel() for parameter in model.parameters())
        held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        at_once = held - sum(sizes[: len(layers) - num_active])
        return (
            f"{total:,} parameters, {len(layers)} layers; {num_active} of them, {at_once:,} parameters, train at once"
        )

    def score(self) -> LayerScores:
        """Score the layers of the config's model, without training."""
        self._resume_dir = None
        self._setup_inputs(self._cfg)
        self._loss_fn, self._model, self._optimizer = build_parts(self._cfg)
        self.load_checkpoint()
        return self._score_layers(self._cfg)

    def memory_plans(self, seq_len: int | None = None, world_size: int = 1, gpu: bool = False) -> dict[str, MemoryPlan]:
        """The plan of the config's run, and those of other methods on the same model and data; no weights load.

        Args:
            seq_len: tokens of the longest row; where left out, as in the config's data. If those, or the tokenizer,
                are not there yet, it is ``tokenizer.max_seq_len``.
            world_size: devices that the model is sharded over; the plan is for one of them.
            gpu: plan for GPUs, whatever device there is.
        """
        cfg, sharding = self._cfg, self._sharding_over(world_size, gpu)
        if seq_len is None:
            try:
                self._setup_inputs(cfg)
                seq_len = self._longest_row()
            except ConfigError as error:
                if (seq_len := cfg.tokenizer.get("max_seq_len")) is None:
                    raise
                log.warning(f"{error}. Planning for rows of tokenizer.max_seq_len={seq_len} tokens.")
        return plan_with_peers(cfg, build_parts(cfg), seq_len, sharding, gpu=gpu)

    def _sharding_over(self, world_size: int, gpu: bool = False) -> Sharding | None:
        if world_size > 1:
            raise ConfigError(
                f"world_size={world_size}; this recipe is for one device, owlore_full_finetune_distributed and the "
                "configs *_distributed are for several"
            )
        return None

    def _longest_row(self) -> int:
        """Tokens of the longest row of the training data; a bound where there are too many rows to look at all."""
        if is_packed(self._cfg.dataset):
            return self._tokenizer.max_seq_len
        try:
            return longest_row(self._dataloader.dataset, self._tokenizer.max_seq_len)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _setup_inputs(self, cfg: DictConfig, saved: dict[str, Any] | None = None) -> None:
        self._checkpointer = build_ours("checkpointer", cfg.checkpointer, HFCheckpointer)
        self._tokenizer = build_with("tokenizer", cfg.tokenizer, ("pad_id", "max_seq_len", "tokenize_messages"))
        if isinstance(self._tokenizer, HFChatTokenizer) and saved is not None:
            self._tokenizer.now = datetime.fromisoformat(saved["now"])
        self._dataloader = self._setup_data(cfg, "dataset", cfg.batch_size, shuffle=cfg.shuffle)
        # Whole steps alone, so that an epoch has the same number of them on any number of devices.
        self._steps_per_epoch = len(self._dataloader.dataset) // self._rows_per_step()
        if self._steps_per_epoch == 0:
            processes = f" × {self._world.size} processes" if self._world.size > 1 else ""
            raise ConfigError(
                f"dataset has {len(self._dataloader.dataset)} samples, less than one optimizer step of batch_size="
                f"{cfg.batch_size} × gradient_accumulation_steps={cfg.gradient_accumulation_steps}{processes}"
            )
        if self.max_steps_per_epoch is not None:
            self._steps_per_epoch = min(self._steps_per_epoch, self.max_steps_per_epoch)
        self._val_dataloader = None
        if cfg.dataset_val is not None:
            batch_size = cfg.batch_size_val or cfg.batch_size
            self._val_dataloader = self._setup_data(cfg, "dataset_val", batch_size, shuffle=False)
        self._suite = None
        if cfg.eval is not None:
            if not isinstance(cfg.eval, DictConfig):
                raise ConfigError(f"eval={cfg.eval}; it must be a block of fields, or null")
            from owlore_evals.suite import Suite  # the harness takes seconds to import

            if not isinstance(self._tokenizer, HFChatTokenizer):
                raise ConfigError(f"eval: needs owlore_tune.tokenizer.HFChatTokenizer, not {cfg.tokenizer._component_}")
            self._suite = Suite.from_training_config(cfg.eval)

    def _setup_data(self, cfg: DictConfig, key: str, batch_size: int, shuffle: bool) -> StatefulDataLoader:
        """The data loader of ``dataset`` or ``dataset_val``; a list of datasets is chained."""
        nodes = dataset_nodes(cfg[key])
        for node in nodes:
            check_type(f"{key}.packed", node.get("packed", False), bool)
        datasets = [build_with(key, node, ("__len__", "__getitem__"), self._tokenizer) for node in nodes]
        if len({node.get("packed", False) for node in nodes}) > 1:
            raise ConfigError(f"{key}: packed must be the same for all datasets of the list")
        dataset = datasets[0] if len(datasets) == 1 else ConcatDataset(datasets=datasets)
        if len(dataset) == 0:
            raise ConfigError(f"{key} has no samples")
        if "left_pad_sequence" in str(cfg.collate_fn):
            raise ConfigError(f"collate_fn={cfg.collate_fn} pads on the left, which is for generation")
        collate = partial(
            find_component("collate_fn", cfg.collate_fn),
            padding_idx=self._tokenizer.pad_id,
            ignore_idx=CROSS_ENTROPY_IGNORE_IDX,
        )
        collate_fn = padded_collate_packed if is_packed(cfg[key]) else collate
        try:
            check_samples(key, dataset, collate_fn, cfg.collate_fn)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return StatefulDataLoader(
            dataset=dataset,
            batch_size=batch_size,
            sampler=StatefulDistributedSampler(
                dataset, num_replicas=self._world.size, rank=self._world.rank, shuffle=shuffle, seed=self.seed
            ),
            collate_fn=collate_fn,
            drop_last=shuffle,
            generator=torch.Generator(),  # else each pass over the data would move the global one
        )

    def _prepare_model(self, cfg: DictConfig) -> None:
        """What has to be done to the model before it has weights."""
        if cfg.enable_activation_checkpointing:
            layer_types = {type(layer) for layer in find_layers(self._model)}
            training.set_activation_checkpointing(self._model, auto_wrap_policy=layer_types)

    def _load_scores(self) -> LayerScores | None:
        """The scores of ``owlore.scores_file``, if it is set and fits the model."""
        path = self._owlore.scores_file
        if path is None:
            return None
        try:
            return LayerScores.load(
                path,
                num_layers=len(find_layers(self._model)),
                fingerprint=self._checkpointer.fingerprint(),
                score=self._owlore.score,
                threshold=self._owlore.outlier_threshold,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def load_checkpoint(self) -> None:
        started = time.perf_counter()
        try:
            self._checkpointer.load_checkpoint(
                self._model,
                dtype=self._dtype,
                device=self._device,
                weights_device=self._weights_device,
                directory=self._resume_dir,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._run_log.seconds["load"] = time.perf_counter() - started

    def _score_layers(self, cfg: DictConfig) -> LayerScores:
        started = time.perf_counter()
        kind, threshold = self._owlore.score, self._owlore.outlier_threshold
        try:
            scores = layer_scores(
                self._model, kind, batches=self._calibration_batches, threshold=threshold, world=self._world
            )
        except ValueError as error:
            raise RunError(f"the layers cannot be scored: {error}") from error
        self._run_log.seconds["score"] = time.perf_counter() - started
        needs_data = kind in NEEDS_DATA
        data = {
            "dataset": plain(cfg.dataset),
            "batches": self._owlore.calibration_batches,
            "batch_size": cfg.batch_size * self._world.size,
            "seed": self.seed,
        }
        return LayerScores(
            scores=scores,
            score=kind,
            fingerprint=self._checkpointer.fingerprint(),
            threshold=threshold if needs_data else None,
            data=data if needs_data else None,
        )

    def _calibration_batches(self) -> Iterator[Batch]:
        """The first batches of the training data, in training order, as the model takes them, padding marked."""
        loader = self._dataloader
        loader.sampler.set_epoch(0)
        marked = StatefulDataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            sampler=loader.sampler,
            collate_fn=partial(collate_with_valid, loader.collate_fn),
            generator=torch.Generator(),
        )
        for batch in islice(marked, self._owlore.calibration_batches):
            del batch["labels"]
            utils.batch_to_device(batch, self._device)
            yield batch

    def _setup_active_layers(self) -> ActiveLayers:
        scores = self._scores.scores
        num_active = self._owlore.num_active_layers or len(scores)
        try:
            self._sampler = LayerSampler(scores, num_active, self._owlore.draw, self.seed)
        except ValueError as error:
            raise ConfigError(f"owlore: {error}; try another score, or a lower outlier_threshold") from error
        never = [layer for layer, score in enumerate(scores) if score == 0]
        if never:
            log.warning(f"Layers {never} have score 0 and will never be trained.")
        return ActiveLayers(
            self._model,
            self._optimizer,
            self._sampler,
            resample_every=self._owlore.resample_every,
            inactive_state=self._owlore.inactive_state,
            project_in_backward=self._owlore.project_in_backward,
            world=self._world,
        )

    def train(self) -> None:
        try:
            if self.global_step == 0:
                self._validate("before")
                self._evaluate("before")
            self._train_epochs()
            self._finish()
        except Exception as error:
            note = self._rescue(error)
            if isinstance(error, EXPECTED_ERRORS):
                raise RunError(f"{error}. {note}") from error
            print(note, file=sys.stderr)
            raise

    def _train_epochs(self) -> None:
        """Train to the last step. A signal waits for the end of a step, and for its save."""
        started = time.perf_counter()
        num_steps = self.total_epochs * self._steps_per_epoch
        progress = tqdm(
            total=num_steps, initial=self.global_step, unit="step", dynamic_ncols=True, disable=not self._is_rank_zero
        )
        with stop_request().deferred(), self._profiler, progress:
            while self.global_step < num_steps:
                self._train_epoch(num_steps, progress)
        self._run_log.add_seconds("train", time.perf_counter() - started)

    def _train_epoch(self, num_steps: int, progress: tqdm) -> None:
        """Train to the end of the epoch that ``global_step`` is in.

        Raises:
            Stop: after the step in which a signal came, once that step is saved.
        """
        epoch, steps_done = divmod(self.global_step, self._steps_per_epoch)
        self._dataloader.sampler.set_epoch(epoch)
        batches = iter(self._dataloader)
        for _ in range(steps_done, self._steps_per_epoch):
            if (active := self._active_layers.maybe_redraw(self.global_step)) is not None:
                self._on_draw(active)
            with self._clock("data"):
                micro_batches = self._next_batches(batches)
            metrics = self._train_step(micro_batches)
            self.global_step += 1
            self._run_log.add_step({"step": self.global_step, **metrics})
            self._is_whole = True
            if not self._skipped_in_a_row:
                self._prune_checkpoints()
            self._report(metrics, progress)
            self._profiler.step()
            if self._is_due(self._run_val_every_n_steps) and self.global_step < num_steps:
                self._validate(f"step {self.global_step}")
            signalled = self._signalled()
            given_up = self._skipped_in_a_row >= self._cfg.max_skipped_steps
            leaving = given_up or signalled is not None or self.global_step == num_steps
            if leaving or self._is_due(self._save_every_n_steps) or self._is_due(self._steps_per_epoch):
                self.save_checkpoint()
                signalled = signalled or self._signalled()  # one that came during the save
            if given_up:
                raise DivergedError(
                    f"{self._skipped_in_a_row} steps in a row had a loss or gradient that is not finite; lower "
                    "optimizer.lr, or set clip_grad_norm"
                )
            if signalled is not None:
                raise Stop(
                    signalled,
                    f"stopped after step {self.global_step}, saved in {self._step_dir()}. Go on with the same command "
                    "and resume_from_checkpoint=true",
                )

    def _next_batches(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of a step. A row that cannot be read on one process is an error on all of them."""
        found = self._world.attempt(lambda: list(islice(batches, self._gradient_accumulation_steps)))
        assert found is not None and len(found) == self._gradient_accumulation_steps
        return found

    def _rescue(self, error: Exception) -> str:
        """After an error, save the state after the last complete step if possible; says where the state is."""
        newest = max(self._run_dir.checkpoints(), key=step_of, default=None)
        if isinstance(error, DivergedError):
            saved = ", ".join(directory.name for directory in self._run_dir.checkpoints()) or "none"
            return f"Checkpoints in {self._output_dir}: {saved}; a new run can start from the weights of an earlier one"
        if newest is not None and step_of(newest) == self.global_step:
            return f"The state after step {self.global_step} is in {newest}: {HOW_TO_GO_ON}"
        alone = self._world.size > 1 and not is_known_to_all(error)  # the others may never come
        if self.global_step and self._is_whole and not alone:
            try:
                self.save_checkpoint()
            except (RunError, CheckpointError, OSError, RankError) as again:
                log.warning(str(again))
            else:
                return f"The state after step {self.global_step} is saved in {self._step_dir()}: {HOW_TO_GO_ON}"
        if newest is None:
            return "No checkpoint was saved before."
        return f"The newest checkpoint is {newest}: {HOW_TO_GO_ON}"

    def _signalled(self) -> Signals | None:
        """The signal that this process, or another one, was sent: all of them stop after the same step."""
        received = stop_request().signal
        if self._world.size == 1:
            return received
        number = self._world.max_(torch.tensor(received or 0, device=self._device))
        return Signals(int(number)) if number else None

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.global_step % every == 0

    def _train_step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """One optimizer step over ``micro_batches``."""
        started = time.perf_counter()
        num_refreshes = len(self._optimizer.refreshes)
        labels = [self._shift_labels(batch.pop("labels")) for batch in micro_batches]
        counts = [int((batch_labels != self._loss_fn.ignore_index).sum()) for batch_labels in labels]
        *num_trained, num_tokens = self._sums([*counts, sum(batch["tokens"].numel() for batch in micro_batches)])
        loss = torch.zeros((), device=self._device)
        for batch, batch_labels, count, all_count in zip(micro_batches, labels, counts, num_trained, strict=True):
            if all_count == 0:
                continue  # a mean over no tokens
            if count == 0:
                batch_labels[0, 0] = 0  # other processes have tokens, and wait for this one: a gradient times 0
            # The mean over all tokens of the step, whatever their split into micro-batches and over processes.
            with self._clock("forward"):
                micro_loss = self._loss_step(batch, batch_labels) * (count / sum(num_trained))
                return_freed_memory(self._device)  # or gradients come on top of what forward left free in the heap
            with self._clock("backward"):
                micro_loss.backward()
                self._optimizer.project_grads()
            loss += micro_loss.detach()
        lr = get_lr(self._optimizer)
        grad_norm = self._optimizer.clip_grad_norm_(self._clip_grad_norm).item()
        loss_value = self._world.sum_(loss).item()
        if not sum(num_trained):
            log.warning(f"Step {self.global_step}: no tokens to train on; is tokenizer.max_seq_len too short?")
        elif math.isfinite(loss_value) and math.isfinite(grad_norm):
            if self._active_layers.drawn_at == self.global_step:
                return_freed_memory(self._device)  # or so does new optimizer state
            self._is_whole = False  # until the step is counted
            with self._clock("optimizer"):
                self._optimizer.step()
            self._skipped_in_a_row = 0
        else:
            self._skip_step(loss_value)
        self._optimizer.zero_grad(set_to_none=True)
        if self._lr_scheduler is not None:
            self._lr_scheduler.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the clock below has to see the whole step
        seconds = time.perf_counter() - started
        return {
            "loss": loss_value,
            "lr": lr,
            "grad_norm": grad_norm,
            "skipped_steps": self._skipped_steps,
            "step_seconds": seconds,
            **{f"{phase}_seconds": spent for phase, spent in self._clock.read().items()},
            "refresh_seconds": sum(spent for spent, _ in self._optimizer.refreshes[num_refreshes:]),  # in backward
            "tokens_per_second": num_tokens / seconds,
            "trained_tokens_per_second": sum(num_trained) / seconds,
            "peak_memory_gb": peak_memory_bytes(self._device) / 1e9,
            "optimizer_state_gb": self._optimizer.state_bytes() / 1e9,
        }

    def _sums(self, numbers: list[int]) -> list[int]:
        """Each of ``numbers`` summed over all processes."""
        if self._world.size == 1:
            return numbers  # without a wait for the device
        return self._world.sum_(torch.tensor(numbers, device=self._device)).tolist()

    def _skip_step(self, loss: float) -> None:
        """Count and report a step without an update; bases that it was to refresh are still due."""
        self._skipped_steps += 1
        self._skipped_in_a_row += 1
        bad = {parameter for parameter, grad in self._optimizer.step_grads().items() if not grad.isfinite().all()}
        names = (plain_name(name) for name, parameter in self._model.named_parameters() if parameter in bad)
        here = {".".join(name.split(".")[:2]) for name in names}
        places = sorted(here.union(*self._world.gather(here)))
        log.warning(f"Step {self.global_step}: loss {loss}, gradients not finite in {places}; no update.")

    def _shift_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """(b, s) labels moved one to the left, so that position i predicts token i + 1 and logits need no slicing."""
        ignored = torch.full_like(labels[:, :1], self._loss_fn.ignore_index)
        return torch.cat([labels[:, 1:], ignored], dim=1)

    def _loss_step(self, batch: Batch, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss over the trained tokens of a micro-batch."""
        utils.batch_to_device(batch, self._device)
        labels = labels.to(self._device)
        outputs = self._model(**batch)  # hidden states, chunks of logits or all logits, as the loss asked for
        if torch.is_tensor(outputs) and not hasattr(self._loss_fn, "set_model_output"):
            outputs, labels = outputs.flatten(0, 1), labels.flatten()
        return self._loss_fn(outputs, labels)

    def _report(self, metrics: dict[str, float], progress: tqdm) -> None:
        progress.update()
        progress.set_postfix_str(
            f"loss {metrics['loss']:.3f}, lr {metrics['lr']:.1e}, {metrics['tokens_per_second']:.0f} tokens/s, "
            f"layers {','.join(map(str, self._active_layers.active))}"
        )
        if self.global_step % self._log_every_n_steps == 0:
            self._log_metrics(metrics)

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        if self._is_rank_zero:
            self._metric_logger.log_dict(metrics, step=self.global_step)

    def _on_draw(self, active: list[int]) -> None:
        self._close_draw()
        self._run_log.open_draw(
            {"step": self.global_step, "active": active, "trainable": self._active_layers.num_trainable()}
        )

    def _close_draw(self) -> None:
        """Add to the last draw's record what came of it, and log it."""
        if not self._run_log.draws or "changed_layers" in self._run_log.draws[-1]:
            return
        draw = self._run_log.draws[-1]
        refreshes, self._optimizer.refreshes = self._optimizer.refreshes, []
        names = self._weight_watch.changed()
        changed = {int(name.split(".")[1]) for name in names if name.startswith("layers.")}
        outcome = {
            "refresh_seconds": sum(seconds for seconds, _ in refreshes),
            "captured_energy": statistics.mean(float(e) for _, e in refreshes) if refreshes else None,
            "changed_layers": sorted(changed),
            "changed_outside_layers": sorted(name for name in names if not name.startswith("layers.")),
        }
        if unexpected := changed - set(draw["active"]):
            log.error(f"Frozen layers {sorted(unexpected)} changed since step {draw['step']}: this is a bug.")
        if idle := set(draw["active"]) - changed:
            log.warning(f"Active layers {sorted(idle)} did not change since step {draw['step']}.")
        self._run_log.close_draw(outcome)
        metrics = {
            "num_active_layers": len(draw["active"]),
            "trainable_parameters": draw["trainable"],
            "changed_layers": len(changed),
        }
        if refreshes:
            metrics["captured_energy"] = outcome["captured_energy"]
        self._log_metrics(metrics)

    @torch.no_grad()
    def _validate(self, when: str) -> None:
        """Log the mean loss over the held-out data's trained tokens."""
        if self._val_dataloader is None:
            return
        self._model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        num_here = 0
        rows_left = len(range(self._world.rank, len(self._val_dataloader.dataset), self._world.size))
        hide = not self._is_rank_zero
        batches = iter(self._val_dataloader)
        for _ in tqdm(range(len(self._val_dataloader)), desc="Validating", unit="batch", leave=False, disable=hide):
            batch = self._world.attempt(lambda: next(batches))
            assert batch is not None
            labels = self._shift_labels(batch.pop("labels"))
            labels[max(rows_left, 0) :] = self._loss_fn.ignore_index  # which other processes have as well
            rows_left -= len(labels)
            count = int((labels != self._loss_fn.ignore_index).sum())
            if not count:
                labels[0, 0] = 0  # other processes wait for this forward
            total += self._loss_step(batch, labels).double() * count
            num_here += count
        self._model.train()
        (num_trained,) = self._sums([num_here])
        if num_trained == 0:
            raise ConfigError("dataset_val has no tokens to predict; is tokenizer.max_seq_len too short?")
        loss = self._world.sum_(total).item() / num_trained
        self._run_log.losses[when] = loss
        if not math.isfinite(loss):
            self._write_manifest()
            raise DivergedError(f"the held-out loss, {when}, is {loss}: the run has diverged; lower optimizer.lr")
        log.info(f"Held-out loss, {when}: {loss:.4f} over {num_trained} tokens")
        self._log_metrics({"val_loss": loss})

    def _evaluate(self, when: str) -> None:
        """Run the suite, if there is one, on the model as it is; ``eval/step_N`` gets what owlore_eval would leave."""
        if self._suite is None:
            return
        from owlore_evals.results import save_results

        started = time.perf_counter()
        rng = get_rng_state()  # the harness seeds the global generators; training goes on as if it had not run
        lm = self._suite.build_lm(self._model, self._tokenizer)
        directory = self._output_dir / "eval" / self._step_dir().name
        number = 1
        while directory.exists():  # of an attempt that this run does not go on from
            number += 1
            directory = directory.with_name(f"{self._step_dir().name}_{number}")
        directory.mkdir(parents=True)
        results = self._suite.run(lm, directory.name, directory)
        self._model.train()
        set_rng_state(rng)
        self._run_log.evaluations[when] = results["averages"]
        self._run_log.seconds[f"eval_{when}"] = time.perf_counter() - started
        manifest = {"versions": versions(), "model": lm.get_model_info(), "step": self.global_step}
        save_results(
            directory,
            results,
            manifest,
            model=f"{self._output_dir.name}, step {self.global_step}",
            chat_template=lm.chat_template(self._suite.apply_chat_template),
            fewshot_as_multiturn=self._suite.cfg.fewshot_as_multiturn,
        )
        metrics = {f"eval/{metric.removesuffix(',none')}": value for metric, value in results["averages"].items()}
        log.info(f"Evaluation, {when}: {metrics}")
        self._log_metrics(metrics)

    def save_checkpoint(self) -> None:
        """Save step_N: weights in HF format, and beside them all that an exact resume needs.

        Raises:
            RunError: if it cannot be saved, or the weights are not finite, so that every checkpoint has finite ones.
        """
        started = time.perf_counter()
        self._check_finite_weights()
        try:
            self._checkpointer.save_checkpoint(
                self._model,
                self._step_dir(),
                self._recipe_state(),
                run_id=self._run_dir.run_id,
                world=self._world,
            )
        except CheckpointError as error:
            raise RunError(str(error)) from error
        self._has_unproven_checkpoint = True
        self._run_log.add_seconds("save", time.perf_counter() - started)
        self._write_manifest()

    def _prune_checkpoints(self) -> None:
        """Remove old checkpoints, once a finite loss has shown that the newest one's weights are good."""
        if self._has_unproven_checkpoint:
            self._has_unproven_checkpoint = False
            self._world.attempt(lambda: self._run_dir.keep_last(self._cfg.keep_last_n), first_alone=True)

    def _check_finite_weights(self) -> None:
        bad = {plain_name(name) for name, parameter in self._model.named_parameters() if not is_finite(parameter)}
        bad = bad.union(*self._world.gather(bad))
        if bad:
            raise DivergedError(
                f"weights are not finite after step {self.global_step}: {', '.join(sorted(bad)[:3])}"
                f"{', …' if len(bad) > 3 else ''}; lower optimizer.lr"
            )

    def _rows_per_step(self) -> int:
        return self._cfg.batch_size * self._gradient_accumulation_steps * self._world.size

    def _step_dir(self) -> Path:
        return self._run_dir.step_dir(self.global_step)

    def _recipe_state(self) -> dict[str, Any]:
        return {
            "step": self.global_step,
            "config": plain(self._cfg),
            "digests": self._digests,
            "now": getattr(self._tokenizer, "now", datetime.now()).isoformat(),
            "versions": versions(),
            "scores": asdict(self._scores),
            "active_layers": self._active_layers.state_dict(),
            "weight_watch": self._weight_watch.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "refreshes": [(seconds, float(energy)) for seconds, energy in self._optimizer.refreshes],
            "lr_scheduler": None if self._lr_scheduler is None else self._lr_scheduler.state_dict(),
            "rows_per_step": self._rows_per_step(),
            "rng": self._world.gather(get_rng_state()),
            "run_log": self._run_log.state_dict(),
            "skipped_steps": (self._skipped_steps, self._skipped_in_a_row),
        }

    def _finish(self) -> None:
        """What is left once the last step is saved: the final loss, the manifest, the pictures, and a summary."""
        self._close_draw()
        self._validate("after")
        if self._val_dataloader is None and self._skipped_in_a_row:
            raise DivergedError(
                f"the run ended with {self._skipped_in_a_row} steps whose loss or gradient is not finite; lower "
                "optimizer.lr"
            )
        self._prune_checkpoints()
        self._evaluate("after")
        self._finished = True
        self._write_manifest()
        if self._is_rank_zero:
            from owlore_tune.plots import plot_run

            self._print_summary(plot_run(self._output_dir))

    def _write_manifest(self) -> None:
        if not self._is_rank_zero:
            return
        try:
            write_json(self._output_dir / MANIFEST, self._manifest())
        except OSError as error:
            log.warning(f"{self._output_dir / MANIFEST} cannot be written: {error}")

    def _manifest(self) -> dict[str, Any]:
        run = self._run_log
        return {
            "versions": versions(),
            "machine": machine(self._device),
            "config": plain(self._cfg),
            "seed": self.seed,
            "steps": self.global_step,
            "finished": self._finished,
            "skipped_steps": self._skipped_steps,
            "checkpoint": self._step_dir().name if self._step_dir().is_dir() else None,
            "held_out_loss": run.losses,
            "evaluations": run.evaluations,
            "seconds": run.seconds,
            "median_step_seconds": run.median_step_seconds(),
            "tokens_per_second": run.tokens_per_second(),
            "memory_bytes": self._memory_bytes(),
            "probabilities": self._sampler.probabilities.tolist(),
            "draws": run.draws,
        }

    def _memory_bytes(self) -> dict[str, dict[str, int]]:
        """What was planned, by category, and what was measured: its most in all, and what can be told apart in it."""
        plan = self._memory_plan
        measured = {
            "weights": sum(local(tensor).nbytes for tensor in (*self._model.parameters(), *self._model.buffers())),
            "moments": self._optimizer.state_bytes("exp_avg", "exp_avg_sq"),
            "bases": self._optimizer.state_bytes("basis"),
            "total": peak_memory_bytes(self._device),
        }
        return {"planned": asdict(plan) | {"total": plan.total}, "measured": measured}

    def _print_summary(self, pictures: list[Path]) -> None:
        run = self._run_log
        losses = [f"{when} {loss:.4f}" for when, loss in run.losses.items() if when in ("before", "after")]
        accuracies = [f"{when} {e['acc,none']:.3f}" for when, e in run.evaluations.items() if "acc,none" in e]
        print(
            f"held-out loss   {', '.join(losses) or 'not measured'}\n"
            f"accuracy        {', '.join(accuracies) or 'not measured'}\n"
            f"median step     {run.median_step_seconds():.2f} s\n"
            f"throughput      {run.tokens_per_second():.0f} tokens/s\n"
            f"peak memory     {peak_memory_bytes(self._device) / 1e9:.2f} GB "
            f"(planned {self._memory_plan.total / 1e9:.2f} GB)\n"
            f"weights         {self._step_dir()}\n"
            f"manifest        {self._output_dir / MANIFEST}\n"
            f"pictures        {', '.join(picture.name for picture in pictures)} beside it"
        )

    def cleanup(self) -> None:
        if hasattr(self, "_metric_logger"):
            self._metric_logger.close()
        self._run_dir.release()


@parse
def recipe_main(cfg: DictConfig) -> None:
    """Fine-tune with OwLore; see `OwLoreFullFinetuneRecipe`."""
    if (num_ranks := int(os.environ.get("WORLD_SIZE", 1))) > 1:  # each would train alone, all in one output_dir
        raise ConfigError(
            f"{num_ranks} processes, and this recipe is for one device: for several run "
            "owlore_full_finetune_distributed, with one of the configs *_distributed"
        )
    recipe = OwLoreFullFinetuneRecipe(cfg=cfg)
    log.info(f"Running OwLoreFullFinetuneRecipe with config:\n\n{OmegaConf.to_yaml(cfg)}")
    try:
        recipe.setup()
        recipe.train()
    finally:
        recipe.cleanup()


if __name__ == "__main__":
    recipe_main()
