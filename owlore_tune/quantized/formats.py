"""Weights in few bits: int8 with a scale for each row, and NF4 with a scale for each block of 64 values.

torchao's int8 training weight saves its input for backward even if the weight is frozen, and its NF4 tensor
is slow to dequantize on a CPU. These formats hold plain tensors that get no gradient.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

FORMATS = ("int8", "nf4")
BLOCK = 64  # values of NF4 that share a scale
ALL = slice(None)
_PIECE = 2**20  # values that are quantized at once, so that float32 temporaries stay small
# Quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Int8Weight:
    """A weight (m, n) in 8 bits."""

    codes: Tensor  # (m, n) int8
    scale: Tensor  # (m, 1) float32

    @classmethod
    def quantize(cls, weight: Tensor) -> "Int8Weight":
        scale = weight.abs().amax(dim=1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / 127
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        rows = max(1, _PIECE // weight.shape[1])
        for piece, some_codes, some_scale in zip(weight.split(rows), codes.split(rows), scale.split(rows), strict=True):
            some_codes.copy_((piece.float() / some_scale).round_())
        return cls(codes, scale)

    def dequantize(self, dtype: torch.dtype, rows: slice | Tensor = ALL, columns: slice = ALL) -> Tensor:
        """A part of the weight in ``dtype``."""
        return self.codes[rows, columns].to(dtype).mul_(self.scale[rows].to(dtype))

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


@dataclass(frozen=True)
class NF4Weight:
    """A weight (m, n) in 4 bits; n is divisible by `BLOCK`."""

    codes: Tensor  # (m, n / 2) uint8, the first of two values in the upper half
    scale: Tensor  # (m, n / 64) bfloat16

    @classmethod
    def quantize(cls, weight: Tensor) -> "NF4Weight":
        m, n = weight.shape
        levels = torch.tensor(NF4_LEVELS, device=weight.device)
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.empty(m, n // 2, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(m, n // BLOCK, dtype=torch.bfloat16, device=weight.device)
        rows = max(1, _PIECE // n)
        for piece, some_codes, some_scale in zip(weight.split(rows), codes.split(rows), scale.split(rows), strict=True):
            blocks = piece.reshape(-1, BLOCK).float()
            some_scale.copy_(blocks.abs().amax(dim=1).view(some_scale.shape))
            units = blocks / some_scale.float().clamp_min(torch.finfo(torch.float32).tiny).view(-1, 1)
            found = torch.zeros_like(units, dtype=torch.uint8)
            for middle in middles.tolist():  # torch.bucketize is slower on a CPU
                found.add_(units > middle)
            pairs = found.view(-1, 2)
            some_codes.copy_((pairs[:, 0] * 16 + pairs[:, 1]).view(some_codes.shape))
        return cls(codes, scale)

    def dequantize(self, dtype: torch.dtype, rows: slice | Tensor = ALL, columns: slice = ALL) -> Tensor:
        """A part of the weight in ``dtype``: two values at a time, from a table of all 256 pairs.

        Args:
            columns: whole blocks.
        """
        codes, scale = self.codes[rows, _divided(columns, 2)], self.scale[rows, _divided(columns, BLOCK)]
        is_planned = isinstance(codes, FakeTensor)  # which has no values, so the table needs none
        pairs = codes.new_empty(256, dtype=_PAIR[dtype]) if is_planned else _pairs(dtype, codes.device)
        values = pairs.index_select(0, codes.reshape(-1).int()).view(dtype)
        return values.view(-1, BLOCK).mul_(scale.reshape(-1, 1).to(dtype)).view(len(codes), -1)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.codes.shape[0], 2 * self.codes.shape[1]))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


# An integer as large as two values
_PAIR = {torch.bfloat16: torch.int32, torch.float16: torch.int32, torch.float32: torch.int64}


@cache  # a copy from the host makes it wait for a GPU
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256,) for each byte of codes, its two values in ``dtype``, as one integer."""
    with torch.inference_mode(False):
        levels = torch.tensor(NF4_LEVELS, dtype=dtype, device=device)
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
        return pairs.view(_PAIR[dtype]).view(-1)


def _divided(columns: slice, size: int) -> slice:
    """``columns``, if ``size`` of them are stored as one."""
    return slice(*(bound if bound is None else bound // size for bound in (columns.start, columns.stop)))


QuantizedWeight = Int8Weight | NF4Weight


def quantize(weight: Tensor, kind: str) -> QuantizedWeight:
    """``weight`` (m, n) in ``kind``, one of `FORMATS`. A weight that NF4's blocks don't divide becomes int8.

    Raises:
        ValueError: if ``kind`` is unknown.
    """
    if kind not in FORMATS:
        raise ValueError(f"weights={kind!r}; choose one of {', '.join(FORMATS)}")
    return NF4Weight.quantize(weight) if kind == "nf4" and weight.shape[1] % BLOCK == 0 else Int8Weight.quantize(weight)


def empty(shape: torch.Size, kind: str, device: torch.device) -> QuantizedWeight:
    """A weight without values: its memory alone."""
    m, n = shape
    if kind == "nf4" and n % BLOCK == 0:
        codes = torch.empty(m, n // 2, dtype=torch.uint8, device=device)
        return NF4Weight(codes, torch.empty(m, n // BLOCK, dtype=torch.bfloat16, device=device))
    return Int8Weight(torch.empty(m, n, dtype=torch.int8, device=device), torch.empty(m, 1, device=device))
