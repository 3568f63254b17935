"""Low-rank bases for gradients (GaLore, arXiv 2403.03507) by a randomized range finder.

The gradient of a weight is G (m, n). On the ``right`` side the basis is P (n, r) and the low gradient G P (m, r);
on the ``left`` it is P (m, r) and Pᵀ G (r, n). The columns of P are orthonormal.
"""

import math

import torch
from torch import Tensor

from owlore_tune.distributed.world import ALONE, World, local, peak, rows_of

SIDES = ("right", "shape")
BASES = ("randomized", "svd")
OVERSAMPLING = 8
_PIECE = 2**22  # values of a gradient that are copied to another dtype at once
SKETCH_ROWS = 16  # enough to estimate the energy outside a basis to a few percent


def is_right(shape: torch.Size, side: str) -> bool:
    """Whether a weight (m, n) is projected on its right side. Side ``shape`` is GaLore's rule: the shorter side."""
    return side == "right" or shape[0] >= shape[1]


def side_factor(shape: torch.Size) -> float:
    """Ratio of a weight's (m, n) update size under GaLore's rule to that on the right, at equal learning rate."""
    return max(1.0, shape[1] / shape[0]) ** 0.5


def project(
    grad: Tensor,  # (m, n)
    basis: Tensor,  # right (n, r), left (m, r), in float32 or float64
    right: bool,
) -> Tensor:  # right (m, r), left (r, n), in the basis' dtype
    """The low-rank coordinates of a gradient.

    On CUDA, a 16-bit gradient is multiplied with the rounded basis, and sums are float32. A float32 copy of the
    gradient would need twice its memory, and its rounding is as large as that of the basis.
    """
    if grad.is_cuda and grad.dtype != basis.dtype:
        factors = (grad, basis.to(grad.dtype)) if right else (basis.T.to(grad.dtype), grad)
        return torch.mm(*factors, out_dtype=basis.dtype)
    return times(grad, basis) if right else times(grad.T, basis).T.contiguous()  # fused AdamW needs one memory order


def times(grad: Tensor, columns: Tensor) -> Tensor:  # (m, n) · (n, k) → (m, k)
    """A product in the dtype of ``columns``. Of a 16-bit ``grad``, a few rows at a time are copied to that dtype."""
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
    grad: Tensor,  # (m, n), floating point; a DTensor if its rows are sharded
    rank: int,
    *,
    generator: torch.Generator,
    start: Tensor | None = None,  # (n, r') columns to start from
) -> tuple[Tensor, Tensor]:  # (n, r) orthonormal, () share of the energy
    """An orthonormal basis of (nearly) the best rank-``rank`` row space of ``grad``, and ‖G P‖² / ‖G‖².

    The steps are a Gaussian sketch with ``OVERSAMPLING`` extra columns, one power iteration, a QR, and a truncation by
    the eigenvectors of the small Gram matrix (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1).
    ``start``, such as the weight's previous basis, replaces the sketch and saves one product. The largest entry of each
    column is made positive, so moments keep their meaning across a refresh.

    For a sharded gradient, all processes must call this together. They get the same basis. They all-reduce
    (q + 1) · n · (r + 8) + (r + 8)² numbers (q = 1; n · (r + 8) fewer with ``start``) and broadcast n · r.

    For a rank-deficient gradient, the missing columns are arbitrary but orthonormal. For a zero or non-finite gradient,
    all columns are arbitrary and the share is NaN.
    """
    num_rows, n = grad.shape
    dtype = torch.promote_types(grad.dtype, torch.float32)
    world, (first_row, end_row) = World.of(grad), rows_of(grad)
    grad = local(grad)
    width = min(rank + OVERSAMPLING, num_rows, n)
    extra = width - (0 if start is None else min(start.shape[1], width))
    if start is None:
        # Every process draws all rows and uses its own, as if the gradient were not sharded.
        omega = torch.randn(num_rows, width, generator=generator, device=grad.device, dtype=dtype)
        columns = _unit_scale(world.sum_(times(grad.T, omega[first_row:end_row])))
    else:
        noise = torch.randn(n, extra, generator=generator, device=grad.device, dtype=dtype)
        columns = torch.cat([start[:, : width - extra], noise / n**0.5], dim=1)
    # One power iteration: a plain sketch loses much more energy if the spectrum decays slowly.
    rows = _unit_scale(times(grad, torch.linalg.qr(columns).Q), world)
    columns = _unit_scale(world.sum_(times(grad.T, rows)))
    orthonormal = torch.linalg.qr(columns).Q
    low = times(grad, orthonormal)  # (m, width)
    scale = _scale(low, world)
    low = low / scale
    gram = world.sum_(low.T @ low)
    is_finite = gram.isfinite().all()  # a tensor, because the host reads no values here
    eigenvalues, eigenvectors = _eigh(torch.where(is_finite, gram, 0.0))  # ascending
    basis = orthonormal @ eigenvectors[:, -rank:].flip(1)
    basis = torch.where(is_finite, fix_signs(basis), torch.eye(n, rank, device=grad.device, dtype=dtype))
    share = _share(eigenvalues[-rank:].sum(), grad, scale, world)
    return world.from_first_(basis), torch.where(is_finite, share, math.nan)


def product_range_finder(
    left: Tensor,  # (t, m), a row for each token: the output's gradient
    right: Tensor,  # (t, n), the input
    rank: int,
    *,
    generator: torch.Generator,
    start: Tensor | None = None,  # (n, r') columns to start from
    world: World = ALONE,
) -> tuple[Tensor, Tensor]:  # (n, r) orthonormal, () share of the energy
    """`range_finder` of the gradient G = leftᵀ right (m, n), which is never formed: its products are two thin ones.

    Processes of ``world`` have different tokens of one step, and get the same basis. They all-reduce products with G,
    (m or n) · (r + 8) numbers each. The share is estimated from ``SKETCH_ROWS`` random columns outside the basis.
    """
    m, n = left.shape[1], right.shape[1]
    dtype = torch.promote_types(right.dtype, torch.float32)

    def forward(columns: Tensor) -> Tensor:  # (n, k) → G columns (m, k)
        return world.sum_(times(left.T, times(right, columns)))

    def backward(rows: Tensor) -> Tensor:  # (m, k) → Gᵀ rows (n, k)
        return world.sum_(times(right.T, times(left, rows)))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=right.device, dtype=dtype)

    width = min(rank + OVERSAMPLING, m, n)
    if start is None:
        columns = _unit_scale(backward(random(m, width)))
    else:
        kept = min(start.shape[1], width)
        columns = torch.cat([start[:, :kept].to(dtype), random(n, width - kept) / n**0.5], dim=1)
    rows = _unit_scale(forward(torch.linalg.qr(columns).Q))
    orthonormal = torch.linalg.qr(_unit_scale(backward(rows))).Q
    low = forward(orthonormal)  # (m, width)
    scale = _scale(low, ALONE)
    low = low / scale
    gram = low.T @ low
    is_finite = gram.isfinite().all()
    eigenvalues, eigenvectors = _eigh(torch.where(is_finite, gram, 0.0))  # ascending
    basis = fix_signs(orthonormal @ eigenvectors[:, -rank:].flip(1))
    outside = random(n, SKETCH_ROWS)
    outside -= orthonormal @ (orthonormal.T @ outside)
    rest = (forward(outside) / scale).double().square().sum() / SKETCH_ROWS
    share = (eigenvalues[-rank:].sum() / (eigenvalues.sum() + rest)).clamp(0, 1)  # 0 / 0 is NaN
    return world.from_first_(basis), torch.where(is_finite, share, math.nan)


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; eigenvalues are NaN if the algorithm does not converge."""
    try:
        return tuple(torch.linalg.eigh(gram))
    except torch.linalg.LinAlgError:
        return torch.full_like(gram[0], math.nan), torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def svd_basis(grad: Tensor, rank: int, right: bool = True) -> tuple[Tensor, Tensor]:
    """The exact basis from a full SVD (slow). Signs are those of LAPACK, as in GaLore."""
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if not grad.isfinite().all():
        return torch.eye(grad.shape[1 if right else 0], rank).to(grad), grad.new_tensor(math.nan)
    left_vectors, singular, right_vectors = torch.linalg.svd(grad, full_matrices=False)
    scale = singular[0].clamp_min(torch.finfo(grad.dtype).tiny)
    basis = right_vectors[:rank].T if right else left_vectors[:, :rank]
    return basis.contiguous(), _share((singular[:rank] / scale).square().sum(), grad, scale)


def sketch_rows(grad: Tensor, generator: torch.Generator) -> Tensor:  # (m, n) → (SKETCH_ROWS, n)
    """Random combinations of the gradient's rows. With the same generator state, sketches add like their gradients."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    weights = torch.randn(SKETCH_ROWS, grad.shape[0], generator=generator, device=grad.device, dtype=dtype)
    return times(grad.T, weights.T).T


def fix_signs(basis: Tensor) -> Tensor:
    """Flip columns to make the entry of largest magnitude in each positive."""
    peaks = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))  # (1, r)
    return torch.where(peaks < 0, -basis, basis)


def _share(captured: Tensor, grad: Tensor, scale: Tensor, world: World = ALONE) -> Tensor:
    """``captured``, in units of scale², as a share of ‖grad‖²; NaN for a zero gradient."""
    # In pieces: on a CPU, this norm needs a copy in float64.
    norms = torch.stack([torch.linalg.vector_norm(rows, dtype=torch.float64) for rows in _pieces(grad)])
    total = world.sum_((torch.linalg.vector_norm(norms) / scale).square())
    return (captured / total).clamp(0, 1)


def _unit_scale(columns: Tensor, world: World = ALONE) -> Tensor:
    """Scale to a largest entry of 1. Products of huge or tiny gradients then neither overflow nor vanish."""
    return columns / _scale(columns, world)


def _scale(columns: Tensor, world: World) -> Tensor:
    return world.max_(peak(columns)).clamp_min(torch.finfo(columns.dtype).tiny)
