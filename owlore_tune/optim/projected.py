"""The projected form of a weight: W = c · W₀ + s · A Pᵀ, in which any optimizer trains A.

Between two refreshes of its basis P (n, r), GaLore's update moves a weight only in the span of P (arXiv 2403.03507). So
W₀ (m, n) stays as it is, in any format, and A (m, r) is the sum of the updates. It starts at 0, and its gradient is
G P = (∂L/∂y)ᵀ (x P), for an input x and the output's gradient. No full gradient exists, and backward keeps x P (t, r)
instead of x (t, n). c is the product of the decay factors, and s a constant scale. When a basis ends, W₀ absorbs the
rest (`ProjectedWeight.merge`). This is the duality of gradient projections and adapters (arXiv 2502.13811) with a basis
that changes.

On the left side (GaLore's rule for wide weights), W = c · W₀ + s · P A with P (m, r) and A (r, n).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owlore_tune.optim.projection import is_right, product_range_finder, side_factor, svd_basis, times
from owlore_tune.optim.rounding import noise_for, round_to

MakeGenerator = Callable[[torch.device], torch.Generator]
_TENSORS = ("basis", "energy", "turn", "_start", "_correction")
_MOVED = 2**22  # values of a 16-bit weight that a merge changes at once


class ProjectedWeight:
    """The trained part of the weight of one Linear.

    While it is attached, the Linear computes with c · W₀ + s · A Pᵀ. W₀ is the Linear's weight, or its quantized weight
    (`owlore_tune.frozen.linear.freeze`), and gets no gradient. A new basis is computed in the first backward pass
    without one, from the input and the output's gradient of that Linear. A is 0 until then.

    Args:
        linear: with a weight (m, n).
        rank: r, below min(m, n).
        side: ``right``, or ``shape`` for GaLore's rule (the shorter side).
        scale: factor on the update. With side ``right``, the update of a wide weight is also multiplied by √(n/m).
        basis: ``randomized``, or ``svd`` (exact, slow, and it needs the full gradient once).
        generator: returns the generator of a basis' random sketch, on a device.

    Attributes:
        trained: A, (m, r) or (r, n), float32, or float64 for float64 weights.
        basis: P, (n, r) or (m, r), in A's dtype; None until the next backward pass.
        energy: share of the gradient's energy in the basis, estimated when it was made.
        turn: (r, r) old basisᵀ · new basis, until the moments are carried over; None without an old one.
        decay: c.
        age: optimizer steps with this basis.

    Raises:
        ValueError: if ``rank`` is not below the shorter side.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        *,
        generator: MakeGenerator,
        side: str = "right",
        scale: float = 1.0,
        basis: str = "randomized",
    ) -> None:
        self._linear = linear
        self.shape = torch.Size((linear.out_features, linear.in_features))
        m, n = self.shape
        if not 0 < rank < min(m, n):
            raise ValueError(f"rank={rank}; it must be below the shorter side of a weight of shape {(m, n)}")
        self.rank = rank
        self.right = is_right(self.shape, side)
        self._scale = scale * (side_factor(self.shape) if self.right else 1.0)
        self._kind = basis
        self._generator = generator
        weight = linear.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = (m, rank) if self.right else (rank, n)
        self.trained = nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device))
        self.basis: Tensor | None = None
        self.energy: Tensor | None = None
        self.turn: Tensor | None = None
        self.decay = 1.0
        self.age = 0
        self._start: Tensor | None = None  # the last basis
        self._correction: Tensor | None = None
        self._size = self.trained.shape
        weight.requires_grad_(False)
        self.engage()

    def engage(self) -> None:
        """Let the Linear compute with A, which is 0, beside its own forward, which may be that of quantized weights."""
        self.trained.data = self.trained.new_zeros(self._size)
        self._own_forward = self._linear.forward
        self._linear.forward = self.forward  # type: ignore[method-assign, assignment]

    def release(self) -> None:
        """Give the Linear its own forward back, and free A and the basis. Without `merge` before, updates are lost."""
        self._linear.forward = self._own_forward  # type: ignore[method-assign]
        self.trained.data = self.trained.new_empty(0)
        self.basis = self.turn = self.energy = self._start = self._correction = None
        self.decay, self.age = 1.0, 0

    def forward(self, x: Tensor) -> Tensor:  # (..., n) → (..., m)
        """The Linear's forward, with the weight c · W₀ + s · A Pᵀ."""
        product, bias = self._own_forward(x), self._linear.bias
        if self.decay != 1.0:
            product = product * self.decay if bias is None else (product - bias) * self.decay + bias
        if self.basis is not None:
            return product + self._update_of(x)
        return _WithNewBasis.apply(product, x.detach(), self.trained, self) if torch.is_grad_enabled() else product

    def _update_of(self, x: Tensor) -> Tensor:
        """x (s · A Pᵀ)ᵀ. The gradient of A is that of s = 1, so that clipping and eps do not depend on s."""
        assert self.basis is not None
        factor = self.trained if self._scale == 1.0 else self.trained + (self._scale - 1) * self.trained.detach()
        if self._correction is not None:
            factor = factor + self._correction
        basis, factor = self.basis.to(x.dtype), factor.to(x.dtype)
        return F.linear(x @ basis, factor) if self.right else F.linear(F.linear(x, factor), basis)

    def make_basis(self, x: Tensor, grad: Tensor) -> Tensor:  # (..., n), (..., m) → the gradient of A
        """Make the basis from the Linear's input and its output's gradient, unless there is one already."""
        x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if self.basis is None:
            rows, columns = (grad, x) if self.right else (x, grad)  # the basis is of the second one's features
            if self._kind == "svd":
                basis, energy = svd_basis(times(grad.T, x.to(self.trained.dtype)), self.rank, self.right)
            else:
                generator = self._generator(x.device)
                basis, energy = product_range_finder(rows, columns, self.rank, generator=generator, start=self._start)
            if energy.isnan():  # a zero gradient, or one that is not finite: a later one gives the basis
                is_finite = grad.isfinite().all() & x.isfinite().all()
                return torch.full_like(self.trained, 0.0 if is_finite else math.nan)
            self.basis, self.energy = basis.to(self.trained.dtype), energy
            self.turn = None if self._start is None else self._start.T @ self.basis
        if self.right:
            return times(grad.T, times(x, self.basis))
        return times(times(grad, self.basis).T, x.to(self.basis.dtype))

    def correct(self, error: Tensor) -> None:
        """Make a quantized weight exact within the basis.

        Otherwise A would also learn to undo the rounding of W₀, which is wrong for the merged weight.

        Args:
            error: W₀ − Q(W₀), (m, n).
        """
        assert self.basis is not None
        product = times(error, self.basis) if self.right else times(error.T, self.basis).T
        self._correction = product.to(torch.bfloat16)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that an exact resume needs, beside W₀ itself, which `merge` has not changed since."""
        tensors = {key: getattr(self, key) for key in _TENSORS}
        return {"trained": self.trained.detach(), "decay": self.decay, "age": self.age, **tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state, device = dict(state_dict), self.trained.device
        self.trained.data = state.pop("trained").to(device, copy=True)
        for key, value in state.items():
            setattr(self, key, value.to(device, copy=True) if torch.is_tensor(value) else value)

    @torch.no_grad()
    def merge(self, weight: Tensor, *, stochastic: bool = True) -> None:
        """``weight`` (m, n) ← c · weight + s · A Pᵀ. Then A is 0, c is 1, and the next backward makes a new basis.

        Args:
            weight: W₀ in full precision. It is rounded once.
            stochastic: round a bfloat16 weight stochastically.
        """
        if self.basis is not None:
            rows, columns = (self.trained, self.basis.T) if self.right else (self.basis, self.trained)
            self._move(weight, rows.to(weight.device), columns.to(weight.device), stochastic)
            self._start = self.basis
        elif self.decay != 1.0:
            weight.mul_(self.decay)
        self.trained.zero_()
        self.basis, self.decay, self.age, self._correction = None, 1.0, 0, None

    def _move(self, weight: Tensor, rows: Tensor, columns: Tensor, stochastic: bool) -> None:
        if weight.dtype == rows.dtype:
            weight.addmm_(rows, columns, beta=self.decay, alpha=self._scale)
            return
        pieces = -(-weight.numel() // _MOVED) or 1
        for some, some_rows in zip(weight.tensor_split(pieces), rows.tensor_split(pieces), strict=True):
            round_to(some, (some_rows @ columns).mul_(self._scale), noise_for(some, stochastic), self.decay)


class _WithNewBasis(torch.autograd.Function):
    """The product of a Linear without a basis, whose backward makes one, and with it the gradient of A."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, x: Tensor, trained: Tensor, weight: ProjectedWeight) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        ctx.mark_dirty(product)  # the same tensor: a copy would cost its memory
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad, None, ctx.weight.make_basis(x, grad), None
