"""Checks during training: the held-out loss, and finite weights and gradients."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from owlore_tune.data.loader import HeldOutData, batch_to_device
from owlore_tune.distributed.fsdp import reshard
from owlore_tune.distributed.world import World, is_finite, local
from owlore_tune.errors import ConfigError, DivergedError, RunError
from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.loss import loss_of_outputs, mean_loss, shift_labels
from owlore_tune.measure import free_bytes
from owlore_tune.models.decoder import plain_name
from owlore_tune.quantized.layers import QuantizedLayers
from owlore_tune.training.components import Inputs
from owlore_tune.training.load_weights import ForwardByLayer
from owlore_tune.training.report import Progress

# Tokens of held-out data whose hidden states are in memory at once on a CPU (0.3 GB for 7B in bf16), and the share of a
# GPU's free memory that they may take
_TOKENS_ON_CPU = 2**15
_SHARE_ON_GPU = 0.25
NO_TOKENS = "dataset_val has no tokens to predict; is tokenizer.max_seq_len too short?"


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    loss_fn: Any,
    data: HeldOutData,
    device: torch.device,
    world: World,
) -> tuple[float, int]:
    """The mean loss over all tokens to predict, and their number, over all processes of ``world`` together.

    Raises:
        ConfigError: if there are no tokens to predict.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_here = 0
    for batch in tqdm(data, desc="Validating", unit="batch", leave=False, disable=world.rank > 0):
        labels = shift_labels(batch.pop("labels"), loss_fn.ignore_index)
        count = int((labels != loss_fn.ignore_index).sum())
        if not count:
            labels[0, 0] = 0  # run forward anyway, because other processes wait for it
        total += mean_loss(model, loss_fn, batch, labels, device).double() * count
        num_here += count
    model.train(was_training)
    reshard(model)
    return _mean(total, num_here, world)


@torch.no_grad()
def held_out_loss_of(
    model: Any,
    layers: ProjectedLayers,
    quantized: QuantizedLayers | None,
    loss_fn: Any,
    data: HeldOutData,
    device: torch.device,
    world: World,
) -> tuple[float, int]:
    """`held_out_loss` of the full-precision weights of ``quantized`` as they are saved, which are read layer by layer;
    with None, of the weights on the device."""
    if quantized is None:
        return held_out_loss(model, loss_fn, data, device, world)
    total, num_here = torch.zeros((), dtype=torch.float64, device=device), 0

    with quantized.whole_outside():
        of_token = model.tok_embeddings.embedding_dim * next(model.parameters()).itemsize
        num_bytes = held_out_bytes_at_once(of_token, free_bytes(device))
        for batches, labels in _groups(data, loss_fn.ignore_index, device, of_token, num_bytes):
            forward = ForwardByLayer(model, batches, "Validating in full precision")
            for index, run in forward:
                with quantized.in_full_precision(index, layers.merged_layer(index)):
                    run()
            for states, batch_labels in zip(forward.hidden, labels, strict=True):
                if count := int((batch_labels != loss_fn.ignore_index).sum()):
                    loss = loss_of_outputs(loss_fn, model.unembed(states), batch_labels)
                    total += loss.double() * count
                    num_here += count
    return _mean(total, num_here, world)


def _mean(total: Tensor, num_here: int, world: World) -> tuple[float, int]:
    (num_tokens,) = world.sums([num_here])
    if num_tokens == 0:
        raise ConfigError(NO_TOKENS)
    return world.sum_(total).item() / num_tokens, num_tokens


def held_out_bytes_at_once(of_token: int, free: int | None) -> int:
    """Bytes of held-out batches and their hidden states in memory at once. All weights are read from disk for each such
    group.

    Args:
        of_token: bytes of a token's hidden state.
        free: see `free_bytes`.
    """
    return max(int(_SHARE_ON_GPU * (free or 0)), _TOKENS_ON_CPU * of_token)


def _groups(
    data: HeldOutData, ignore_index: int, device: torch.device, of_token: int, num_bytes: int
) -> Iterator[tuple[list[dict[str, Tensor]], list[Tensor]]]:
    """Batches on ``device`` and their shifted labels, in groups of at least ``num_bytes`` with their hidden states."""
    batches: list[dict[str, Tensor]] = []
    labels: list[Tensor] = []
    kept = 0
    for batch in data:
        batch_labels = shift_labels(batch.pop("labels"), ignore_index)
        batches.append(batch_to_device(batch, device))
        labels.append(batch_labels)
        kept += of_token * batch_labels.numel() + sum(value.nbytes for value in batches[-1].values())  # with its mask
        if kept >= num_bytes:
            yield batches, labels
            batches, labels, kept = [], [], 0
    if batches:
        yield batches, labels


def check_held_out_loss(when: str, loss: float) -> None:
    """Raise DivergedError for a held-out loss that is not finite."""
    if not math.isfinite(loss):
        raise DivergedError(f"the held-out loss, {when}, is {loss}: the run has diverged; lower optimizer.lr")


def check_skipped_steps(progress: Progress, most: int) -> None:
    """Raise DivergedError after ``most`` skipped steps in a row."""
    if progress.skipped_in_a_row >= most:
        raise DivergedError(
            f"{progress.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; lower "
            "optimizer.lr, or set clip_grad_norm"
        )


def check_trained(progress: Progress, inputs: Inputs) -> None:
    """
    Raises:
        RunError: if a run has trained no token.
        DivergedError: if its last steps were skipped, and no held-out loss shows that the weights are good.
    """
    if not progress.trained_tokens:
        raise RunError(
            "no token was trained in any step: every answer is cut off; raise tokenizer.max_seq_len, which is "
            f"{inputs.tokenizer.max_seq_len}, or shorten the prompts"
        )
    if inputs.held_out is None and (skipped := progress.skipped_in_a_row):
        raise DivergedError(
            f"the run ended with {skipped} steps whose loss or gradient is not finite; lower optimizer.lr"
        )


def check_finite_weights(model: nn.Module, layers: ProjectedLayers, step: int, world: World) -> None:
    """Raise DivergedError if a weight of ``model`` is not finite on any process of ``world``."""
    named = [(plain_name(name), parameter) for name, parameter in model.named_parameters()]
    here = {name for name, parameter in (*named, *layers.trained().items()) if not is_finite(parameter)}
    if bad := sorted(here.union(*world.gather(here))):
        raise DivergedError(
            f"weights are not finite after step {step}: {', '.join(bad[:3])}{', …' if len(bad) > 3 else ''}; lower "
            "optimizer.lr"
        )


def bad_gradients(layers: ProjectedLayers, world: World) -> list[str]:
    """The parts of the model, such as ``layers.3``, with a non-finite gradient on any process of ``world``."""
    grads = {name: parameter.grad for name, parameter in layers.trained().items() if parameter.grad is not None}
    bad = (name for name, grad in grads.items() if not local(grad).isfinite().all())
    here = {".".join(name.split(".")[:2]) for name in bad}
    return sorted(here.union(*world.gather(here)))
