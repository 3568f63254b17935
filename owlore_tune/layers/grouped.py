"""Experts of a layer that compute together on a GPU: one product for each of their three matrices.

The host then does not wait for the number of tokens of each expert.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owlore_tune.models.experts import Experts
from owlore_tune.optim.weights import ProjectedWeight, stacked_update
from owlore_tune.quantized.linear import is_quantized

_MULTIPLE = 8  # torch's grouped product takes rows of 16 bytes


def has_grouped_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies groups of rows with one matrix each in one launch.

    Only in bfloat16 on compute capability 9 and 10 (H100, B200). Elsewhere it multiplies them one after the other, and
    waits for their sizes in each product. A plan that is made without a GPU is one for these cards.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] in (9, 10)


def group_experts(model: nn.Module, device: torch.device, *, sharded: bool = False) -> None:
    """Let the experts of each layer of ``model`` compute together, if ``device`` has a product for it.

    Args:
        model: with its weights, quantized or not, which may change later.
        sharded: whether FSDP2 shards it, and so owns the memory of its weights.
    """
    if not has_grouped_product(device, next(model.parameters()).dtype):
        return
    for module in model.modules():
        if isinstance(module, Experts):
            module.together = GroupedExperts(module, sharded=sharded)
            module.together.join()


class GroupedExperts:
    """Computes the experts of one layer together.

    Args:
        experts: with their weights.
        sharded: see `group_experts`.
    """

    def __init__(self, experts: Experts, *, sharded: bool = False) -> None:
        self._matrices = [
            GroupedLinears([expert[name] for expert in experts], sharded=sharded)  # type: ignore[index]
            for name in experts.names
        ]
        self._activation = experts.activation

    def join(self) -> None:
        """Move the weights into one block of memory for each matrix, before activations take memory.

        Not if FSDP2 owns them.
        """
        for linears in self._matrices:
            if not linears.sharded:
                linears.parts()

    def can_compute(self) -> bool:
        """Whether no expert has to compute on its own, see `GroupedLinears.can_compute`."""
        return all(linears.can_compute() for linears in self._matrices)

    def __call__(self, x: Tensor, experts: Tensor) -> Tensor:  # (t, n), (t,) ascending → (t, n)
        """The output for each row of ``x`` of the expert in ``experts``."""
        gate, up, down = self._matrices
        each = torch.arange(len(gate), dtype=experts.dtype, device=experts.device)
        ends = torch.searchsorted(experts, each, right=True, out_int32=True)
        return down(self._activation(torch.cat([gate(x, ends), up(x, ends)], dim=-1)), ends)


class GroupedLinears:
    """Linears of one shape, which compute the rows of an input one after the other.

    Their weights, or the tensors of their quantized weights, lie in one block of memory, into which the next product
    moves them if they do not. They may change in place. Quantized weights are all dequantized at once.

    Args:
        linears: with weights (m, n), and without biases.
        sharded: see `group_experts`. Weights are then copied for each product.
    """

    def __init__(self, linears: list[Any], *, sharded: bool = False) -> None:
        self._linears = linears
        self.sharded = sharded

    def __len__(self) -> int:
        return len(self._linears)

    def can_compute(self) -> bool:
        """Whether no weight trains as it is or has to make a basis, no Linear has hooks, and torch takes the sizes."""
        first, projected = self._linears[0], self._projected()
        if not isinstance(first, nn.Linear):  # such as LoRA's
            return False
        if any(linear._forward_pre_hooks or linear._forward_hooks for linear in self._linears):
            return False
        if not projected and any(linear._parameters["weight"].requires_grad for linear in self._linears):
            return False
        sizes = [first.in_features, first.out_features, *(weight.rank for weight in projected[:1])]
        alike = {(weight.basis is None, weight.correction is None, weight.decay) for weight in projected}
        return (
            not any(size % _MULTIPLE for size in sizes)
            and len(projected) in (0, len(self))
            and (not alike or (len(alike) == 1 and projected[0].basis is not None))
        )

    def __call__(self, x: Tensor, ends: Tensor) -> Tensor:  # (t, n), (e,) → (t, m)
        """The product of each Linear with the rows of ``x`` from the end of the one before it to its own."""
        product = _GroupedProduct.apply(x, ends, self)
        if projected := self._projected():
            decay, first, second = stacked_update(projected, x.dtype)
            for factor in (first, second):
                if factor.requires_grad:
                    factor.register_hook(partial(without_empty, ends))
            if decay is not None:
                product = product * decay
            product.add_(F.grouped_mm(F.grouped_mm(x, first, offs=ends), second, offs=ends))
        return product

    def weights(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """(e, m, n) the weights without updates, from their `parts`; in ``dtype`` if they are quantized."""
        first = self._linears[0]
        joined = first.weight_format(*parts).dequantize(dtype) if self._is_quantized() else parts[0]
        return joined.view(len(self), first.out_features, first.in_features)

    def parts(self) -> list[Tensor]:
        """The tensors of the weights, each of all Linears, one below the other."""
        names = self._linears[0].weight_names if self._is_quantized() else ["weight"]
        return [self._joined(name) for name in names]

    def _is_quantized(self) -> bool:
        return not self._linears[0].weight.numel()

    def _projected(self) -> list[ProjectedWeight]:
        """The projected weights of the Linears that compute with them."""
        known = map(vars, self._linears)
        return [own["projected"] for own in known if "projected" in own and "forward" in own]

    def _joined(self, name: str) -> Tensor:
        kept = "_parameters" if name == "weight" else "_buffers"
        tensors = [vars(linear)[kept][name] for linear in self._linears]  # getattr takes longer than the check
        first = tensors[0].detach()
        if _lie_in_one_block(tensors):
            return first.as_strided((len(self) * len(first), *first.shape[1:]), first.stride())
        with torch.no_grad(), torch.inference_mode(False):
            joined = torch.cat(tensors)
        # Full-precision weights that quantized Linears have for a while stay where they are.
        if not self.sharded and (self._is_quantized() or not is_quantized(self._linears[0])):
            for tensor, own in zip(tensors, joined.split(len(first)), strict=True):
                tensor.data = own
        return joined


def _lie_in_one_block(tensors: list[Tensor]) -> bool:
    """Whether tensors of one shape are one after the other in the memory of the first one."""
    first = tensors[0]
    if first.is_meta:  # has no address
        places = [(each.untyped_storage()._cdata, each.storage_offset()) for each in tensors]
        return places == [(places[0][0], places[0][1] + i * first.numel()) for i in range(len(tensors))]
    end = (first.storage_offset() + len(tensors) * first.numel()) * first.itemsize
    starts = range(first.data_ptr(), first.data_ptr() + len(tensors) * first.nbytes, first.nbytes)
    return end <= first.untyped_storage().nbytes() and all(
        tensor.data_ptr() == start and tensor.is_contiguous() for tensor, start in zip(tensors, starts, strict=True)
    )


def without_empty(ends: Tensor, grad: Tensor) -> Tensor:  # (e,), (e, n, r)
    """The gradient of weights for each group, 0 for groups without rows, which some cards leave as memory is."""
    is_empty = (ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None]
    if grad.is_contiguous():
        return grad.masked_fill(is_empty, 0)
    return grad.mT.masked_fill(is_empty, 0).mT  # with its strides, or each A would copy its own gradient


class _GroupedProduct(torch.autograd.Function):
    """Differentiable in the input. Backward needs no saved activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, linears: GroupedLinears) -> Tensor:
        parts = linears.parts()
        ctx.save_for_backward(ends)
        ctx.linears, ctx.parts = linears, None if linears.sharded else parts
        return F.grouped_mm(x, linears.weights(parts, x.dtype).mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (ends,) = ctx.saved_tensors
        parts = ctx.parts or ctx.linears.parts()
        return F.grouped_mm(grad.contiguous(), ctx.linears.weights(parts, grad.dtype), offs=ends), None, None
