"""Singular value decompositions in float64 that use the structure at hand and check themselves.

A thin product is never multiplied out (QR of each factor, then a small SVD); a large oblong matrix goes through the
Gram matrix of its short side; when few directions of a large matrix are wanted, a block Krylov space finds them (Musco
and Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value Decomposition", 2015).
Whatever the route, the result is measured against the matrix, and LAPACK's full SVD takes over when the error is too
large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from dt_lens.errors import DtLensError

__all__ = ["SVD", "decompose"]

TOLERANCE = 1e-9  # relative residual and loss of orthogonality that a route may leave
SINGLE = 1e-5  # a relative residual that float32 can meet
EPS = torch.finfo(torch.float64).eps
# From these short sides on the Gram matrix is faster than LAPACK's SVD, and a Krylov space faster than the Gram matrix.
GRAM, KRYLOV = 256, 1024

Triple = tuple[Tensor, Tensor, Tensor]  # left [m, k], sigma [k], right [n, k]


class SVD(NamedTuple):
    """Singular triples, largest sigma first.

    ``error`` is measured: the largest of the relative residuals ``||M right - sigma left|| / sigma_0``,
    ``||M^T left - sigma right|| / sigma_0``, the loss of orthogonality of either side, and, when nothing was cut but
    numerical zeros, ``||M - sum|| / ||M||``.
    """

    sigma: Float[Tensor, " k"]
    left: Float[Tensor, "k m"]
    right: Float[Tensor, "k n"]
    error: float


def decompose(factors: list[Tensor], rank: int | None = None, floor: float = 0.0, noise: float = 0.0) -> SVD:
    """The leading ``rank`` singular triples of a product of one or two factors; up to the numerical rank when ``None``.

    Args:
        factors: ``[A]`` with ``A [m, n]``, or ``[A, B]`` with ``A [m, r]``, ``B [r, n]``; float64.
        rank: how many triples at most.
        floor: sigmas up to this size are zeros, whatever the largest one is; for matrices that are a difference of
            larger ones. Sigmas that rounding in float64 makes of zeros are cut in any case.
        noise: the spectral norm of the matrix's own uncertainty, such as the rounding of its entries. An error of a
            tenth of it is allowed, and a Krylov space may be found in float32.

    Raises:
        DtLensError: when a factor holds values that are not finite, or no solver reaches the tolerance.
    """
    sizes = [max(abs(float(end)) for end in factor.aminmax()) if factor.numel() else 0.0 for factor in factors]
    if not all(math.isfinite(size) for size in sizes):
        raise DtLensError("A matrix holds NaN or infinite values, so it has no singular value decomposition.")
    # Scaling by a power of two changes no digit and keeps the squares of huge and tiny entries representable. Between
    # these bounds they are so without it, and a large matrix is not copied.
    scales = [1.0 if size == 0 or 1e-60 < size < 1e60 else 2.0 ** round(math.log2(size)) for size in sizes]
    scaled = [factor if scale == 1 else factor / scale for factor, scale in zip(factors, scales, strict=True)]
    scale = scales[0] * (scales[1] if len(scales) == 2 else 1.0)
    found = (_product if len(factors) == 2 else _single)(scaled, rank, floor / scale, noise / scale)
    return found._replace(sigma=found.sigma * scale)


def _product(factors: list[Tensor], rank: int | None, floor: float, noise: float) -> SVD:
    A, B = factors
    qa, ra = torch.linalg.qr(A)
    qb, rb = torch.linalg.qr(B.T)
    # The product may be far smaller than its factors, and what is only rounding is not a direction.
    floor = max(floor, _zero(A.shape[0], *B.shape) * float(A.norm() * B.norm()))
    sigma, left, right, error = _single([ra @ rb.T], rank, floor)
    left, right = left @ qa.T, right @ qb.T
    if len(sigma):
        residuals = [(B.T @ (A.T @ left.T) - right.T * sigma).norm(), (A @ (B @ right.T) - left.T * sigma).norm()]
        error = max(error, float(torch.stack(residuals).max() / sigma[0]))
        if not error <= TOLERANCE:
            raise DtLensError(f"The singular value decomposition of a product did not converge (error {error:.1e}).")
    return SVD(sigma, left, right, error)


def _single(factors: list[Tensor], rank: int | None, floor: float, noise: float = 0.0) -> SVD:
    (M,) = factors
    small = min(M.shape)
    routes: list[Callable[[Tensor, int | None], Triple]] = [_lapack, _gesvd]
    # Square matrices mostly have sigmas too small to be squared, and the attempt would be wasted.
    if small > GRAM and max(M.shape) >= 2 * small:
        routes.insert(0, _gram)
    if small > KRYLOV and rank is not None and rank * 64 <= small:
        routes.insert(0, _krylov)
        if noise > SINGLE * float(M.norm()) / small**0.5:
            routes.insert(0, _krylov_single)
    error = float("nan")
    for route in routes:
        try:
            result = _cut(route(M, rank), M, rank, floor)
        except (LinAlgError, scipy.linalg.LinAlgError):
            continue
        if result.error <= max(TOLERANCE, 0.1 * noise / float(result.sigma[:1].sum() or 1.0)):
            return result
        error = result.error
    raise DtLensError(
        f"The singular value decomposition of a {list(M.shape)} matrix did not converge (relative error {error:.1e})."
    )


def _lapack(M: Tensor, rank: int | None) -> Triple:
    left, sigma, right = torch.linalg.svd(M, full_matrices=False)
    return left, sigma, right.T


def _gesvd(M: Tensor, rank: int | None) -> Triple:
    """LAPACK's older driver: slower than divide and conquer, and it converges where that does not."""
    left, sigma, right = scipy.linalg.svd(M.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
    left, sigma, right = (torch.from_numpy(part).to(M.device) for part in (left, sigma, right))
    return left, sigma, right.T


def _gram(M: Tensor, rank: int | None) -> Triple:
    if M.shape[0] > M.shape[1]:
        right, sigma, left = _gram(M.T, rank)
        return left, sigma, right
    left = torch.linalg.eigh(M @ M.T)[1]
    # sqrt(eigenvalue) loses half the digits of small sigmas; the length of the image does not.
    return _by_image(M.T, left)


def _by_image(M: Tensor, basis: Tensor) -> Triple:
    """The triples ``(basis, |M basis|, M basis / |M basis|)`` in order of sigma, for a basis of singular vectors."""
    image = M @ basis
    sigma = image.norm(dim=0)
    order = sigma.argsort(descending=True, stable=True)
    sigma, basis, image = sigma[order], basis[:, order], image[:, order]
    return basis, sigma, image / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)


def _krylov(M: Tensor, rank: int | None) -> Triple:
    """The leading triples from a block Krylov space in float64."""
    assert rank is not None
    if M.shape[0] < M.shape[1]:
        right, sigma, left = _krylov(M.T, rank)
        return left, sigma, right
    return _turned(_krylov_space(M, rank, TOLERANCE / 10), rank)


def _krylov_single(M: Tensor, rank: int | None) -> Triple:
    """The leading triples where seven digits are enough: from a space found in float32, computed in float64."""
    assert rank is not None
    if M.shape[0] < M.shape[1]:
        right, sigma, left = _krylov_single(M.T, rank)
        return left, sigma, right
    basis = torch.linalg.qr(_krylov_space(M.float(), rank, SINGLE)[0].double())[0]
    image = M @ basis
    return _turned(_by_image(M, basis @ torch.linalg.eigh(image.T @ image)[1]), rank)


def _turned(found: Triple, rank: int) -> Triple:
    """``(right, sigma, left)`` as ``(left, sigma, right)``, the first ``rank`` of them."""
    right, sigma, left = found
    return left[:, :rank], sigma[:rank], right[:, :rank]


def _krylov_space(M: Tensor, rank: int, tolerance: float) -> Triple:
    """The leading ``(right, sigma, left)``, a few more than ``rank``, in the precision of ``M``, which is tall.

    Rayleigh and Ritz on a growing block Krylov space of ``M^T M``, until the wanted triples have converged.
    """
    n = M.shape[1]
    width = min(rank + 8, n)
    generator = torch.Generator().manual_seed(0)
    block = torch.linalg.qr(torch.randn(n, width, generator=generator, dtype=torch.float64).to(M))[0]
    image, last = M @ block, float("inf")
    space, ritz = block, image.T @ image
    while True:
        for _ in range(3):
            block = M.T @ image
            for _ in range(2):  # once is not enough for orthogonality, twice is
                block = torch.linalg.qr(block - space @ (space.T @ block))[0]
            before, image = image, M @ block
            # The space is orthonormal, so M^T M is block tridiagonal in it: only neighbours couple.
            ritz = torch.nn.functional.pad(ritz, (0, width, 0, width))
            ritz[-width:, -width:] = image.T @ image
            ritz[-width:, -2 * width : -width] = image.T @ before
            ritz[-2 * width : -width, -width:] = before.T @ image
            space = torch.cat([space, block], 1)
        right, sigma, left = _by_image(M, space @ torch.linalg.eigh(ritz)[1][:, -width:])
        wanted = float((M.T @ left[:, :rank] - right[:, :rank] * sigma[:rank]).norm() / sigma[0].clamp_min(1e-30))
        # Beyond a quarter of the short side the whole decomposition is faster; and in single precision the residual
        # stops falling.
        stuck = M.dtype == torch.float32 and wanted > 0.5 * last
        if wanted < tolerance or stuck or space.shape[1] + 3 * width > max(n // 4, 8 * width):
            return right, sigma, left
        last = wanted


def _zero(*sizes: int) -> float:
    """What counts as a zero sigma in float64, relative to the size of the matrix."""
    return max(sizes) * EPS * 8


def _cut(found: Triple, M: Tensor, rank: int | None, floor: float) -> SVD:
    """Cut at the rank, and measure: ``M right = sigma left``, ``M^T left = sigma right``, both sides orthonormal."""
    left, sigma, right = found
    keep = int((sigma > max(float(sigma[0]) * _zero(*M.shape), floor)).sum()) if len(sigma) else 0
    # A route that was asked for all triples must have found all of them.
    whole = rank is None or (keep <= rank and len(sigma) == min(M.shape))
    keep = keep if rank is None else min(keep, rank)
    left, sigma, right = left[:, :keep], sigma[:keep], right[:, :keep]
    if not keep:
        return SVD(sigma, left.T.contiguous(), right.T.contiguous(), 0.0 if bool(torch.isfinite(sigma).all()) else 1.0)
    identity = torch.eye(keep, dtype=M.dtype, device=M.device)
    residuals = [
        (M @ right - left * sigma).norm() / sigma[0],
        (M.T @ left - right * sigma).norm() / sigma[0],
        (left.T @ left - identity).abs().max(),
        (right.T @ right - identity).abs().max(),
    ]
    # With a complete basis the residuals above already show that M is rebuilt.
    if whole and keep < min(M.shape):
        missing = (M - (left * sigma) @ right.T).norm()
        residuals.append((missing - floor * min(M.shape) ** 0.5).clamp_min(0.0) / M.norm())
    # A stack's maximum, unlike Python's max, keeps a NaN.
    return SVD(sigma, left.T.contiguous(), right.T.contiguous(), float(torch.stack(residuals).max()))
