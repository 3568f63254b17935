"""Checks during training: the held-out loss, and finite weights and gradients."""

from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from owlore_tune.data.loader import HeldOutData
from owlore_tune.distributed.fsdp import reshard
from owlore_tune.distributed.world import ALONE, World, is_finite
from owlore_tune.errors import ConfigError, DivergedError
from owlore_tune.loss import mean_loss, shift_labels
from owlore_tune.models.decoder import plain_name
from owlore_tune.optim.adamw import OwLoreAdamW


@torch.no_grad()
def held_out_loss(
    model: nn.Module, loss_fn: Any, data: HeldOutData, device: torch.device, world: World = ALONE
) -> tuple[float, int]:
    """The mean loss over all tokens to predict, and their number, over all processes of ``world``.

    Raises:
        ConfigError: if there are no tokens to predict.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_here = 0
    for batch, num_rows in tqdm(data, desc="Validating", unit="batch", leave=False, disable=world.rank > 0):
        labels = shift_labels(batch.pop("labels"), loss_fn.ignore_index)
        labels[num_rows:] = loss_fn.ignore_index
        count = int((labels != loss_fn.ignore_index).sum())
        if not count:
            labels[0, 0] = 0  # run forward anyway, because other processes wait for it
        total += mean_loss(model, loss_fn, batch, labels, device).double() * count
        num_here += count
    model.train(was_training)
    reshard(model)
    (num_tokens,) = world.sums([num_here], device)
    if num_tokens == 0:
        raise ConfigError("dataset_val has no tokens to predict; is tokenizer.max_seq_len too short?")
    return world.sum_(total).item() / num_tokens, num_tokens


def check_finite_weights(model: nn.Module, step: int, world: World = ALONE) -> None:
    """Raise DivergedError if a weight of ``model`` is not finite on any process of ``world``."""
    here = {plain_name(name) for name, parameter in model.named_parameters() if not is_finite(parameter)}
    if bad := sorted(here.union(*world.gather(here))):
        raise DivergedError(
            f"weights are not finite after step {step}: {', '.join(bad[:3])}{', …' if len(bad) > 3 else ''}; lower "
            "optimizer.lr"
        )


def bad_gradients(model: nn.Module, optimizer: OwLoreAdamW, world: World = ALONE) -> list[str]:
    """The parts of ``model``, such as ``layers.3``, with a non-finite gradient on any process of ``world``."""
    bad = {parameter for parameter, grad in optimizer.step_grads().items() if not grad.isfinite().all()}
    names = (plain_name(name) for name, parameter in model.named_parameters() if parameter in bad)
    here = {".".join(name.split(".")[:2]) for name in names}
    return sorted(here.union(*world.gather(here)))
