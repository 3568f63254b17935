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
SKETCH_ROWS = 16  # enough to know the energy that a basis misses within a few percent of it


def is_right(shape: torch.Size, side: str) -> bool:
    """Whether a weight of ``shape`` (m, n) is projected on its right. ``shape`` is GaLore's rule: the shorter side."""
    return side == "right" or shape[0] >= shape[1]


def side_factor(shape: torch.Size) -> float:
    """How much further a weight (m, n) moves under GaLore's rule than on its right, for the same learning rate."""
    return max(1.0, shape[1] / shape[0]) ** 0.5


def project(
    grad: Tensor,  # (m, n)
    basis: Tensor,  # right (n, r), left (m, r)
    right: bool,
) -> Tensor:  # right (m, r), left (r, n)
    """The low-rank coordinates of a gradient."""
    return grad @ basis if right else basis.T @ grad


def range_finder(
    grad: Tensor,  # (m, n), floating point; a DTensor if its rows are on several processes
    rank: int,
    *,
    generator: torch.Generator,
    start: Tensor | None = None,  # (n, r') columns to start from
) -> tuple[Tensor, Tensor]:  # (n, r) orthonormal, () share of the energy
    """An orthonormal basis of (nearly) the best rank-``rank`` row space of ``grad``, and ‖G P‖² / ‖G‖².

    A Gaussian sketch with ``OVERSAMPLING`` extra columns, one power iteration, a QR, and a truncation by the
    eigenvectors of the small Gram matrix (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1). With
    ``start``, such as the weight's last basis, the sketch gives way to those columns and one product less is needed.
    The largest entry of each column is made positive, so that moments which outlive a refresh keep their meaning.

    If the gradient's rows are divided among several processes, all of them call this together and get the same basis.
    They sum (q + 1) · n · (r + 8) + (r + 8)² numbers over all (q = 1; one n · (r + 8) less with ``start``), and take
    n · r from the first process.

    It does not fail on a rank-deficient gradient: the missing columns are arbitrary orthonormal ones. A gradient that
    is zero or not finite has no basis: the columns are then arbitrary, and the share is NaN.
    """
    num_rows, n = grad.shape
    world, (first_row, end_row) = World.of(grad), rows_of(grad)
    grad = local(grad)
    width = min(rank + OVERSAMPLING, num_rows, n)
    extra = width - (0 if start is None else min(start.shape[1], width))
    if start is None:
        # Of all rows on every process, so that each takes what it would be given if it had them all.
        omega = torch.randn(num_rows, width, generator=generator, device=grad.device, dtype=grad.dtype)
        columns = _unit_scale(world.sum_(grad.T @ omega[first_row:end_row]))
    else:
        noise = torch.randn(n, extra, generator=generator, device=grad.device, dtype=grad.dtype)
        columns = torch.cat([start[:, : width - extra], noise / n**0.5], dim=1)
    # One power iteration: a plain sketch loses much more of the energy of spectra that decay slowly.
    columns = _unit_scale(world.sum_(grad.T @ _unit_scale(grad @ torch.linalg.qr(columns).Q, world)))
    orthonormal = torch.linalg.qr(columns).Q
    low = grad @ orthonormal  # (m, width)
    scale = _scale(low, world)
    low = low / scale
    gram = world.sum_(low.T @ low)
    if not gram.isfinite().all():
        return torch.eye(n, rank, device=grad.device, dtype=grad.dtype), grad.new_tensor(math.nan)
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)  # ascending
    basis = orthonormal @ eigenvectors[:, -rank:].flip(1)
    return world.from_first_(fix_signs(basis)), _share(eigenvalues[-rank:].sum(), grad, scale, world)


def svd_basis(grad: Tensor, rank: int, right: bool = True) -> tuple[Tensor, Tensor]:
    """The exact basis by a full SVD, slow; signs as LAPACK leaves them, which is GaLore's way."""
    if not grad.isfinite().all():
        return torch.eye(grad.shape[1 if right else 0], rank).to(grad), grad.new_tensor(math.nan)
    left_vectors, singular, right_vectors = torch.linalg.svd(grad, full_matrices=False)
    scale = singular[0].clamp_min(torch.finfo(grad.dtype).tiny)
    basis = right_vectors[:rank].T if right else left_vectors[:, :rank]
    return basis.contiguous(), _share((singular[:rank] / scale).square().sum(), grad, scale)


def sketch_rows(grad: Tensor, generator: torch.Generator) -> Tensor:  # (m, n) → (SKETCH_ROWS, n)
    """Random combinations of the gradient's rows. Sketches of one generator's state add up as their gradients do."""
    weights = torch.randn(SKETCH_ROWS, grad.shape[0], generator=generator, device=grad.device, dtype=grad.dtype)
    return weights @ grad


def fix_signs(basis: Tensor) -> Tensor:
    """Flip columns so that the entry of largest magnitude in each is positive."""
    peaks = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))  # (1, r)
    return torch.where(peaks < 0, -basis, basis)


def _share(captured: Tensor, grad: Tensor, scale: Tensor, world: World = ALONE) -> Tensor:
    """``captured``, in units of scale², as a share of ‖grad‖²; NaN for a zero gradient."""
    total = world.sum_((torch.linalg.vector_norm(grad, dtype=torch.float64) / scale).square())
    return (captured / total).clamp(0, 1)


def _unit_scale(columns: Tensor, world: World = ALONE) -> Tensor:
    """Scaled to a largest entry of 1, so that products of huge or tiny gradients neither overflow nor vanish."""
    return columns / _scale(columns, world)


def _scale(columns: Tensor, world: World) -> Tensor:
    return world.max_(peak(columns)).clamp_min(torch.finfo(columns.dtype).tiny)
