"""Low-rank bases for gradients (GaLore, arXiv 2403.03507) by a randomized range finder.

The gradient of a weight is G (m, n). On the ``right`` side the basis is P (n, r) and the low gradient G P (m, r);
on the ``left`` it is P (m, r) and Pᵀ G (r, n). The columns of P are orthonormal.
"""

import math

import torch
from torch import Tensor

from owlore_tune.distributed.world import ALONE, World, peak

SIDES = ("right", "shape")
BASES = ("randomized", "svd")
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


def range_finder(
    left: Tensor,  # (t, m), a row for each token: the output's gradient
    right: Tensor,  # (t, n), the input
    rank: int,
    *,
    generator: torch.Generator | None,
    start: Tensor | None = None,  # (n, r') columns to start from
    world: World = ALONE,
) -> tuple[Tensor, Tensor]:  # (n, r) orthonormal, () bool
    """An orthonormal basis of (nearly) the best rank-``rank`` row space of G = leftᵀ right (m, n), if G has one.

    The steps are a Gaussian sketch with ``OVERSAMPLING`` extra columns, one power iteration, and a truncation by the
    eigenvectors of the small Gram matrix (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1). G is
    never formed: a product with it is two thin ones. ``start``, such as the weight's previous basis, replaces the
    sketch and saves one product. The largest entry of each column is made positive, so moments keep their meaning
    across a refresh.

    A QR after each product and a Gram matrix in float64 keep the directions of singular values below 1e-3 of the
    largest. They would else be lost to rounding, and the basis would depend on the order of sums.

    Processes of ``world`` have different tokens of one step, and get the same basis. They call this together, and
    all-reduce products with G, (m or n) · (r + 8) numbers each.

    For a rank-deficient gradient, the missing columns are arbitrary but orthonormal. A zero or non-finite gradient has
    no basis: all columns are arbitrary.
    """
    m, n = left.shape[1], right.shape[1]
    dtype = torch.promote_types(right.dtype, torch.float32)

    def forward(columns: Tensor) -> Tensor:  # (n, k) → G columns (m, k)
        return world.sum_(of_gradient(left.T, right, columns, dtype))

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
    low = forward(orthonormal).double()  # (m, width)
    # If the gradient is not finite, no value of `low` is.
    eigenvalues, eigenvectors = _eigh((low.T @ low).nan_to_num(0.0, 0.0, 0.0))  # ascending
    basis = fix_signs(orthonormal @ eigenvectors[:, -rank:].flip(1).to(dtype))
    # The algorithm may fail on one process alone.
    return world.from_first_(basis), world.from_first_(eigenvalues[-1] > 0)


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; eigenvalues are NaN if the algorithm does not converge."""
    try:
        return tuple(torch.linalg.eigh(gram))
    except torch.linalg.LinAlgError:
        return torch.full_like(gram[0], math.nan), torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def svd_basis(grad: Tensor, rank: int, right: bool = True) -> tuple[Tensor, Tensor]:
    """`range_finder` with the exact basis, from a full SVD (slow). Signs are those of LAPACK, as in GaLore."""
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    is_finite = grad.isfinite().all()
    left_vectors, singular, right_vectors = torch.linalg.svd(torch.where(is_finite, grad, 0.0), full_matrices=False)
    basis = right_vectors[:rank].T if right else left_vectors[:, :rank]
    return basis.contiguous(), is_finite & (singular[0] > 0)


def fix_signs(basis: Tensor) -> Tensor:
    """Flip columns to make the entry of largest magnitude in each positive."""
    lowest, highest = basis.aminmax(dim=0)  # (r,)
    return torch.where(lowest + highest < 0, -basis, basis)


def _largest(product: Tensor) -> Tensor:
    """() the largest magnitude. Norms of products in this unit are finite and not 0 for huge or tiny gradients."""
    return peak(product).clamp_min(torch.finfo(product.dtype).tiny)
