"""The components of a run, built from its config and checked against each other before any weights load."""

import inspect
import math
import os
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, ListConfig
from torch import nn
from torchtune import training
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.datasets import ConcatDataset
from torchtune.utils import get_logger

from owlore_tune.checkpoints.hf_weights import HFCheckpointer
from owlore_tune.config.components import build, check_attributes, find_component
from owlore_tune.config.schema import check_type, plain
from owlore_tune.data.checks import check_labels, check_samples, fit_to_model, longest_row
from owlore_tune.data.loader import Collate, HeldOutData, TrainingData, collate_packed
from owlore_tune.data.tokenizer import HFChatTokenizer, check_vocabulary
from owlore_tune.distributed.fsdp import Sharding, shard_model
from owlore_tune.distributed.world import ALONE, World
from owlore_tune.errors import ConfigError
from owlore_tune.layers.grouped import group_experts
from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.layers.sampler import LayerSampler
from owlore_tune.layers.schedule import Schedule
from owlore_tune.models.attention import attend_by_sample
from owlore_tune.models.decoder import Decoder, find_layers, model_parts
from owlore_tune.models.fused import fuse_parts
from owlore_tune.models.output import set_output, takes_hidden_states
from owlore_tune.optim.moments import check_optimizer
from owlore_tune.training.config import TrainingSettings, tokenizer_files

LOGGER_METHODS = ("log_dict", "log_config", "close")
LOGGER_PACKAGES = {
    "CometLogger": "comet_ml", "MLFlowLogger": "mlflow", "TensorBoardLogger": "tensorboard", "WandBLogger": "wandb",
}  # fmt: skip
MOST_TOKENS = 2**24  # of a row: positions have a cache of this length
RECOMPILE_LIMIT = 32  # graphs that all compiled layers share
SCHEDULER_METHODS = ("step", "get_last_lr", "state_dict", "load_state_dict")

log = get_logger("INFO")


class Inputs(NamedTuple):
    """The inputs of a run."""

    checkpointer: HFCheckpointer
    tokenizer: Any  # a torchtune ModelTokenizer
    data: TrainingData
    held_out: HeldOutData | None


def build_inputs(settings: TrainingSettings, world: World = ALONE, now: datetime | None = None) -> Inputs:
    """
    Args:
        now: date for chat templates that print one. For a resumed run, pass the date of its first start.

    Raises:
        ConfigError: if a file is missing or its content cannot be used.
    """
    cfg = settings.cfg
    checkpointer = build("checkpointer", cfg.checkpointer, kind=HFCheckpointer)
    tokenizer = build("tokenizer", cfg.tokenizer, attributes=("pad_id", "max_seq_len", "tokenize_messages"))
    if isinstance(tokenizer, HFChatTokenizer):
        tokenizer.now = now or tokenizer.now
        checkpointer.take_tokenizer(tokenizer.directory)
    else:
        if files := tokenizer_files(cfg):
            checkpointer.take_tokenizer(files[0], files[1:])
    dataset, collate = _build_dataset(cfg, "dataset", tokenizer)
    try:
        data = TrainingData(
            dataset,
            collate,
            batch_size=cfg.batch_size,
            gradient_accumulation_steps=cfg.gradient_accumulation_steps,
            shuffle=cfg.shuffle,
            seed=cfg.seed,
            epochs=cfg.epochs,
            max_steps_per_epoch=cfg.max_steps_per_epoch,
            world=world,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    held_out = None
    if cfg.dataset_val is not None:
        dataset_val, collate = _build_dataset(cfg, "dataset_val", tokenizer)
        batch_size = cfg.batch_size_val or cfg.batch_size
        held_out = HeldOutData(dataset_val, collate, batch_size=batch_size, seed=cfg.seed, world=world)
    return Inputs(checkpointer, tokenizer, data, held_out)


def _build_dataset(cfg: DictConfig, key: str, tokenizer: Any) -> tuple[Any, Collate]:
    """The dataset under ``key`` and its collate function. A list of datasets is concatenated."""
    nodes = dataset_nodes(cfg[key])
    for node in nodes:
        check_type(f"{key}.packed", node.get("packed", False), bool)
    datasets = [build(key, node, tokenizer, attributes=("__len__", "__getitem__")) for node in nodes]
    if len({node.get("packed", False) for node in nodes}) > 1:
        raise ConfigError(f"{key}: packed must be the same for all datasets of the list")
    dataset = datasets[0] if len(datasets) == 1 else ConcatDataset(datasets=datasets)
    if len(dataset) == 0:
        raise ConfigError(f"{key} has no samples")
    if "left_pad_sequence" in str(cfg.collate_fn):
        raise ConfigError(f"collate_fn={cfg.collate_fn} pads on the left, which is for generation")
    padded = partial(
        find_component("collate_fn", cfg.collate_fn), padding_idx=tokenizer.pad_id, ignore_idx=CROSS_ENTROPY_IGNORE_IDX
    )
    collate = collate_packed if is_packed(cfg[key]) else padded
    try:
        check_samples(key, dataset, collate, cfg.collate_fn)
        check_labels(key, dataset, tokenizer.max_seq_len)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return dataset, collate


def dataset_nodes(node: DictConfig | ListConfig) -> list[DictConfig]:
    """The datasets in a config's ``dataset``, which is one dataset or a list."""
    return list(node) if isinstance(node, ListConfig) else [node]


def is_packed(node: DictConfig | ListConfig) -> bool:
    """Whether a config's ``dataset`` packs its rows. All datasets of a list have the same setting."""
    return dataset_nodes(node)[0].get("packed", False)


def row_length(settings: TrainingSettings, inputs: Inputs) -> int:
    """Tokens of the longest training row; an estimate if there are too many rows, see `longest_row`."""
    max_seq_len = inputs.tokenizer.max_seq_len
    try:
        if inputs.held_out is not None:
            longest_row(inputs.held_out.dataset, max_seq_len)  # so that a row that cannot be used raises now
        return max_seq_len if is_packed(settings.cfg.dataset) else longest_row(inputs.data.dataset, max_seq_len)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_model(inputs: Inputs, model: Decoder) -> None:
    """Check that a model, without weights, fits the inputs. Rows that are too long for it raise when they are read.

    Raises:
        ConfigError: if weights or vocabulary do not fit.
    """
    inputs.checkpointer.check_model(model)
    check_vocabulary(inputs.tokenizer, model)
    for data in (inputs.data, inputs.held_out):
        if data is not None:
            fit_to_model(data.dataset, inputs.tokenizer, model)


class TrainedModel(NamedTuple):
    """A model without weights, and what trains it."""

    loss_fn: Any
    model: Decoder
    layers: ProjectedLayers
    optimizer: torch.optim.Optimizer


def build_trained_model(settings: TrainingSettings, world: World = ALONE) -> TrainedModel:
    """Loss, model on the meta device, its layers in the projected form, and the optimizer.

    Raises:
        ConfigError: if one cannot be built, or they are incompatible.
    """
    loss_fn, model = build_model(settings)
    return TrainedModel(loss_fn, model, *build_trained(settings, model, world))


def build_model(settings: TrainingSettings) -> tuple[Any, Decoder]:
    """The loss, and the model on the meta device, configured for the output that the loss takes.

    Returns:
        loss_fn: a loss of torchtune, of this package, or of torch. They take different model outputs.
        model: without weights.

    Raises:
        ConfigError: if one cannot be built, they are incompatible, or γ exceeds the number of layers.
    """
    loss_fn = _build_loss(settings.cfg)
    chunks = getattr(loss_fn, "num_output_chunks", 1)
    if type(chunks) is not int or chunks < 1:
        raise ConfigError(f"loss.num_output_chunks={chunks}; it must be a whole number of at least 1")
    with training.set_default_dtype(settings.dtype), torch.device("meta"):
        model = build("model", settings.cfg.model)
    try:
        num_layers = len(find_layers(model))
    except TypeError as error:
        raise ConfigError(str(error)) from error
    if type(model.max_seq_len) is not int or not 1 <= model.max_seq_len <= MOST_TOKENS:
        raise ConfigError(f"model.max_seq_len={model.max_seq_len}; it must be 1 to {MOST_TOKENS:,}")
    if (num_active := settings.owlore.num_active_layers) is not None and num_active > num_layers:
        raise ConfigError(f"owlore.num_active_layers={num_active}; the model has {num_layers} layers")
    set_output(model, loss_fn)
    return loss_fn, model


def _build_loss(cfg: DictConfig) -> Any:
    loss_fn = build("loss", cfg.loss, attributes=("ignore_index",))
    try:
        inspect.signature(loss_fn.forward).bind(None, None)
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"loss._component_={cfg.loss._component_} must take outputs and labels: {error}") from error
    if loss_fn.ignore_index != CROSS_ENTROPY_IGNORE_IDX:
        raise ConfigError(
            f"loss.ignore_index={loss_fn.ignore_index}; torchtune's datasets mark ignored tokens "
            f"with {CROSS_ENTROPY_IGNORE_IDX}"
        )
    return loss_fn


def build_trained(
    settings: TrainingSettings, model: Decoder, world: World
) -> tuple[ProjectedLayers, torch.optim.Optimizer]:
    """The layers of ``model`` in the projected form, and the optimizer over all parameters that train.

    Raises:
        ConfigError: if one cannot be built.
    """
    owlore, cfg = settings.owlore, settings.cfg
    if owlore.train_output and not owlore.train_embeddings and not model_parts(model).output:
        raise ConfigError(
            "owlore.train_output=true trains nothing, because the model's head is its embeddings; set "
            "owlore.train_embeddings=true to train both, or owlore.train_output=false"
        )
    try:
        layers = ProjectedLayers(model, **owlore.projection(), **owlore.train_outside(), seed=cfg.seed, world=world)
    except ValueError as error:
        raise ConfigError(f"owlore.{error}") from error
    return layers, build_optimizer(settings, layers.parameter_groups())


def build_optimizer(settings: TrainingSettings, groups: list[Any]) -> torch.optim.Optimizer:
    """The config's optimizer over parameter groups.

    Raises:
        ConfigError: if it cannot be built, needs a closure, or cannot train A.
    """
    node = settings.cfg.optimizer
    for key, value in node.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (key == "lr" and not is_number) or (is_number and not math.isfinite(value)):
            raise ConfigError(f"optimizer.{key}={value!r}; it must be a finite number")
    optimizer = build("optimizer", node, groups, kind=torch.optim.Optimizer)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(f"optimizer._component_={node._component_} needs a closure, which the recipe does not have")
    try:
        check_optimizer(optimizer)
    except ValueError as error:
        raise ConfigError(f"optimizer: {error}") from error
    return optimizer


def prepare(settings: TrainingSettings, trained: TrainedModel, sharding: Sharding | None, world: World) -> TrainedModel:
    """Let the layers of a model without weights compute as the config and the device want, and shard it with FSDP2."""
    model = trained.model
    if attends_by_sample(settings):
        attend_by_sample(model)
    fuse_parts(model, settings.device)
    if settings.device.type == "cuda" and settings.dtype != torch.float32:
        torch.set_float32_matmul_precision("high")  # only thin products are in float32
    if settings.cfg.enable_activation_checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={type(layer) for layer in find_layers(model)})
    if sharding is None:
        return trained
    shard_model(model, settings.device, sharding)  # which replaces the parameters
    layers, optimizer = build_trained(settings, model, world)
    return trained._replace(layers=layers, optimizer=optimizer)


def attends_by_sample(settings: TrainingSettings) -> bool:
    """Whether attention over packed rows needs no mask, see `attend_by_sample`."""
    return settings.device.type == "cpu" and not settings.cfg.compile


def finish_model(
    settings: TrainingSettings, loss_fn: Any, model: Decoder, layers: ProjectedLayers, sharding: Sharding | None
) -> Any:
    """Let a model with weights compute as fast as the device and the config want; returns the loss to use.

    Call it after scoring, because it would compile the hooks of scoring too.
    """
    group_experts(model, settings.device, sharded=sharding is not None)
    return compile_parts(loss_fn, model, layers) if settings.cfg.compile else loss_fn


def compile_parts(loss_fn: Any, model: Decoder, layers: ProjectedLayers) -> Any:
    """Compile ``model``, layer by layer, in place; returns the loss, compiled if possible.

    All layers share their graphs. There is one for each kind of layer and pass: trained or frozen, with or without a
    gradient to its input, and without any gradients in validation. A draw compiles nothing once each kind exists. A
    layer whose bases are not made yet runs as it is, because its backward makes them.
    """
    # Kinds times row lengths (one, then any) times batch sizes can exceed torch's limit of 8. Beyond the limit, layers
    # would run uncompiled without an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    backend = os.environ.get("TORCH_COMPILE_BACKEND", "inductor")  # as torchtune's parts
    for index, layer in enumerate(find_layers(model)):
        inner: nn.Module = getattr(layer, "_checkpoint_wrapped_module", layer)
        inner.forward = partial(  # type: ignore[method-assign]
            _compiled_or_not, inner.forward, torch.compile(inner.forward, backend=backend), layers, index
        )
    # A loss that takes the model's head computes gradients inside forward.
    return loss_fn if takes_hidden_states(loss_fn) else training.compile_loss(loss_fn)


def _compiled_or_not(
    plain_forward: Any, compiled: Any, layers: ProjectedLayers, index: int, *args: Any, **kwargs: Any
) -> Any:
    forward = plain_forward if layers.lacks_basis(index) else compiled
    return forward(*args, **kwargs)


def build_profiler(settings: TrainingSettings) -> Any:
    """The config's profiler; a dummy if it is not enabled."""
    node = settings.cfg.profiler
    if node is None or not node.get("enabled"):
        return training.DummyProfiler()
    return build("profiler", node)[0]


def build_lr_scheduler(settings: TrainingSettings, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    """The learning rate schedule over ``num_steps`` optimizer steps; None for a constant rate.

    Raises:
        ConfigError: if it cannot be built, or gives a rate that is negative or not finite.
    """
    if (node := settings.cfg.lr_scheduler) is None:
        return None
    schedule = build(
        "lr_scheduler", node, optimizer, attributes=SCHEDULER_METHODS, num_training_steps=num_steps, last_epoch=-1
    )
    try:
        for factor in getattr(schedule, "lr_lambdas", ()):  # of all schedules of torchtune
            for step in (0, num_steps // 2, num_steps - 1):
                if not 0 <= factor(step) < math.inf:
                    raise ValueError(f"the learning rate of step {step} is {factor(step)} × lr")
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"lr_scheduler={plain(node)}: {error}") from error
    return schedule


def build_schedule(
    settings: TrainingSettings, layers: ProjectedLayers, optimizer: torch.optim.Optimizer, scores: list[float]
) -> Schedule:
    """The schedule of active layers. All layers are frozen until the first draw.

    Raises:
        ConfigError: if the scores allow no draw of γ layers.
    """
    owlore = settings.owlore
    try:
        sampler = LayerSampler(scores, owlore.num_active_layers or len(scores), owlore.draw, settings.cfg.seed)
    except ValueError as error:
        raise ConfigError(f"owlore: {error}; try another score, or a lower outlier_threshold") from error
    if never := [layer for layer, score in enumerate(scores) if score == 0]:
        log.warning(f"Layers {never} have score 0 and will never be trained.")
    return Schedule(
        layers,
        optimizer,
        sampler,
        resample_every=owlore.resample_every,
        update_gap=owlore.update_gap,
        moments=owlore.moments,
        inactive_state=owlore.inactive_state,
    )


def check_metric_logger(settings: TrainingSettings) -> None:
    """Raise ConfigError if the metric logger, which is built after weights load, lacks a method or its package."""
    logger = settings.cfg.metric_logger
    check_attributes("metric_logger", logger, LOGGER_METHODS)
    package = LOGGER_PACKAGES.get(logger._component_.rpartition(".")[2])
    if package and find_spec(package) is None:
        raise ConfigError(f"metric_logger={logger._component_}: {package} is not installed; `pip install {package}`")


def describe(settings: TrainingSettings) -> str:
    """Check everything that needs no files. Returns the size of the model and of its trained part, as text."""
    check_metric_logger(settings)
    _, model, trained, optimizer = build_trained_model(settings)
    build_lr_scheduler(settings, optimizer, num_steps=1000)  # of a run without data
    sizes = sorted(sum(parameter.numel() for parameter in layer.values()) for layer in model_parts(model).layers)
    num_active = settings.owlore.num_active_layers or len(sizes)
    total = sum(parameter.numel() for parameter in model.parameters())
    at_once = sum(sizes[len(sizes) - num_active :]) + trained.num_trainable()  # outside the layers, before any draw
    return f"{total:,} parameters, {len(sizes)} layers; {num_active} of them, {at_once:,} parameters, train at once"
