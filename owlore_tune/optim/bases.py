"""Low-rank bases for gradients (GaLore, arXiv 2403.03507) by a randomized range finder.

The gradient of a weight is G (m, n). On the ``right`` side the basis is P (n, r) and the low gradient G P (m, r);
on the ``left`` it is P (m, r) and Pᵀ G (r, n). The columns of P are orthonormal. A `BasisMaker` makes the bases of
several weights at once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import Variable

from owlore_tune.distributed.world import ALONE, World

SIDES = ("right", "shape")
BASIS_KINDS = ("randomized", "svd")
OVERSAMPLING = 8
_PIECE = 2**22  # values of a gradient that are copied to another dtype at once


def is_right(shape: torch.Size, side: str) -> bool:
    """Whether a weight (m, n) is projected on its right side. Side ``shape`` is GaLore's rule: the shorter side."""
    return side == "right" or shape[0] >= shape[1]


def side_factor(shape: torch.Size) -> float:
    """Ratio of a weight's (m, n) update size under GaLore's rule to that on the right, at equal learning rate."""
    return max(1.0, shape[1] / shape[0]) ** 0.5


def of_gradient(outer: Tensor, inner: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """``outer`` (m, t) · (``inner`` (t, n) · ``columns`` (n, k)) → (m, k) in ``dtype``, with sums in ``dtype``.

    16-bit factors are copied to ``dtype``, a few rows at a time. On a GPU, ``columns`` and the first product are
    rounded instead, as the gradient is, unless only one factor has 16 bits, as in autocast.
    """
    columns = columns.to(_factor_dtype(outer, inner, dtype))
    if columns.dtype == dtype:
        return times(outer, times(inner, columns))
    return torch.mm(outer, inner @ columns, out_dtype=dtype)


def _factor_dtype(outer: Tensor, inner: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the columns that `of_gradient` multiplies with."""
    return inner.dtype if inner.device.type == "cuda" and inner.dtype == outer.dtype else dtype


def times(grad: Tensor, columns: Tensor) -> Tensor:  # (m, n) · (n, k) → (m, k)
    """A product in the dtype of ``columns``, with sums in that dtype.

    A few rows of a 16-bit ``grad`` at a time are copied to that dtype.
    """
    if grad.dtype == columns.dtype:
        return grad @ columns
    product = columns.new_empty(grad.shape[0], columns.shape[1])
    first = 0
    for rows in _pieces(grad):
        torch.mm(rows.to(columns.dtype), columns, out=product[first : first + len(rows)])
        first += len(rows)
    return product


def _pieces(grad: Tensor) -> tuple[Tensor, ...]:
    return grad.split(max(1, _PIECE // max(1, grad.shape[1])))


@dataclass
class Sketch:
    """The products of a gradient that give a basis. w is its rank plus `OVERSAMPLING`, or less for small weights.

    Attributes:
        columns: (n, w), orthonormal.
        low: (m, w), the product of this process' part of G with ``columns``.
        gram: (w, w), of the product of the whole G, in float64.
    """

    columns: Tensor
    low: Tensor
    gram: Tensor

    @property
    def nbytes(self) -> int:
        return self.columns.nbytes + self.low.nbytes + self.gram.nbytes

    @property
    def kind(self) -> tuple[Any, ...]:
        """`truncate` makes the bases of sketches of one kind together."""
        return self.gram.shape, self.gram.device, self.columns.dtype


@dataclass
class Basis:
    """A basis, and this process' part of the gradient in it.

    Attributes:
        columns: P (n, r), orthonormal.
        low: (m, r), the product of this process' part of G with P.
        is_given: () whether G has a basis.
    """

    columns: Tensor
    low: Tensor
    is_given: Tensor


def sketch(
    left: Tensor,  # (t, m), a row for each token: the output's gradient
    right: Tensor,  # (t, n), the input
    rank: int,
    *,
    generator: torch.Generator | None,
    start: Tensor | None = None,  # (n, r') columns to start from
    world: World = ALONE,
) -> Sketch:
    """Columns that (nearly) span the best rank-``rank`` row space of G = leftᵀ right (m, n), if G has one.

    With `truncate`, the steps are a Gaussian sketch with ``OVERSAMPLING`` extra columns, one power iteration, and a
    truncation by the eigenvectors of the small Gram matrix (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4
    and 5.1). G is never formed: a product with it is two thin ones. ``start``, such as the weight's previous basis,
    replaces the sketch and saves one product.

    A QR after each product and a Gram matrix in float64 keep the directions of singular values below 1e-3 of the
    largest. They would else be lost to rounding, and the basis would depend on the order of sums.

    Processes of ``world`` have different tokens of one step. They call this together, and all-reduce products with G,
    (m or n) · (r + 8) numbers each.

    For a rank-deficient gradient, the missing columns are arbitrary but orthonormal. A zero or non-finite gradient has
    no basis: all columns are arbitrary.
    """
    m, n = left.shape[1], right.shape[1]
    dtype = torch.promote_types(right.dtype, torch.float32)

    def own(columns: Tensor) -> Tensor:  # (n, k) → this process' part of G columns (m, k)
        return of_gradient(left.T, right, columns, dtype)

    def forward(columns: Tensor) -> Tensor:
        return world.sum_(own(columns))

    def backward(rows: Tensor) -> Tensor:  # (m, k) → Gᵀ rows (n, k)
        return world.sum_(of_gradient(right.T, left, rows, dtype))

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=right.device, dtype=dtype)

    width = min(rank + OVERSAMPLING, m, n)
    if start is None:
        columns = backward(random(m, width, dtype=_factor_dtype(right, left, dtype)))
        unit = _largest(columns)
        rows = forward(torch.linalg.qr(columns / unit).Q)
    else:
        kept = min(start.shape[1], width)
        columns = torch.cat([start[:, :kept].to(dtype), random(n, width - kept) / n**0.5], dim=1)
        rows = forward(torch.linalg.qr(columns).Q)
        unit = _largest(rows)
    rows = torch.linalg.qr(rows / unit).Q
    orthonormal = torch.linalg.qr(backward(rows) / unit).Q
    low = own(orthonormal)
    whole = world.sum_(low.clone() if world.size > 1 else low).double()
    # If the gradient is not finite, no value of `whole` is.
    return Sketch(orthonormal, low, (whole.T @ whole).nan_to_num(0.0, 0.0, 0.0))


def truncate(sketches: list[Sketch], rank: int, world: World = ALONE) -> Iterator[Basis]:
    """The bases of sketches of one kind. Empties the list, so that each one's memory is used again.

    The largest entry of each column is made positive, so moments keep their meaning across a refresh. All processes get
    the same bases.

    All processes call this together, and send n · r numbers for each. On a GPU, the host waits once for all.
    """
    values, vectors = _eigh(torch.stack([one.gram for one in sketches]))  # ascending
    # Processes may round differently, and the algorithm may fail on one of them alone.
    are_given = world.from_first_(values[:, -1] > 0)
    leading = vectors[..., -rank:].flip(-1).to(sketches[0].columns.dtype)
    for some, is_given in zip(leading, are_given, strict=True):
        one = sketches.pop(0)
        columns = one.columns @ some
        columns = world.from_first_(columns.mul_(signs(columns)))
        yield Basis(columns, one.low @ (one.columns.T @ columns), is_given)  # of rank 0's columns, not of the own ones


def _eigh(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; eigenvalues are NaN where the algorithm does not converge."""
    try:
        return tuple(torch.linalg.eigh(grams))
    except torch.linalg.LinAlgError:
        if len(grams) > 1:
            each = [_eigh(gram[None]) for gram in grams]
            return torch.cat([values for values, _ in each]), torch.cat([vectors for _, vectors in each])
        return torch.full_like(grams[:, 0], math.nan), torch.eye(grams.shape[-1]).to(grams)[None]


def svd_basis(grad: Tensor, rank: int, right: bool = True) -> tuple[Tensor, Tensor]:
    """The exact basis of a gradient, from a full SVD (slow), and whether it has one. Signs are as in GaLore."""
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    is_finite = grad.isfinite().all()
    left_vectors, singular, right_vectors = torch.linalg.svd(torch.where(is_finite, grad, 0.0), full_matrices=False)
    basis = right_vectors[:rank].T if right else left_vectors[:, :rank]
    return basis.contiguous(), is_finite & (singular[0] > 0)


def signs(basis: Tensor) -> Tensor:
    """(r,) 1 or -1: the sign of the entry of largest magnitude in each column."""
    lowest, highest = basis.aminmax(dim=0)
    return torch.copysign(torch.ones_like(lowest), lowest + highest)


def _largest(product: Tensor) -> Tensor:
    """() the largest magnitude. Norms of products in this unit are finite and not 0 for huge or tiny gradients."""
    largest = torch.linalg.vector_norm(product, ord=torch.inf) if product.numel() else product.new_zeros(())
    return largest.clamp_min(torch.finfo(product.dtype).tiny)


_BATCH = 2**28  # bytes of the sketches of a batch


class BasisMaker:
    """Makes the bases that backward passes ask for.

    A batch ends with its pass, or earlier: when its sketches take ``_BATCH`` bytes, or when another pass begins inside
    the pass, as that of a reentrant checkpoint does.
    """

    def __init__(self) -> None:
        # By the number of a pass. If a pass ends with an error, autograd frees its callback, and so its sketches.
        self._passes: WeakValueDictionary[int, _Pass] = WeakValueDictionary()

    def __reduce__(self) -> tuple[Any, ...]:  # a copy has no part of a pass
        return BasisMaker, ()

    def defer(self, weight: Any, make: Callable[[], Sketch], more: Callable[[Tensor], Tensor]) -> bool:
        """Make the basis of ``weight``, and the gradient of A with it, later in the current backward pass.

        Returns False if the weight has just got a basis from another use of its Linear. The caller then computes the
        gradient of this use.

        Args:
            weight: a `ProjectedWeight`.
            make: makes the sketch.
            more: (n, w) → (m, w), the gradient of this use times columns.
        """
        current = torch._C._current_graph_task_id()
        own = self._passes.get(current)
        if own is None:
            for outer in list(self._passes.values()):
                outer.finish()
            own = self._passes[current] = _Pass()
            Variable._execution_engine.queue_callback(own.finish)  # type: ignore[attr-defined]
        if weight.basis is not None:
            return False
        own.add(weight, make, more)
        return True


class _Pass:
    """A backward pass, with the sketches of its current batch."""

    def __init__(self) -> None:
        self._sketches: dict[Any, Sketch] = {}

    def add(self, weight: Any, make: Callable[[], Sketch], more: Callable[[Tensor], Tensor]) -> None:
        try:
            with weight.clock("basis"):
                if (known := self._sketches.get(weight)) is not None:
                    known.low += more(known.columns)
                else:
                    self._sketches[weight] = make()
        except BaseException:
            self._sketches.clear()  # the traceback keeps this object
            raise
        if sum(sketch.nbytes for sketch in self._sketches.values()) >= _BATCH:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Make the bases of the batch."""
        groups: dict[Any, list[Any]] = {}
        for weight in self._sketches:
            groups.setdefault((self._sketches[weight].kind, weight.rank), []).append(weight)
        try:
            for weights in groups.values():
                first = weights[0]
                with first.clock("basis"):  # its time is that of the group
                    sketches = [self._sketches.pop(weight) for weight in weights]
                    for weight, basis in zip(weights, truncate(sketches, first.rank, first.world), strict=True):
                        weight.take_basis(basis)
        finally:
            self._sketches.clear()
