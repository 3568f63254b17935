"""Write float32 values to 16-bit weights, with stochastic rounding to bfloat16."""

import torch
from torch import Tensor


def round_to(weight: Tensor, change: Tensor, noise: Tensor | None, decay: float = 0.0) -> None:
    """``weight`` ← decay · weight + change, computed in the dtype of ``change``, which may be overwritten.

    Args:
        noise: see `noise_for`. A float32 value goes to one of its two neighbors in bfloat16, and is exact on average.
            None rounds to the nearest value.
    """
    moved = change.add_(weight, alpha=decay) if decay else change
    if noise is None:
        weight.copy_(moved)
        return
    # The upper 16 bits of a float32 are a bfloat16. Noise of 0 to 65535 in the lower ones carries into them.
    bits = moved.view(torch.int32).add_(noise).add_(2**15).bitwise_and_(-(2**16))
    weight.copy_(bits.view(torch.float32))


def noise_for(weight: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """Uniform int16 noise in the shape of ``weight``; None without a ``generator``, or if it is not bfloat16.

    Four values come from one random number, because a CPU generates these one after the other.
    """
    if generator is None or weight.dtype != torch.bfloat16:
        return None
    words = torch.empty(-(-weight.numel() // 4), dtype=torch.int64, device=weight.device)
    words.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return words.view(torch.int16)[: weight.numel()].view(weight.shape)
