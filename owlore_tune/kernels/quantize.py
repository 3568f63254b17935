"""Rows quantized to 8 bits, and 4-bit weights dequantized, in one launch each."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from owlore_tune.kernels import HAS_TRITON

_MOST_AT_ONCE = 4096  # values of a row that a program holds
_NF4_AT_ONCE = 1024
# Rows, columns and depth of a block of a product, stages and warps, for large and small cards
_BLOCKS = ((128, 256, 128, 3, 8), (128, 128, 128, 4, 4), (128, 128, 64, 4, 4), (128, 64, 64, 4, 4), (64, 64, 64, 3, 8))
_TINY = torch.finfo(torch.float32).tiny

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _quantize_rows(
        x_ptr,
        factors_ptr,
        codes_ptr,
        scale_ptr,
        n,
        row_stride,
        TINY: tl.constexpr,
        HAS_FACTORS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        x_ptr += row * row_stride
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
            if HAS_FACTORS:
                x *= tl.load(factors_ptr + at, mask=at < n, other=0.0)
            largest = tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
        # A maximum over values drops NaN. The sum is 0 if all are finite, and NaN else.
        scale = tl.max(largest) + tl.sum(largest * 0.0)
        scale = tl.div_rn(tl.maximum(scale, TINY, propagate_nan=tl.PropagateNan.ALL), 127.0)
        tl.store(scale_ptr + row, scale)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
            if HAS_FACTORS:
                x *= tl.load(factors_ptr + at, mask=at < n, other=0.0)
            # Adding 1.5 · 2²³ rounds to the nearest integer, and halves to even, as torch.round
            rounded = tl.div_rn(x, scale) + 12582912.0
            tl.store(codes_ptr + row * n + at, (rounded - 12582912.0).to(tl.int8), mask=at < n)

    @triton.jit
    def _dequantize_nf4(
        codes_ptr,
        scale_ptr,
        levels_ptr,
        values_ptr,
        n,
        codes_stride,
        scale_stride,
        SIZE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        pair = tl.load(codes_ptr + row * codes_stride + at // 2, mask=at < n, other=0)
        code = tl.where(at % 2 == 0, pair >> 4, pair & 15)
        level = tl.load(levels_ptr + code).to(tl.float32)
        scale = tl.load(scale_ptr + row * scale_stride + at // SIZE, mask=at < n, other=0.0).to(tl.float32)
        tl.store(values_ptr + row * n + at, level * scale, mask=at < n)


torch.library.define("owlore::quantize_rows", "(Tensor x, Tensor? factors) -> (Tensor, Tensor)")
torch.library.define("owlore::dequantize_nf4", "(Tensor codes, Tensor scale, Tensor levels) -> Tensor")


def quantize_rows(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize each row of ``x`` to 8 bits.

    A row with a value that is not finite gets a scale that is not, so products with it are not finite either.

    Args:
        x: (t, n), floating-point.
        factors: (n,) float32, to multiply the columns with first.

    Returns:
        Codes (t, n) int8, and scales (t, 1) float32: the largest magnitude of each row, divided by 127.
    """
    return torch.ops.owlore.quantize_rows(x if x.stride(-1) == 1 else x.contiguous(), factors)


@torch.library.impl("owlore::quantize_rows", ("cpu", "cuda"))
def _launch_rows(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    codes, scale = _empty_rows(x, factors)
    if x.numel():
        n = x.shape[1]
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _quantize_rows[(len(x),)](
                x, factors, codes, scale, n, x.stride(0), TINY=_TINY, HAS_FACTORS=factors is not None,
                BLOCK=min(triton.next_power_of_2(n), _MOST_AT_ONCE),
            )  # fmt: skip
    return codes, scale


@torch.library.register_fake("owlore::quantize_rows")
def _empty_rows(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)


def dequantize_nf4(codes: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """The values of 4-bit codes.

    Args:
        codes: (m, n / 2) uint8, the first of two values in the upper half, with contiguous rows.
        scale: (m, n / block), with contiguous rows.
        levels: (16,), in the dtype of the result.

    Returns:
        (m, n): levels times scales, rounded to the dtype of ``levels``.
    """
    return torch.ops.owlore.dequantize_nf4(codes, scale, levels)


@torch.library.impl("owlore::dequantize_nf4", ("cpu", "cuda"))
def _launch_nf4(codes: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    values = _empty_values(codes, scale, levels)
    if values.numel():
        m, n = values.shape
        block = min(triton.next_power_of_2(n), _NF4_AT_ONCE)
        with torch.cuda.device_of(codes):
            _dequantize_nf4[(m, triton.cdiv(n, block))](
                codes, scale, levels, values, n, codes.stride(0), scale.stride(0), SIZE=n // scale.shape[1], BLOCK=block
            )
    return values


@torch.library.register_fake("owlore::dequantize_nf4")
def _empty_values(codes: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    return levels.new_empty(codes.shape[0], 2 * codes.shape[1])


torch.library.define(
    "owlore::int8_product",
    "(Tensor codes, Tensor weight, Tensor row_scale, Tensor column_scale, ScalarType dtype) -> Tensor",
)


def int8_product(codes: Tensor, weight: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes`` (t, k) int8 times ``weight`` (k, m) int8, with any strides, and times the scales → (t, m) in ``dtype``.

    Sums are exact, and scaled in float32.

    Args:
        row_scale: (t, 1) float32.
        column_scale: (m, 1) float32, or a single value.
    """
    return torch.ops.owlore.int8_product(codes, weight, row_scale, column_scale, dtype)


@torch.library.impl("owlore::int8_product", ("cpu", "cuda"))
def _launch_product(
    codes: Tensor, weight: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    product = _empty_product(codes, weight, row_scale, column_scale, dtype)
    if product.numel():
        (t, k), m = codes.shape, weight.shape[1]
        with torch.cuda.device_of(codes):
            _int8_kernel()[lambda sizes: (triton.cdiv(t, sizes["BLOCK_M"]) * triton.cdiv(m, sizes["BLOCK_N"]),)](
                codes, weight, product, row_scale, column_scale, t, m, k, *codes.stride(), *weight.stride(),
                *product.stride(), COL_SCALE_SCALAR=column_scale.numel() == 1,
            )  # fmt: skip
    return product


@torch.library.register_fake("owlore::int8_product")
def _empty_product(
    codes: Tensor, weight: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    return row_scale.new_empty(codes.shape[0], weight.shape[1], dtype=dtype)


@cache
def _int8_kernel() -> Any:
    """torchao's kernel. Its block sizes are searched once for each weight shape.

    torchao searches them anew for each number of rows, which would be in most steps if rows vary in length.
    """
    from torchao.prototype.quantized_training.int8_mm import _scaled_int8_mm_kernel

    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_stages=stages, num_warps=warps)
        for m, n, k, stages, warps in _BLOCKS
    ]
    key = ["N", "K", "stride_bk"]
    return triton.autotune(configs, key)(_scaled_int8_mm_kernel.fn)
