"""The two forms in which a weight trains: projected, or as it is (`WholeParameter`).

The projected form is W = c · W₀ + s · A Pᵀ, in which any optimizer trains A. Between two refreshes of its basis P (n,
r), GaLore's update moves a weight only in the span of P (arXiv 2403.03507). So W₀ (m, n) stays as it is, in any format,
and A (m, r) is the sum of the updates. It starts at 0, and its gradient is G P = (∂L/∂y)ᵀ (x P), for an input x and the
output's gradient. No full gradient exists, and backward keeps x P (t, r) instead of x (t, n). c is the product of the
decay factors, and s a constant scale. When a basis ends, W₀ absorbs the rest (`ProjectedWeight.merge_into`). This is
the duality of gradient projections and adapters (arXiv 2502.13811) with a basis that changes. On the left side
(GaLore's rule for wide weights), W = c · W₀ + s · P A with P (m, r) and A (r, n).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from owlore_tune.distributed.world import ALONE, World, compute_device, local, rows_of
from owlore_tune.measure import Clock
from owlore_tune.optim.bases import (
    Basis,
    BasisMaker,
    Sketch,
    is_right,
    of_gradient,
    side_factor,
    sketch,
    svd_basis,
    times,
)


def round_to(weight: Tensor, change: Tensor, noise: Tensor | None, decay: float = 0.0) -> None:
    """``weight`` ← decay · weight + change, computed in the dtype of ``change``, which may be overwritten.

    Args:
        noise: see `noise_for`. A float32 value goes to one of its two neighbors in bfloat16, and is exact on average.
            None rounds to the nearest value.
    """
    moved = change.add_(weight, alpha=decay) if decay else change
    if noise is None:
        weight.copy_(moved)
        return
    # The upper 16 bits of a float32 are a bfloat16. Noise of 0 to 65535 in the lower ones carries into them.
    bits = moved.view(torch.int32).add_(noise).add_(2**15).bitwise_and_(-(2**16))
    weight.copy_(bits.view(torch.float32))


def noise_for(weight: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """Uniform int16 noise in the shape of ``weight``; None without a ``generator``, or if it is not bfloat16.

    Four values come from one random number, because a CPU generates these one after the other.
    """
    if generator is None or weight.dtype != torch.bfloat16:
        return None
    words = torch.empty(-(-weight.numel() // 4), dtype=torch.int64, device=weight.device)
    words.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return words.view(torch.int16)[: weight.numel()].view(weight.shape)


MakeGenerator = Callable[[torch.device], torch.Generator | None]
_TENSORS = ("basis", "is_given", "turn", "start", "correction")
_MOVED = 2**22  # values of a 16-bit weight that a merge changes at once


def stacked_update(weights: "list[ProjectedWeight]", dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor]:
    """The updates of weights that all have a basis, the same c and the same settings, such as those of experts.

    Returns:
        c, None if it is 1; and two factors in ``dtype``, (e, n, r) and (e, r, m), whose product is (s · A Pᵀ)ᵀ.
    """
    trained, bases, corrections = zip(*[(w.trained, w.basis, w.correction) for w in weights], strict=True)
    correction = None if corrections[0] is None else torch.stack(corrections)
    return weights[0]._decay, *weights[0]._factors(torch.stack(trained), torch.stack(bases), correction, dtype)


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which a parameter is trained: float32, or float64 for float64 parameters."""
    return torch.promote_types(parameter.dtype, torch.float32)


class ProjectedWeight:
    """The trained part of the weight of one Linear.

    From `engage` to `release`, the Linear computes with c · W₀ + s · A Pᵀ. W₀ is the Linear's weight, or its quantized
    weight (`owlore_tune.quantized`), and gets no gradient. The first backward pass without a basis makes one, from the
    input and the output's gradient of that Linear. A is 0 until then.

    Args:
        linear: with a weight (m, n), whose rows FSDP2 may shard.
        rank: r, below min(m, n).
        side: ``right``, or ``shape`` for GaLore's rule (the shorter side).
        scale: factor on the update. With side ``right``, the update of a wide weight is also multiplied by √(n/m), the
            ratio of the sizes of GaLore's updates on the two sides.
        basis: ``randomized``, or ``svd`` (exact, slow, and it needs the full gradient once).
        generator: returns the generator of a basis' random sketch, on a device.
        world: processes that train on different tokens of one step. All get the same basis.
        maker: makes the bases of several weights together; None for an own one.

    Attributes:
        trained: A, (m, r) or (r, n), in float32, or float64 for float64 weights. Empty if the Linear is not engaged.
        basis: P, (n, r) or (m, r), in the weight's dtype; None until the next backward pass.
        is_given: () whether the first gradient gave the basis; False for one that is zero or not finite.
        start: the basis before this one, from which the next one starts.
        turn: (r, r) old basisᵀ · new basis; None without an old one.
        correction: (W₀ − Q(W₀)) P of a quantized weight Q(W₀), in A's shape, in the weight's dtype.
        is_new: whether no optimizer step has used the basis yet.
        decay: c.
        clock: measures the making of bases.
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
        world: World = ALONE,
        maker: BasisMaker | None = None,
    ) -> None:
        self.linear = linear
        m, n = self.shape = torch.Size((linear.out_features, linear.in_features))
        self.right = is_right(self.shape, side)
        self.size = torch.Size((m, rank) if self.right else (rank, n))
        self.rank = rank
        self._scale = scale * (side_factor(self.shape) if self.right else 1.0)
        self._kind = basis
        self._generator = generator
        self.world = world
        self._maker = maker or BasisMaker()
        self.clock = Clock(self.device)
        self._dtype = compute_dtype(linear.weight)
        self.trained = nn.Parameter(torch.empty(0, dtype=self._dtype), requires_grad=False)
        linear.weight.requires_grad_(False)
        self.forget()

    def forget(self) -> None:
        """Have no basis, as in the beginning."""
        self.basis: Tensor | None = None
        self.is_given: Tensor | None = None
        self.start: Tensor | None = None
        self.turn: Tensor | None = None
        self.correction: Tensor | None = None
        self.is_new = False
        self.decay = 1.0
        self._decay: Tensor | None = None  # () of the host: a number would be a constant of a compiled layer

    @property
    def device(self) -> torch.device:
        """Where the Linear computes."""
        return compute_device(self.linear.weight)

    def engage(self) -> None:
        """Let the Linear compute with A, which is 0, beside its own forward, which may be that of quantized weights."""
        self.trained.data = torch.zeros(self.size, dtype=self._dtype, device=self.device)
        self.trained.requires_grad_(True)
        self.clock = Clock(self.device)
        self._own_forward = self.linear.forward
        self.linear.forward = self.forward  # type: ignore[method-assign, assignment]
        self.linear.projected = self  # type: ignore[assignment]

    def release(self, *, forget: bool = True) -> None:
        """Give the Linear its own forward back, and free A. Without a merge before, its updates are lost.

        Args:
            forget: also free the basis.
        """
        self.linear.forward = self._own_forward  # type: ignore[method-assign]
        del self.linear.projected
        self.trained.requires_grad_(False)
        self.trained.grad = None
        self.trained.data = torch.empty(0, dtype=self._dtype, device=self.trained.device)
        if forget:
            self.forget()

    def forward(self, x: Tensor) -> Tensor:  # (..., n) → (..., m)
        """The Linear's forward, with the weight c · W₀ + s · A Pᵀ."""
        rows = x.reshape(-1, x.shape[-1])
        product, bias = self._own_forward(rows), self.linear.bias
        if self._decay is not None:
            shift = None if bias is None else bias.to(product.dtype)  # which autocast may round
            product = product * self._decay if shift is None else (product - shift) * self._decay + shift
        if self.basis is not None:
            product = self._with_update(product, rows)
        elif torch.is_grad_enabled() and (len(rows) or self.world.size > 1):  # other processes may have rows
            product = _WithNewBasis.apply(product, rows.detach(), self.trained, self)
        return product.view(*x.shape[:-1], product.shape[-1])

    def _with_update(self, product: Tensor, x: Tensor) -> Tensor:
        """``product`` + x (s · A Pᵀ)ᵀ.

        The gradient of A is that of s = 1, so that clipping and eps do not depend on s.
        """
        assert self.basis is not None
        first, second = self._factors(self.trained, self.basis, self.correction, x.dtype)
        return product.addmm_((x @ first).to(product.dtype), second.to(product.dtype))  # autocast may round products

    def _factors(
        self, trained: Tensor, basis: Tensor, correction: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The two factors of (s · A Pᵀ)ᵀ, also of several such weights whose tensors are stacked."""
        factor = trained if self._scale == 1.0 else trained + (self._scale - 1) * trained.detach()
        if correction is not None:
            factor = factor + correction
        factor, basis = factor.to(dtype), basis.to(dtype)
        return (basis, factor.mT) if self.right else (factor.mT, basis.mT)

    def make_basis(self, x: Tensor, grad: Tensor) -> Tensor | None:  # (t, n), (t, m) → the gradient of A
        """Make the basis from the Linear's input and its output's gradient, unless there is one already.

        Returns None for a randomized basis: until the backward pass ends, A gets its gradient from `take_basis`. For a
        gradient that is zero or not finite, the basis is arbitrary.
        """
        rows, features = (grad, x) if self.right else (x, grad)  # the basis is of the second one's features

        def low(columns: Tensor) -> Tensor:
            return of_gradient(rows.T, features, columns, self._dtype)

        def make() -> Sketch:
            generator = self._generator(rows.device)
            return sketch(rows, features, self.rank, generator=generator, start=self.start, world=self.world)

        if self.basis is None and self._kind == "randomized":
            if self._maker.defer(self, make, low):
                return None
        elif self.basis is None:
            with self.clock("basis"):
                whole = self.world.sum_(times(grad.T, x.to(self._dtype)))
                basis, is_given = svd_basis(whole, self.rank, self.right)  # which processes may round differently
                self._begin(self.world.from_first_(basis), self.world.from_first_(is_given))
        assert self.basis is not None
        return low(self.basis) if self.right else low(self.basis).T

    def _begin(self, basis: Tensor, is_given: Tensor) -> None:
        self.is_given, self.is_new = is_given, True
        self.turn = None if self.start is None else self.start.to(basis.dtype).T @ basis
        # 0 · NaN would be NaN in forward and in a merge, until this basis is given up.
        self.basis = torch.where(is_given, basis, 0.0).to(self.linear.weight.dtype)

    def take_basis(self, basis: Basis) -> None:
        """Begin with a randomized basis, and with the gradient of A that it gives."""
        assert self.basis is None
        self._begin(basis.columns, basis.is_given)
        grad = basis.low if self.right else basis.low.T.contiguous()
        torch.autograd.backward(self.trained, grad)  # adds it, and calls the hooks of A

    def seconds(self) -> float:
        """Time that the last basis took, once the device has made it."""
        return sum(self.clock.read().values())

    def give_up_basis(self) -> None:
        """Undo a basis that no update has used. A later gradient makes it."""
        self.basis, self.is_given, self.turn, self.is_new = None, None, None, False
        self.trained.grad = None

    def decay_by(self, factor: float) -> None:
        """Multiply c with the factor by which a step of decoupled weight decay shrinks the weight."""
        if factor == 1.0:
            return
        self.decay *= factor
        if self._decay is None:
            self._decay = torch.ones((), dtype=torch.float64, device="cpu")
        self._decay.fill_(self.decay)

    @torch.no_grad()
    def merge_into(self, weight: Tensor, generator: torch.Generator | None = None) -> None:
        """``weight`` (m, n) ← c · weight + s · A Pᵀ, rounded once.

        Args:
            weight: W₀ in full precision; sharded as that of the Linear.
            generator: rounds a bfloat16 weight stochastically. None rounds to the nearest value.
        """
        own = local(weight)
        if self.basis is None:
            if self.decay != 1.0:
                own.mul_(self.decay)
            return
        first, end = rows_of(weight)
        basis = self.basis.to(self._dtype)
        rows, columns = (self.trained, basis.T) if self.right else (basis, self.trained)
        rows, columns = rows[first:end].to(own.device), columns.to(own.device)
        if own.dtype == rows.dtype:
            own.addmm_(rows, columns, beta=self.decay, alpha=self._scale)
            return
        pieces = -(-own.numel() // _MOVED) or 1
        for some, some_rows in zip(own.tensor_split(pieces), rows.tensor_split(pieces), strict=True):
            round_to(some, (some_rows @ columns).mul_(self._scale), noise_for(some, generator), self.decay)

    @torch.no_grad()
    def end_basis(self) -> None:
        """Begin anew after a merge: A is 0, c is 1, and the next backward pass makes a basis."""
        self.restart()
        if self.basis is not None:
            self.start = self.basis
        self.basis = self.is_given = self.turn = None
        self.is_new = False

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew after a merge, with the same basis. Its correction no longer holds."""
        self.trained.zero_()
        self.decay, self._decay, self.correction = 1.0, None, None

    def move_basis(self, device: torch.device) -> None:
        """Move the basis of a Linear that is not engaged, or just was."""
        if self.basis is not None:
            self.basis = self.basis.to(device)

    def has_moved(self) -> Tensor:
        """() whether A or c has changed since the last merge."""
        if self.decay != 1.0:
            return torch.ones((), dtype=torch.bool, device=self.trained.device)
        return self.trained.detach().any()

    @property
    def nbytes(self) -> int:
        """Bytes of the basis and the correction."""
        return sum(tensor.nbytes for tensor in (self.basis, self.start, self.correction) if tensor is not None)

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs, except W₀."""
        tensors = {key: getattr(self, key) for key in _TENSORS}
        return {"trained": self.trained.detach(), "decay": self.decay, "is_new": self.is_new, **tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load it after `engage`, or into a Linear that is not engaged but keeps its basis."""
        state = dict(state_dict)
        # An optimizer loads its state to the device of A, also if A is empty.
        self.trained.data = state.pop("trained").to(self.device, copy=True)
        for key, value in state.items():
            setattr(self, key, value.to(self.device, copy=True) if torch.is_tensor(value) else value)
        if self.decay != 1.0:
            self._decay = torch.full((), self.decay, dtype=torch.float64, device="cpu")


class _WithNewBasis(torch.autograd.Function):
    """The product of a Linear without a basis, whose backward makes one, and with it the gradient of A."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, x: Tensor, trained: Tensor, weight: ProjectedWeight) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        ctx.mark_dirty(product)  # the same tensor: a copy would cost its memory
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad, None, ctx.weight.make_basis(x, grad) if _is_asked_for(ctx) else None, None


def _is_asked_for(ctx: Any) -> bool:
    """Whether this backward pass computes the gradient of A. If not, as in ``torch.autograd.grad`` of something else,
    it makes no basis."""
    node = ctx.next_functions[2][0]
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError as error:
        raise RuntimeError("a pass that makes a basis has A's gradient in `grad`: call backward") from error


class WholeParameter:
    """A norm, a bias, a weight that no projection shrinks, or one outside the layers.

    A vector in 16 bits is trained as a float32 copy, because its updates are smaller than its rounding (LLaMA's norms
    are about 0.5, and bfloat16 has steps of 0.002 there). The copy keeps its value while the parameter is frozen. Its
    gradients accumulate in float32 too. Matrices in 16 bits are trained as they are: choose an optimizer that rounds
    stochastically.

    Args:
        parameter: of the model.

    Attributes:
        trained: what the optimizer gets: ``parameter``, or its copy.
        is_copied: whether it is a copy.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.is_copied = parameter.ndim == 1 and compute_dtype(parameter) != parameter.dtype
        self.trained = self._copy() if self.is_copied else parameter
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def _copy(self) -> nn.Parameter:
        return nn.Parameter(self.parameter.detach().to(compute_dtype(self.parameter)), requires_grad=False)

    def engage(self) -> None:
        """Let it train from now on."""
        self.parameter.requires_grad_(True)
        if self.is_copied:
            self._follow()
            self.trained.requires_grad_(True)
            if self._hook is None:
                self._hook = self.parameter.register_post_accumulate_grad_hook(self._take_gradient)

    @torch.no_grad()
    def _follow(self) -> None:
        """Give the copy the parameter's values where these are not the copy's, rounded: others have been loaded."""
        if self.trained.device != self.parameter.device:  # the model had no weights before
            torch.utils.swap_tensors(self.trained, self._copy())
        copy, value = local(self.trained), local(self.parameter)
        copy.copy_(torch.where(copy.to(value.dtype) == value, copy, value.to(copy.dtype)))

    @torch.no_grad()
    def load(self, value: Tensor) -> None:
        """Load a saved value of ``trained``, sharded as the parameter."""
        if self.is_copied:
            self._follow()
        self.trained.copy_(value)

    def release(self) -> None:
        """Freeze it."""
        for parameter in (self.parameter, self.trained):
            parameter.requires_grad_(False)
            parameter.grad = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _take_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            raise RuntimeError("other ProjectedLayers already train this model; load the model anew")
        grad = parameter.grad.to(self.trained.dtype)
        self.trained.grad = grad if self.trained.grad is None else self.trained.grad + grad
        parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the copy to the parameter, after a step."""
        if self.is_copied:
            self.parameter.copy_(self.trained)
