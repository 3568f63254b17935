"""Optimizer state in 32, 16 or 8 bits.

8-bit state is torchao's ``OptimState8bit``: blocks of 256 values share a scale and are rounded to a dynamic map
(Dettmers et al., arXiv 2110.02861). State below 4096 values, or not divisible into blocks, stays in float32. 16-bit
state is bfloat16.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchao.optim.subclass_8bit import OptimState8bit

BLOCK = 256  # values
SMALLEST = 4096  # values; smaller state is not quantized, as in torchao and bitsandbytes


def zeros(
    shape: Sequence[int],
    bits: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    signed: bool = True,
    by_column: bool = False,
) -> Tensor:
    """Zeros stored in ``bits`` bits.

    Args:
        bits: 32 means ``dtype``.
        signed: whether values can be negative.
        by_column: blocks of 8-bit values run along columns instead of rows. The columns of a low-rank gradient's
            moments (m, r) differ widely in scale. In row blocks, small columns would be rounded to zero.
    """
    if bits == 16:
        return torch.zeros(*shape, dtype=torch.bfloat16, device=device)
    if bits == 32 or math.prod(shape) < SMALLEST or math.prod(shape) % BLOCK:
        return torch.zeros(*shape, dtype=dtype, device=device)
    return OptimState8bit.zeros(tuple(reversed(shape)) if by_column else tuple(shape), signed, BLOCK, device)


def store(value: Tensor, bits: int, *, by_column: bool = False) -> Tensor:
    """Store ``value`` (signed) in ``bits`` bits; see `zeros`."""
    stored = zeros(value.shape, bits, dtype=value.dtype, device=value.device, by_column=by_column)
    update(stored, value, by_column=by_column)
    return stored


def restore(stored: Tensor, dtype: torch.dtype, *, by_column: bool = False) -> Tensor:
    """Convert ``stored`` back to ``dtype``. Returns ``stored`` itself if it already has that dtype."""
    if not isinstance(stored, OptimState8bit):
        return stored.to(dtype)
    value = stored.dequantize(dtype)
    return value.T.contiguous() if by_column else value


def is_rounded(stored: Tensor) -> bool:
    """Whether ``stored`` is in 8 bits."""
    return isinstance(stored, OptimState8bit)


def update(stored: Tensor, value: Tensor, *, by_column: bool = False) -> None:
    """Overwrite ``stored`` with ``value``."""
    if stored is value:
        return
    if by_column and isinstance(stored, OptimState8bit):
        value = value.T
    stored.copy_(value.contiguous())


def piece(stored: Tensor, start: int, stop: int) -> Tensor:
    """A view of stored values ``start`` to ``stop`` in row-major order. ``start`` must be a multiple of `BLOCK`."""
    if not isinstance(stored, OptimState8bit):
        return stored.view(-1)[start:stop]
    scale = stored.scale[start // BLOCK : -(-stop // BLOCK)]
    return OptimState8bit(stored.codes.view(-1)[start:stop], scale, stored.qmap, stored.signed)


def num_bytes(stored: Tensor) -> int:
    """Size of ``stored`` in bytes."""
    return sum(part.nbytes for part in _parts(stored))


def copy_to(stored: Tensor, device: torch.device | None = None) -> Tensor:
    """A copy that shares no memory with ``stored``, on ``device``."""
    return map_parts(lambda part: part.to(device, copy=True), stored)


def map_parts(function: Callable[[Tensor], Tensor], stored: Tensor) -> Tensor:
    """Apply ``function`` to the plain tensors of ``stored``: codes, scales and map, or the tensor itself."""
    parts = map(function, _parts(stored))
    return OptimState8bit(*parts, stored.signed) if isinstance(stored, OptimState8bit) else next(parts)


def named_parts(stored: Tensor) -> dict[str, Tensor]:
    """The plain tensors that make up ``stored``; `from_named_parts` is the inverse."""
    return dict(zip(_PART_NAMES, _parts(stored), strict=False)) if len(_parts(stored)) > 1 else {"value": stored}


def from_named_parts(parts: dict[str, Tensor], *, signed: bool) -> Tensor:
    return parts["value"] if "value" in parts else OptimState8bit(*(parts[name] for name in _PART_NAMES), signed)


_PART_NAMES = ("codes", "scale", "qmap")


def _parts(stored: Tensor) -> tuple[Tensor, ...]:
    return (stored.codes, stored.scale, stored.qmap) if isinstance(stored, OptimState8bit) else (stored,)
