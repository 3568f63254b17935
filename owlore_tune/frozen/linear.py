"""Linears whose weights are quantized while they are frozen."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from owlore_tune.frozen.formats import BLOCK, FrozenWeight, Int8Weight, quantize

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


def freeze(module: Any, kind: str, products: str = "full") -> None:
    """Quantize the weight of a Linear or of an embedding, and free it.

    Its parameter stays, without values, so that an optimizer keeps its reference. The product of a Linear is
    differentiable in the input only, and backward needs no saved activations.

    Args:
        kind: of `owlore_tune.frozen.formats.FORMATS`.
        products: ``full``: dequantize the weight, a piece at a time. ``int8``: quantize the input by row as well, and
            multiply 8-bit integers, in backward too; the weight must be int8.
    """
    weight = module.weight.detach()
    attach(module, quantize(weight, kind), products, weight.dtype)
    set_value(module.weight, weight.new_empty(0))


def attach(module: Any, frozen: FrozenWeight, products: str, dtype: torch.dtype) -> None:
    """Make ``module`` compute with a quantized weight, in ``dtype``."""
    module.frozen_weight = frozen
    if isinstance(module, nn.Embedding):
        module.forward = partial(_rows, frozen, dtype)  # type: ignore[method-assign]
        return
    function = int8_linear if products == "int8" and isinstance(frozen, Int8Weight) else frozen_linear
    module.forward = partial(_linear, module, function)


def thaw(module: Any, weight: Tensor) -> None:
    """Undo `freeze` with the full-precision ``weight``."""
    set_value(module.weight, weight)
    if "forward" in vars(module):
        del module.forward, module.frozen_weight


def set_value(parameter: Tensor, value: Tensor) -> None:
    """Give ``parameter`` another value, of any shape and on any device; it stays the same object."""
    torch.utils.swap_tensors(parameter, nn.Parameter(value, parameter.requires_grad))


def _rows(frozen: FrozenWeight, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    """The embeddings of ``tokens``."""
    return frozen.dequantize(dtype, tokens.flatten()).view(*tokens.shape, -1)


def _linear(linear: nn.Linear, function: Any, x: Tensor) -> Tensor:
    product = function(x, linear.frozen_weight)
    return product if linear.bias is None else product + linear.bias


def frozen_linear(x: Tensor, weight: FrozenWeight) -> Tensor:
    """``x`` (..., n) · weight (m, n)ᵀ → (..., m), with the weight dequantized."""
    return _FrozenLinear.apply(x, weight)


def int8_linear(x: Tensor, weight: Int8Weight) -> Tensor:
    """``x`` (..., n) · weight (m, n)ᵀ → (..., m) with 8-bit products, exact sums and float32 scales.

    Where torch's 8-bit products are not exact, or do not take the sizes, the weight is dequantized.
    """
    num_rows = x.numel() // x.shape[-1]
    if x.is_cuda:
        takes = num_rows > 16 and not any(size % 8 for size in weight.shape)  # as cuBLAS
    else:
        takes = CPU_IS_EXACT and num_rows > 0 and min(weight.shape) > 1  # a single column gives wrong sums
    return _Int8Linear.apply(x, weight) if takes else frozen_linear(x, weight)


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


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        m, n = weight.shape
        inputs, product = x.reshape(-1, n), x.new_empty(*x.shape[:-1], m)
        for rows in _pieces(m, n, x.device):
            torch.mm(inputs, weight.dequantize(x.dtype, rows).T, out=product.view(-1, m)[:, rows])
        return product

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.weight
        m, n = weight.shape
        grads, product = grad.reshape(-1, m), grad.new_empty(*grad.shape[:-1], n)
        for columns in _pieces(n, m, grad.device):  # not rows: their products would be summed in 16 bits
            torch.mm(grads, weight.dequantize(grad.dtype, columns=columns), out=product.view(-1, n)[:, columns])
        return product, None


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        rows = x.reshape(-1, x.shape[-1])
        product = _int8_product(rows, weight.codes.t(), weight.scale.view(1, -1))
        return product.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.weight
        # The scales of the weight's rows run along the sum, so they go into the gradient before it is quantized.
        rows = grad.reshape(-1, grad.shape[-1]) * weight.scale.view(1, -1).to(grad.dtype)
        return _int8_product(rows, weight.codes, None).to(grad.dtype).view(*grad.shape[:-1], -1), None


def _int8_product(x: Tensor, codes: Tensor, column_scale: Tensor | None) -> Tensor:
    """``x`` (t, k), quantized by row, times ``codes`` (k, l) int8 → (t, l) float32."""
    largest = torch.maximum(x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True).neg_())  # without a copy of x
    scale = largest.float().clamp_min_(torch.finfo(torch.float32).tiny).div_(127)
    sums = torch._int_mm((x / scale).round_().to(torch.int8), codes)
    # float32 in the memory of int32: on a CPU, a second buffer of this size costs page faults
    product = sums.view(torch.float32).copy_(sums).mul_(scale)
    return product if column_scale is None else product.mul_(column_scale)
