"""Moments of AdamW in 32 or 8 bits, of a gradient or of its projection."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from owlore_tune.optim import low_bits

MOMENT_KEYS = ("exp_avg", "exp_avg_sq")


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of moments and of the update: float32, or float64 for float64 weights."""
    return torch.promote_types(parameter.dtype, torch.float32)


def zero_moments(parameter: Tensor, shape: Sequence[int], group: dict[str, Any], by_column: bool) -> dict[str, Tensor]:
    """Moments of ``shape`` by their keys, in the group's ``state_bits``, on the device of ``parameter``.

    Args:
        by_column: see `low_bits.zeros`.
    """
    bits, dtype, device = group["state_bits"], compute_dtype(parameter), parameter.device
    return {
        key: low_bits.zeros(shape, bits, signed=signed, dtype=dtype, device=device, by_column=by_column)
        for key, signed in zip(MOMENT_KEYS, (True, False), strict=True)
    }


def carry_moments(state: dict[str, Any], turn: Tensor | None, moments: str, right: bool) -> None:
    """Carry the moments of a weight over a refresh of its basis, in place.

    Args:
        state: with ``step`` and the moments, (m, r) on the right side, else (r, n).
        turn: (r, r) old basisᵀ · new basis, if the moments are projected.
        moments: ``keep``, ``project`` or ``reset``.
    """
    if moments == "reset":
        state["step"] = 0
        for key in MOMENT_KEYS:
            moment = low_bits.restore(state[key], torch.float32, by_column=right)
            low_bits.update(state[key], torch.zeros_like(moment), by_column=right)
    elif moments == "project":
        assert turn is not None
        for key, matrix in zip(MOMENT_KEYS, (turn, turn.square()), strict=True):
            moment = low_bits.restore(state[key], turn.dtype, by_column=right)
            low_bits.update(state[key], moment @ matrix if right else matrix.T @ moment, by_column=right)


def restore_moments(stored: Sequence[Tensor], dtype: torch.dtype, by_column: bool = False) -> list[Tensor]:
    """Mean and mean square, dequantized.

    If 8-bit rounding made a mean square zero, the squared mean replaces it. This bounds the direction: dividing by
    (nearly) zero gave directions of several hundred.
    """
    mean, mean_square = (low_bits.restore(moment, dtype, by_column=by_column) for moment in stored)
    if low_bits.is_rounded(stored[1]):
        torch.where(mean_square == 0, mean.square(), mean_square, out=mean_square)
    return [mean, mean_square]


def adamw_(
    targets: list[Tensor],
    grads: list[Tensor],
    moments: list[list[Tensor]],  # of each target: mean and mean square of its gradients, updated in place
    step: int,  # from 1
    group: dict[str, Any],
    *,
    lr: float,
    weight_decay: float,
) -> None:
    """One step of torch's fused AdamW on ``targets``, in place. All tensors have one dtype and device.

    The tensors of a target share its shape.
    """
    exp_avgs, exp_avg_sqs = (list(each) for each in zip(*moments, strict=True))
    beta1, beta2 = group["betas"]
    counts = torch.full((len(targets),), step - 1.0, dtype=torch.float32, device=targets[0].device)  # no device sync
    adamw(
        targets, grads, exp_avgs, exp_avg_sqs, [], list(counts.unbind()), fused=True, amsgrad=False, maximize=False,
        beta1=beta1, beta2=beta2, eps=group["eps"], lr=lr, weight_decay=weight_decay,
    )  # fmt: skip
