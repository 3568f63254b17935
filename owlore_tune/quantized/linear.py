"""Linears and embeddings with quantized weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from owlore_tune.quantized.formats import QuantizedWeight, format_of, rows_at_once


def quantizable_outside(model: Any) -> list[nn.Linear | nn.Embedding]:
    """Embeddings and output head of a decoder, if they have weights of their own and compute nothing else."""
    if isinstance(model.output, TiedLinear):
        return []
    plain = (nn.Embedding.forward, nn.Linear.forward)
    return [module for module in (model.tok_embeddings, model.output) if type(module).forward in plain]


def is_quantized(module: nn.Module) -> bool:
    return hasattr(module, "weight_format")


def weight_of(module: Any) -> QuantizedWeight:
    """The quantized weight of a module."""
    return module.weight_format(*[getattr(module, name) for name in module.weight_names])


def quantize(module: Any, kind: str, products: str = "full") -> None:
    """Quantize the weight of a Linear or of an embedding, and free it.

    Its parameter stays, without values. The product of a Linear is differentiable in the input only, and backward needs
    no saved activations.

    Args:
        kind: of `owlore_tune.quantized.formats.FORMATS`.
        products: ``full``: dequantize the weight, a piece at a time. ``int8``: quantize the input by row as well, and
            multiply 8-bit integers, in backward too, if the weight is int8.
    """
    weight = module.weight.detach()
    attach(module, format_of(weight.shape, kind).quantize(weight), products, weight.dtype)
    set_value(module.weight, weight.new_empty(0))


def attach(module: Any, weight: QuantizedWeight, products: str, dtype: torch.dtype) -> None:
    """Make ``module`` compute with a quantized weight, in ``dtype``.

    Its forward becomes a method, because torch compiles a partial anew for each module.
    """
    module.weight_format, module.weight_names = type(weight), list(weight.tensors())
    module.products, module.weight_dtype = products, dtype
    for name, tensor in weight.tensors().items():  # buffers, so that they move with the model
        module.register_buffer(name, tensor, persistent=False)
    module.forward = MethodType(_rows if isinstance(module, nn.Embedding) else _linear, module)


def requantize(module: Any, weight: Tensor) -> None:
    """Overwrite the quantized weight of ``module``, in place."""
    for name, tensor in module.weight_format.quantize(weight).tensors().items():
        getattr(module, name).copy_(tensor)


def restore(module: Any, weight: Tensor) -> None:
    """Undo `quantize` with the full-precision ``weight``."""
    set_value(module.weight, weight)
    if is_quantized(module):
        for name in (*module.weight_names, "forward", "weight_format", "weight_names", "products", "weight_dtype"):
            delattr(module, name)


@contextmanager
def in_full_precision(modules: dict[Any, Tensor]) -> Iterator[None]:
    """Have modules compute with full-precision weights, given by module, during the block."""
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
    trains = parameter.requires_grad
    parameter.requires_grad_(True)  # a graph that still exists may have its node of autograd, which is swapped too
    torch.utils.swap_tensors(parameter, nn.Parameter(value, trains))


def rounding_error(module: Any, weight: Tensor, basis: Tensor, right: bool) -> Tensor:
    """(W₀ − Q(W₀)) P (m, r), or Pᵀ (W₀ − Q(W₀)) (r, n) on the left, of the quantized weight Q(W₀) of ``module``.

    Args:
        weight: W₀ (m, n).
        basis: P (n, r), or (m, r) on the left.
    """
    m, n = weight.shape
    stored, basis = weight_of(module), basis.float()
    product = torch.zeros(m if right else basis.shape[1], basis.shape[1] if right else n, device=basis.device)
    each = rows_at_once(n, basis.device)
    for rows in (slice(start, start + each) for start in range(0, m, each)):
        piece = weight[rows].to(basis.device, non_blocking=True)  # a copy to another dtype would wait for the host
        error = piece.float() - stored.dequantize(torch.float32, rows)
        if right:
            torch.mm(error, basis, out=product[rows])
        else:
            product.addmm_(basis[rows].T, error)
    return product


def _rows(embedding: Any, tokens: Tensor) -> Tensor:
    """The embeddings of ``tokens``."""
    return weight_of(embedding).dequantize(embedding.weight_dtype, tokens.flatten()).view(*tokens.shape, -1)


def _linear(linear: Any, x: Tensor) -> Tensor:  # (..., n) → (..., m)
    product = weight_of(linear).linear(x.reshape(-1, x.shape[-1]), linear.products)
    product = product.view(*x.shape[:-1], product.shape[-1])
    return product if linear.bias is None else product + linear.bias
