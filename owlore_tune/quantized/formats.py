"""Formats of quantized weights: int8 with a scale for each row, and NF4 with a scale for each block of 64 values.

A new format is one subclass of `QuantizedWeight` with a name, which `owlore.weights` then takes.

torchao's int8 training weight saves its input for backward even if the weight is frozen, and its NF4 tensor is slow to
dequantize on a CPU. These formats hold plain tensors that get no gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from owlore_tune.kernels import has_kernels
from owlore_tune.kernels.quantize import dequantize_nf4, int8_product, quantize_rows

FORMATS: dict[str, type["QuantizedWeight"]] = {}
BLOCK = 64  # values of NF4 that share a scale
ALL = slice(None)
# Values of a weight that are in full precision at once. On a CPU, `owlore_tune.measure.reuse_freed_memory` does
# not keep larger blocks.
_PIECE = 2**22
_PIECE_ON_CUDA = 2**25
_QUANTIZED_AT_ONCE = 2**20  # so that float32 temporaries stay small, which are not planned
_QUANTIZED_ON_CUDA = 2**24
# Quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class QuantizedWeight:
    """A weight (m, n) in few bits: a frozen dataclass of tensors, each with one row for each row of the weight.

    Attributes:
        name: of the format in a config.
        products: kinds of products that it can compute; the last one is the fastest.
        rounding_matters: whether a layer that trains needs the correction of its rounding, see
            `owlore_tune.quantized.layers.QuantizedLayers.correct`.
    """

    name: ClassVar[str]
    products: ClassVar[tuple[str, ...]] = ("full",)
    rounding_matters: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        FORMATS[cls.name] = cls

    @staticmethod
    def takes(shape: torch.Size) -> bool:
        """Whether a weight of this shape can have the format. Another one gets int8."""
        return True

    @classmethod
    def quantize(cls, weight: Tensor) -> "QuantizedWeight":
        raise NotImplementedError

    @classmethod
    def empty(cls, shape: torch.Size, device: torch.device) -> "QuantizedWeight":
        """A weight without values: its memory alone."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype, rows: slice | Tensor = ALL, columns: slice = ALL) -> Tensor:
        """A part of the weight in ``dtype``. ``columns`` are whole blocks of `BLOCK`."""
        raise NotImplementedError

    def linear(self, x: Tensor, products: str) -> Tensor:
        """``x`` (t, n) · weight (m, n)ᵀ → (t, m), differentiable in ``x``. Backward needs no saved activations."""
        return _Product.apply(x, self)

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


@dataclass(frozen=True)
class Int8Weight(QuantizedWeight):
    """A weight (m, n) in 8 bits."""

    codes: Tensor  # (m, n) int8
    scale: Tensor  # (m, 1) float32

    name = "int8"
    products = ("full", "int8")

    @classmethod
    def empty(cls, shape: torch.Size, device: torch.device) -> "Int8Weight":
        return cls(torch.empty(shape, dtype=torch.int8, device=device), torch.empty(shape[0], 1, device=device))

    @classmethod
    def quantize(cls, weight: Tensor) -> "Int8Weight":
        scale = weight.abs().amax(dim=1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / 127
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        rows = rows_at_once(weight.shape[1], weight.device)
        for piece, some_codes, some_scale in zip(weight.split(rows), codes.split(rows), scale.split(rows), strict=True):
            some_codes.copy_((piece.float() / some_scale).round_())
        return cls(codes, scale)

    def dequantize(self, dtype: torch.dtype, rows: slice | Tensor = ALL, columns: slice = ALL) -> Tensor:
        return self.codes[rows, columns].to(dtype).mul_(self.scale[rows].to(dtype))

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def linear(self, x: Tensor, products: str) -> Tensor:
        """With 8-bit products, sums are exact, and scales are in float32.

        Where torch's 8-bit products are not exact, or do not take the sizes, the weight is dequantized.
        """
        if products == "int8" and _takes_int8(len(x), self.shape, x.device):
            return _Int8Product.apply(x, self)
        return super().linear(x, products)


@dataclass(frozen=True)
class NF4Weight(QuantizedWeight):
    """A weight (m, n) in 4 bits; n is divisible by `BLOCK`."""

    codes: Tensor  # (m, n / 2) uint8, the first of two values in the upper half
    scale: Tensor  # (m, n / 64) bfloat16

    name = "nf4"
    rounding_matters = True  # off by 9 % of ‖W₀‖

    @staticmethod
    def takes(shape: torch.Size) -> bool:
        return shape[1] % BLOCK == 0

    @classmethod
    def empty(cls, shape: torch.Size, device: torch.device) -> "NF4Weight":
        m, n = shape
        codes = torch.empty(m, n // 2, dtype=torch.uint8, device=device)
        return cls(codes, torch.empty(m, n // BLOCK, dtype=torch.bfloat16, device=device))

    @classmethod
    def quantize(cls, weight: Tensor) -> "NF4Weight":
        m, n = weight.shape
        levels = torch.tensor(NF4_LEVELS, device="cpu")  # the host reads them
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.empty(m, n // 2, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(m, n // BLOCK, dtype=torch.bfloat16, device=weight.device)
        rows = rows_at_once(n, weight.device)
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
        """Two values at a time, from a table of all 256 pairs.

        A table of all fours is faster when it stays in the cache, but it makes training steps slower on a CPU.
        """
        codes, scale = self.codes[rows, _divided(columns, 2)], self.scale[rows, _divided(columns, BLOCK)]
        if has_kernels(codes.device):
            return dequantize_nf4(codes, scale, _levels(dtype, codes.device))
        pairs = _pairs(dtype, codes.device)
        values = pairs.index_select(0, codes.reshape(-1).int()).view(dtype)
        return values.view(-1, BLOCK).mul_(scale.reshape(-1, 1).to(dtype)).view(len(codes), -1)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.codes.shape[0], 2 * self.codes.shape[1]))


# An integer as large as two values
_PAIR = {torch.bfloat16: torch.int32, torch.float16: torch.int32, torch.float32: torch.int64}


@cache  # a copy from the host makes it wait for a GPU
def _levels(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(NF4_LEVELS, dtype=dtype, device=device)


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256,) for each byte of codes, its two values in ``dtype``, as one integer."""
    with torch.inference_mode(False):
        levels = _levels(dtype, device)
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
        return pairs.view(_PAIR[dtype]).view(-1)


def _takes_int8(num_rows: int, shape: torch.Size, device: torch.device) -> bool:
    """Whether 8-bit products of ``num_rows`` rows with a weight of ``shape`` are exact and supported."""
    if has_kernels(device):
        return num_rows > 0
    if device.type == "cuda":
        return num_rows > 16 and not any(size % 8 for size in shape)  # as cuBLAS
    return CPU_IS_EXACT and num_rows > 0 and min(shape) > 1  # a single column gives wrong sums


def rows_at_once(width: int, device: torch.device) -> int:
    """Rows of ``width`` values that are quantized at once."""
    return max(1, (_QUANTIZED_ON_CUDA if device.type == "cuda" else _QUANTIZED_AT_ONCE) // width)


def _divided(columns: slice, size: int) -> slice:
    """``columns``, if ``size`` of them are stored as one."""
    return slice(*(bound if bound is None else bound // size for bound in (columns.start, columns.stop)))


def format_of(shape: torch.Size, kind: str) -> type[QuantizedWeight]:
    """The format of a weight in ``kind``, one of `FORMATS`: int8 if ``kind`` does not take its shape.

    Raises:
        ValueError: if ``kind`` is unknown.
    """
    if kind not in FORMATS:
        raise ValueError(f"weights={kind!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[kind] if FORMATS[kind].takes(shape) else Int8Weight


def _cpu_is_exact() -> bool:
    """Whether this CPU sums 8-bit products exactly. Without VNNI instructions, oneDNN adds pairs of them in 16 bits,
    which overflow."""
    largest = torch.full((2, 64), 127, dtype=torch.int8, device="cpu")
    return torch._int_mm(largest, largest.t())[0, 0].item() == 64 * 127 * 127


CPU_IS_EXACT = _cpu_is_exact()


def pieces(length: int, width: int, device: torch.device) -> list[slice]:
    """Split ``length`` rows or columns of ``width`` values each, at whole blocks."""
    each = max(1, (_PIECE_ON_CUDA if device.type == "cuda" else _PIECE) // width // BLOCK) * BLOCK
    return [slice(start, min(start + each, length)) for start in range(0, length, each)]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):  # (t, n)
        ctx.weight = weight
        m, n = weight.shape
        return _by_pieces(x, lambda rows: weight.dequantize(x.dtype, rows).T, pieces(m, n, x.device))

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.weight
        m, n = weight.shape  # pieces are not of rows: their products would be summed in 16 bits
        each = pieces(n, m, grad.device)
        return _by_pieces(grad, lambda columns: weight.dequantize(grad.dtype, columns=columns), each), None


def _by_pieces(x: Tensor, columns_of: Callable[[slice], Tensor], each: list[slice]) -> Tensor:
    """``x`` (t, k) times a matrix (k, l), of which ``columns_of`` makes a piece at a time → (t, l)."""
    if torch.compiler.is_compiling():  # torch cannot compile an ``out`` that is part of a tensor
        return torch.cat([x @ columns_of(columns) for columns in each], dim=1)
    product = x.new_empty(len(x), each[-1].stop)
    for columns in each:
        torch.mm(x, columns_of(columns), out=product[:, columns])
    return product


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):  # (t, n)
        ctx.weight = weight
        return _int8_product(x, weight.codes.t(), column_scale=weight.scale)

    @staticmethod
    def backward(ctx, grad):
        # The scales of the weight's rows run along the sum, so they go into the gradient before it is quantized.
        return _int8_product(grad, ctx.weight.codes, factors=ctx.weight.scale), None


def _int8_product(
    x: Tensor, codes: Tensor, *, factors: Tensor | None = None, column_scale: Tensor | None = None
) -> Tensor:
    """``x`` (t, k), quantized by row, times ``codes`` (k, l) int8 → (t, l).

    Args:
        factors: (k, 1), of the columns of ``x``.
        column_scale: (l, 1), of the result's columns.
    """
    if has_kernels(x.device):
        rows, scale = quantize_rows(x, None if factors is None else factors.view(-1))
        columns = scale.new_ones(1) if column_scale is None else column_scale
        return int8_product(rows, codes, scale, columns, x.dtype)
    if factors is not None:
        x = x * factors.view(1, -1).to(x.dtype)
    largest = torch.maximum(x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True).neg_())  # without a copy of x
    scale = largest.float().clamp_min_(torch.finfo(torch.float32).tiny).div_(127)
    if x.is_cuda and codes.stride(-1) == 1:
        codes = codes.t().contiguous().t()  # cuBLAS takes only a second operand that is stored by column
    sums = torch._int_mm((x / scale).round_().to(torch.int8), codes)
    # float32 in the memory of int32: on a CPU, a second buffer of this size costs page faults
    product = sums.view(torch.float32).copy_(sums).mul_(scale)
    if column_scale is not None:
        product.mul_(column_scale.view(1, -1))
    return product.to(x.dtype)
