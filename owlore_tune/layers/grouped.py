"""Experts of a layer that compute together on a GPU: one product for each of their three matrices.

The host then does not wait for the number of tokens of each expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owlore_tune.models.hf_experts import Experts
from owlore_tune.optim.projected import ProjectedWeight, stacked_update

_MULTIPLE = 8  # torch's grouped product takes rows of 16 bytes


def group_experts(model: nn.Module, device: torch.device, *, sharded: bool = False) -> None:
    """Let the experts of each layer of ``model`` compute together on a GPU.

    Only for bfloat16, because torch has no such product of other types on a GPU.

    Args:
        model: with its weights, quantized or not, which may change later.
        sharded: whether FSDP2 shards it, and so owns the memory of its weights.
    """
    if device.type != "cuda" or next(model.parameters()).dtype != torch.bfloat16:
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
        """Move the weights into one block of memory for each matrix, unless FSDP2 owns them."""
        for linears in self._matrices:
            linears.join()

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
        self._sharded = sharded

    def __len__(self) -> int:
        return len(self._linears)

    def can_compute(self) -> bool:
        """Whether no weight trains as it is or has to make a basis, and all sizes are multiples of 8."""
        first, projected = self._linears[0], self._projected()
        if not projected and any(linear.weight.requires_grad for linear in self._linears):
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
            if decay is not None:
                product = product * decay
            product.add_(F.grouped_mm(F.grouped_mm(x, first, offs=ends), second, offs=ends))
        return product

    def weights(self, dtype: torch.dtype) -> Tensor:
        """(e, m, n) the weights without updates."""
        first, parts = self._linears[0], self._parts()
        joined = first.weight_format(*parts).dequantize(dtype) if self._is_quantized() else parts[0]
        return joined.view(len(self), first.out_features, first.in_features)

    def join(self) -> None:
        if not self._sharded:
            self._parts()

    def _is_quantized(self) -> bool:
        return not self._linears[0].weight.numel()

    def _parts(self) -> list[Tensor]:
        """The tensors of the weights, each of all Linears."""
        names = self._linears[0].weight_names if self._is_quantized() else ["weight"]
        return [self._joined(name) for name in names]

    def _projected(self) -> list[ProjectedWeight]:
        """The projected weights of the Linears that compute with them."""
        known = map(vars, self._linears)
        return [own["projected"] for own in known if "projected" in own and "forward" in own]

    def _joined(self, name: str) -> Tensor:
        """A tensor of all Linears, one below the other."""
        tensors = [getattr(linear, name).detach() for linear in self._linears]
        first, size = tensors[0], tensors[0].numel()
        place = first.untyped_storage()._cdata
        if all(
            tensor.untyped_storage()._cdata == place
            and tensor.storage_offset() == first.storage_offset() + i * size
            and tensor.is_contiguous()
            for i, tensor in enumerate(tensors)
        ):
            return first.as_strided((len(self) * len(first), *first.shape[1:]), first.stride())
        joined = torch.cat(tensors)
        if not self._sharded:
            for linear, own in zip(self._linears, joined.split(len(first)), strict=True):
                getattr(linear, name).data = own
        return joined


class _GroupedProduct(torch.autograd.Function):
    """Differentiable in the input. Backward needs no saved activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, linears: GroupedLinears) -> Tensor:
        ctx.save_for_backward(ends)
        ctx.linears = linears
        return F.grouped_mm(x, linears.weights(x.dtype).mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (ends,) = ctx.saved_tensors
        return F.grouped_mm(grad.contiguous(), ctx.linears.weights(grad.dtype), offs=ends), None, None
