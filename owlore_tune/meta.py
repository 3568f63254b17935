"""Loss, model and optimizer of a config, without weights: what is checked and planned before any load."""

import inspect
import math
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torchtune import training
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules import TransformerDecoder

from owlore_tune.config import ConfigError, OwLoreConfig, build, build_ours, build_with, device_and_dtype, plain
from owlore_tune.layers import find_layers
from owlore_tune.optim import OwLoreAdamW, parameter_groups

TRIED_STEPS = 10_000  # of a schedule; more than any warm-up, or it would not be seen past that


class Parts(NamedTuple):
    """What a training step is made of."""

    loss_fn: Any  # one of torchtune's, ours, or a plain one: they differ in what they ask of the model
    model: TransformerDecoder
    optimizer: OwLoreAdamW


def build_parts(cfg: DictConfig) -> Parts:
    """The parts of ``cfg``, its model on the meta device and told what its loss wants of it.

    Raises:
        ConfigError: if one cannot be made, or they do not go together.
    """
    loss_fn = build_with("loss", cfg.loss, ("ignore_index",))
    check_loss(cfg, loss_fn)
    check_lr_scheduler(cfg)
    if loss_fn.ignore_index != CROSS_ENTROPY_IGNORE_IDX:
        raise ConfigError(
            f"loss.ignore_index={loss_fn.ignore_index}; torchtune's datasets mark what is not trained on "
            f"with {CROSS_ENTROPY_IGNORE_IDX}"
        )
    _, dtype = device_and_dtype(cfg)
    with training.set_default_dtype(dtype), torch.device("meta"):
        model = build("model", cfg.model)
    try:
        OwLoreConfig.from_config(cfg.owlore).check_model(len(find_layers(model)))
    except TypeError as error:
        raise ConfigError(str(error)) from error
    if hasattr(loss_fn, "set_model_output"):
        loss_fn.set_model_output(model)
    elif hasattr(loss_fn, "num_output_chunks"):
        model.set_num_output_chunks(loss_fn.num_output_chunks)
    return Parts(loss_fn, model, build_optimizer(cfg, model))


def check_loss(cfg: DictConfig, loss_fn: Any) -> None:
    """Raise ConfigError if the loss is not one of outputs and labels."""
    try:
        inspect.signature(loss_fn.forward).bind(None, None)
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"loss._component_={cfg.loss._component_} takes no outputs and labels: {error}") from error


def check_lr_scheduler(cfg: DictConfig) -> None:
    """Raise ConfigError if the schedule cannot be made; tried on an optimizer of one number."""
    if cfg.lr_scheduler is not None:
        scratch = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        attributes = ("step", "get_last_lr", "state_dict", "load_state_dict")
        num_steps = TRIED_STEPS
        schedule = build_with(
            "lr_scheduler", cfg.lr_scheduler, attributes, scratch, num_training_steps=num_steps, last_epoch=-1
        )
        try:
            for step in (0, 1, num_steps // 2, num_steps - 1):
                schedule.last_epoch = step - 1
                scratch.step()
                schedule.step()
                if not all(math.isfinite(lr) and lr >= 0 for lr in schedule.get_last_lr()):
                    raise ValueError(f"the learning rate of step {step} is {schedule.get_last_lr()[0]} × lr")
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ConfigError(f"lr_scheduler={plain(cfg.lr_scheduler)}: {error}") from error


def build_optimizer(cfg: DictConfig, model: TransformerDecoder) -> OwLoreAdamW:
    """The optimizer of ``cfg`` over what of ``model`` its ``owlore`` block lets train."""
    owlore = OwLoreConfig.from_config(cfg.owlore)
    groups = parameter_groups(
        model,
        train_embeddings=owlore.train_embeddings,
        train_output=owlore.train_output,
        train_norm=owlore.train_norm,
    )
    return build_ours("optimizer", cfg.optimizer, OwLoreAdamW, groups)
