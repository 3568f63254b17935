"""Linears and embeddings with quantized weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from owlore_tune.quantized.formats import BLOCK, Int8Weight, NF4Weight, QuantizedWeight, quantize

PRODUCTS = ("full", "int8")
# Values of a weight that are in full precision at once. On a CPU, `owlore_tune.heap.reuse_freed_memory` does
# not keep larger blocks.
_PIECE = {"cpu": 2**22}
_LARGE_PIECE = 2**25


def quantizable_outside(model: Any) -> list[nn.Linear | nn.Embedding]:
    """Embeddings and output head of a decoder, if they have weights of their own and compute nothing else."""
    if isinstance(model.output, TiedLinear):
        return []
    plain = (nn.Embedding.forward, nn.Linear.forward)
    return [module for module in (model.tok_embeddings, model.output) if type(module).forward in plain]


def is_quantized(module: nn.Module) -> bool:
    return "codes" in module._buffers


def weight_of(module: Any) -> QuantizedWeight:
    """The quantized weight of a module."""
    kind = Int8Weight if module.codes.dtype == torch.int8 else NF4Weight
    return kind(module.codes, module.scale)


def freeze(module: Any, kind: str, products: str = "full") -> None:
    """Quantize the weight of a Linear or of an embedding, and free it.

    Its parameter stays, without values. The product of a Linear is differentiable in the input only, and backward needs
    no saved activations.

    Args:
        kind: of `owlore_tune.quantized.formats.FORMATS`.
        products: ``full``: dequantize the weight, a piece at a time. ``int8``: quantize the input by row as well, and
            multiply 8-bit integers, in backward too; the weight must be int8.
    """
    weight = module.weight.detach()
    attach(module, quantize(weight, kind), products, weight.dtype)
    set_value(module.weight, weight.new_empty(0))


def attach(module: Any, weight: QuantizedWeight, products: str, dtype: torch.dtype) -> None:
    """Make ``module`` compute with a quantized weight, in ``dtype``."""
    # Buffers, so that they move with the model
    module.register_buffer("codes", weight.codes, persistent=False)
    module.register_buffer("scale", weight.scale, persistent=False)
    if isinstance(module, nn.Embedding):
        module.forward = partial(_rows, module, dtype)  # type: ignore[method-assign]
        return
    function = int8_linear if products == "int8" and isinstance(weight, Int8Weight) else quantized_linear
    module.forward = partial(_linear, module, function)


def requantize(module: Any, weight: Tensor, kind: str) -> None:
    """Overwrite the quantized weight of ``module``, in place."""
    new = quantize(weight, kind)
    module.codes.copy_(new.codes)
    module.scale.copy_(new.scale)


def thaw(module: Any, weight: Tensor) -> None:
    """Undo `freeze` with the full-precision ``weight``."""
    set_value(module.weight, weight)
    if is_quantized(module):
        del module.forward, module.codes, module.scale


@contextmanager
def in_full_precision(modules: dict[Any, Tensor]) -> Iterator[None]:
    """Have modules compute with full-precision weights, given by module, whatever their forward is outside."""
    kept = {module: vars(module).pop("forward") for module in modules}
    for module, weight in modules.items():
        set_value(module.weight, weight)
    try:
        yield
    finally:
        for module, forward in kept.items():
            module.forward = forward
            set_value(module.weight, module.weight.detach().new_empty(0))


def set_value(parameter: Tensor, value: Tensor) -> None:
    """Give ``parameter`` another value, of any shape and on any device; it stays the same object."""
    torch.utils.swap_tensors(parameter, nn.Parameter(value, parameter.requires_grad))


def rounding_error(module: Any, weight: Tensor, basis: Tensor, right: bool) -> Tensor:
    """(W₀ − Q(W₀)) P (m, r), or Pᵀ (W₀ − Q(W₀)) (r, n) on the left, of the quantized weight Q(W₀) of ``module``.

    Args:
        weight: W₀ (m, n).
        basis: P (n, r), or (m, r) on the left.
    """
    m, n = weight.shape
    stored, basis = weight_of(module), basis.float()
    product = torch.zeros(m if right else basis.shape[1], basis.shape[1] if right else n, device=basis.device)
    for rows in _pieces(m, n, basis.device):
        error = weight[rows].to(basis.device, torch.float32) - stored.dequantize(torch.float32, rows)
        if right:
            torch.mm(error, basis, out=product[rows])
        else:
            product.addmm_(basis[rows].T, error)
    return product


def _rows(embedding: nn.Embedding, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    """The embeddings of ``tokens``."""
    return weight_of(embedding).dequantize(dtype, tokens.flatten()).view(*tokens.shape, -1)


def _linear(linear: nn.Linear, function: Any, x: Tensor) -> Tensor:
    product = function(x, weight_of(linear))
    return product if linear.bias is None else product + linear.bias


def quantized_linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """``x`` (..., n) · weight (m, n)ᵀ → (..., m), with the weight dequantized."""
    return _QuantizedLinear.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])


def int8_linear(x: Tensor, weight: Int8Weight) -> Tensor:
    """``x`` (..., n) · weight (m, n)ᵀ → (..., m) with 8-bit products, exact sums and float32 scales.

    Where torch's 8-bit products are not exact, or do not take the sizes, the weight is dequantized.
    """
    num_rows = x.numel() // x.shape[-1]
    if x.is_cuda:
        takes = num_rows > 16 and not any(size % 8 for size in weight.shape)  # as cuBLAS
    else:
        takes = CPU_IS_EXACT and num_rows > 0 and min(weight.shape) > 1  # a single column gives wrong sums
    if not takes:
        return quantized_linear(x, weight)
    return _Int8Linear.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])


def _cpu_is_exact() -> bool:
    """Whether this CPU sums 8-bit products exactly. Without VNNI instructions, oneDNN adds pairs of them in 16 bits,
    which overflow."""
    largest = torch.full((2, 64), 127, dtype=torch.int8, device="cpu")
    return torch._int_mm(largest, largest.t())[0, 0].item() == 64 * 127 * 127


CPU_IS_EXACT = _cpu_is_exact()


def _pieces(length: int, width: int, device: torch.device) -> list[slice]:
    """Split ``length`` rows or columns of ``width`` values each, at whole blocks."""
    each = max(1, _PIECE.get(device.type, _LARGE_PIECE) // width // BLOCK) * BLOCK
    return [slice(start, min(start + each, length)) for start in range(0, length, each)]


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):  # (t, n)
        ctx.weight = weight
        m, n = weight.shape
        product = x.new_empty(len(x), m)
        for rows in _pieces(m, n, x.device):
            torch.mm(x, weight.dequantize(x.dtype, rows).T, out=product[:, rows])
        return product

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.weight
        m, n = weight.shape
        product = grad.new_empty(len(grad), n)
        for columns in _pieces(n, m, grad.device):  # not rows: their products would be summed in 16 bits
            torch.mm(grad, weight.dequantize(grad.dtype, columns=columns), out=product[:, columns])
        return product, None


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):  # (t, n)
        ctx.weight = weight
        return _int8_product(x, weight.codes.t(), weight.scale.view(1, -1)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.weight
        # The scales of the weight's rows run along the sum, so they go into the gradient before it is quantized.
        rows = grad * weight.scale.view(1, -1).to(grad.dtype)
        return _int8_product(rows, weight.codes, None).to(grad.dtype), None


def _int8_product(x: Tensor, codes: Tensor, column_scale: Tensor | None) -> Tensor:
    """``x`` (t, k), quantized by row, times ``codes`` (k, l) int8 → (t, l) float32."""
    largest = torch.maximum(x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True).neg_())  # without a copy of x
    scale = largest.float().clamp_min_(torch.finfo(torch.float32).tiny).div_(127)
    sums = torch._int_mm((x / scale).round_().to(torch.int8), codes)
    # float32 in the memory of int32: on a CPU, a second buffer of this size costs page faults
    product = sums.view(torch.float32).copy_(sums).mul_(scale)
    return product if column_scale is None else product.mul_(column_scale)
