"""Singular value decompositions in float64 that use the structure at hand and check themselves.

A thin product is never multiplied out (a Cholesky factorisation of each factor's Gram matrix, or QR where that loses
digits, then a small SVD); a large oblong matrix goes through the Gram matrix of its short side, and when few directions
are wanted, only the leading eigenvectors of that are computed (``dt_lens.svd.leading``). Whatever the route, the result
is measured against the matrix, and LAPACK's full SVD takes over when the error is too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from dt_lens.errors import DtLensError
from dt_lens.svd.leading import SEEN, leading, rows_times

__all__ = ["SVD", "VERSION", "decompose", "triangle"]

VERSION = 6  # raised whenever a result may differ in a bit: it is part of the keys of stored decompositions

TOLERANCE = 1e-9  # relative residual and loss of orthogonality that a route may leave
EPS = torch.finfo(torch.float64).eps
GRAM = 256  # from this short side on the Gram matrix is faster than LAPACK's SVD
FEW = 8  # directions are few, and computed alone, where the short side is so many times their number
PROBES = 16  # random vectors with which the error of a complete decomposition is measured
CONDITIONED = 1e-3  # the least ratio of the ends of a Cholesky factor's diagonal

EXACT = 1e-8  # the smallest sigma of a product, relative to its factors, that a Cholesky factorisation may give

End = tuple[Callable[[Tensor], Tensor], Tensor]  # of A = Q R: what multiplies by Q, and R
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


def decompose(factors: list[Tensor], rank: int | None = None, floor: float = 0.0, gram: Tensor | None = None) -> SVD:
    """The leading ``rank`` singular triples of a product of one or two factors; up to the numerical rank when ``None``.

    Args:
        factors: ``[A]`` with ``A [m, n]``, or ``[A, B]`` with ``A [m, r]``, ``B [r, n]``; float64.
        rank: how many triples at most.
        floor: sigmas up to this size are zeros, whatever the largest one is; for matrices that are a difference of
            larger ones. Sigmas that rounding in float64 makes of zeros are cut in any case.
        gram: of one factor, its product with its own transpose on the short side in float64, if it is at hand.

    Raises:
        DtLensError: when a factor holds values that are not finite, or no solver reaches the tolerance.
    """
    sizes = [max(abs(float(end)) for end in _ends(factor)) if factor.numel() else 0.0 for factor in factors]
    if not all(math.isfinite(size) for size in sizes):
        raise DtLensError("A matrix holds NaN or infinite values, so it has no singular value decomposition.")
    # Scaling by a power of two changes no digit and keeps the squares of huge and tiny entries representable. Between
    # these bounds they are so without it, and a large matrix is not copied.
    scales = [1.0 if size == 0 or 1e-60 < size < 1e60 else 2.0 ** round(math.log2(size)) for size in sizes]
    scaled = [factor if scale == 1 else factor / scale for factor, scale in zip(factors, scales, strict=True)]
    scale = scales[0] * (scales[1] if len(scales) == 2 else 1.0)
    if len(factors) == 2:
        found = _product(scaled, rank, floor / scale)
    else:
        found = _single(scaled, rank, floor / scale, gram if scale == 1 else None)
    return found._replace(sigma=found.sigma * scale)


def _ends(M: Tensor) -> tuple[Tensor, ...]:
    """The least and the largest entry; along the rows in memory, which takes a tenth of the time."""
    return tuple((M.T if M.stride(0) == 1 else M).aminmax())


def _product(factors: list[Tensor], rank: int | None, floor: float) -> SVD:
    A, B = factors
    size = float(A.norm() * B.norm())
    # The product may be far smaller than its factors, and what is only rounding is not a direction.
    floor = max(floor, _zero(A.shape[0], *B.shape) * size)
    ends = _by_cholesky(A), _by_cholesky(B.T)
    if ends[0] is not None and ends[1] is not None:
        found = _between(factors, (ends[0], ends[1]), rank, floor)
        wanted = min(A.shape[1], A.shape[1] if rank is None else rank)
        # Which small sigmas are zeros is left to QR, whose R is right to the last digits.
        if found.error <= TOLERANCE and len(found.sigma) == wanted and float(found.sigma[-1:].sum()) > EXACT * size:
            return found
    found = _between(factors, (_by_qr(A), _by_qr(B.T)), rank, floor)
    if not found.error <= TOLERANCE:
        raise DtLensError(f"The singular value decomposition of a product did not converge (error {found.error:.1e}).")
    return found


def _between(factors: list[Tensor], ends: tuple[End, End], rank: int | None, floor: float) -> SVD:
    """The decomposition of ``A B = Qa (Ra Rb^T) Qb^T``, measured on the product."""
    (A, B), ((spread_a, ra), (spread_b, rb)) = factors, ends
    sigma, left, right, error = _single([ra @ rb.T], rank, floor)
    left, right = spread_a(left.T).T, spread_b(right.T).T
    if len(sigma):
        identity = torch.eye(len(sigma), dtype=A.dtype, device=A.device)
        residuals = [
            (B.T @ (A.T @ left.T) - right.T * sigma).norm() / sigma[0],
            (A @ (B @ right.T) - left.T * sigma).norm() / sigma[0],
            (left @ left.T - identity).abs().max(),
            (right @ right.T - identity).abs().max(),
        ]
        error = float(torch.stack([sigma.new_tensor(error), *residuals]).max())
    return SVD(sigma, left.contiguous(), right.contiguous(), error)


def _by_cholesky(A: Tensor) -> End | None:
    """``A = Q R`` from the Cholesky factor of ``A^T A``, half the work of QR: what multiplies by ``Q``, and ``R``.

    ``Q`` loses orthogonality as the square of the condition number of ``A`` (Yamamoto et al., "Roundoff error analysis
    of the CholeskyQR2 algorithm", 2015); ``None`` where that is too much.
    """
    lower, info = torch.linalg.cholesky_ex(A.T @ A)
    ends = lower.diagonal()
    if A.shape[0] < A.shape[1] or int(info) or not float(ends.min()) > CONDITIONED * float(ends.max()):
        return None
    upper: Tensor = lower.T
    return lambda X: A @ torch.linalg.solve_triangular(upper, X, upper=True), upper


def triangle(A: Tensor) -> Tensor:
    """``R`` of ``A = Q R``, whose singular values are those of ``A``: by Cholesky where ``A`` is well conditioned."""
    found = _by_cholesky(A)
    made: Tensor = torch.linalg.qr(A, mode="r")[1] if found is None else found[1]
    return made


def _by_qr(A: Tensor) -> End:
    Q, R = torch.linalg.qr(A)
    return lambda X: Q @ X, R


def _single(factors: list[Tensor], rank: int | None, floor: float, gram: Tensor | None = None) -> SVD:
    (M,) = factors
    small = min(M.shape)
    routes: list[Callable[[Tensor, int | None], Triple]] = [_lapack, _gesvd]
    # Square matrices mostly have sigmas too small to be squared, and the attempt would be wasted.
    if small > GRAM and max(M.shape) >= 2 * small:
        routes.insert(0, _gram)
    if small > GRAM and rank is not None and rank * FEW <= small and M.device.type == "cpu":
        routes[:0] = [_leading_single, _leading]
        if gram is not None:
            routes[:2] = [partial(_leading_single, gram=gram), partial(_leading, gram=gram)]
    error = float("nan")
    for route in routes:
        try:
            result = _cut(route(M, rank), M, rank, floor)
        except (LinAlgError, scipy.linalg.LinAlgError):
            continue
        if result.error <= TOLERANCE:
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
    if M.device.type == "cpu":  # NumPy computes half of a symmetric product
        wide = M.numpy()
        left = torch.from_numpy(scipy.linalg.eigh(wide @ wide.T, driver="evd", overwrite_a=True, check_finite=False)[1])
    else:
        left = torch.linalg.eigh(M @ M.T)[1]
    # sqrt(eigenvalue) loses half the digits of small sigmas; the length of the image does not.
    found = _by_image(M.T, left)
    sigma = found[1]
    unseen = sigma <= SEEN[torch.float64] * sigma[0]
    # Their directions are any mixture of what the Gram matrix cannot tell apart, which may hold sigmas that are not
    # zero and images that are.
    if bool(unseen[:rank].any()) and float(sigma[unseen].norm()) > _zero(*M.shape) * float(sigma[0]):
        raise LinAlgError("A sigma is too small to be seen in the Gram matrix.")
    return found


def _leading_single(M: Tensor, rank: int | None, gram: Tensor | None = None) -> Triple:
    """The leading triples from the Gram matrix in float32, corrected in float64."""
    return _from_gram(M, rank, torch.float32, gram)


def _leading(M: Tensor, rank: int | None, gram: Tensor | None = None) -> Triple:
    """The leading triples from the Gram matrix in float64."""
    return _from_gram(M, rank, torch.float64, gram)


def _from_gram(M: Tensor, rank: int | None, kind: torch.dtype, gram: Tensor | None) -> Triple:
    assert rank is not None
    tall = M.shape[0] > M.shape[1]
    left, sigma, right = leading(M.T if tall else M, rank, TOLERANCE / 2, kind, gram)
    left, sigma, right = left[:rank].T, sigma[:rank], right[:rank].T
    return (right, sigma, left) if tall else (left, sigma, right)


def _by_image(M: Tensor, basis: Tensor) -> Triple:
    """The triples ``(basis, |M basis|, M basis / |M basis|)`` in order of sigma, for a basis of singular vectors."""
    image = _times(M, basis)
    sigma = image.norm(dim=0)
    order = sigma.argsort(descending=True, stable=True)
    sigma, basis, image = sigma[order], basis[:, order], image[:, order]
    return basis, sigma, image / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)


def _times(A: Tensor, B: Tensor) -> Tensor:
    """``A @ B`` for a few columns."""
    return rows_times(B.T, A.T).T


def _zero(*sizes: int) -> float:
    """What counts as a zero sigma in float64, relative to the size of the matrix."""
    return max(sizes) * EPS * 8


def _cut(found: Triple, M: Tensor, rank: int | None, floor: float) -> SVD:
    """Cut at the rank, and measure: ``M right = sigma left``, ``M^T left = sigma right``, both sides orthonormal."""
    left, sigma, right = found
    keep = int((sigma > max(float(sigma[0]) * _zero(*M.shape), floor)).sum()) if len(sigma) else 0
    # A route that was asked for all triples must have found all of them, and so must one that found too few.
    whole = rank is None or keep < rank or (keep == rank and len(sigma) == min(M.shape))
    keep = keep if rank is None else min(keep, rank)
    left, sigma, right = left[:, :keep], sigma[:keep], right[:, :keep]
    if not keep:
        return SVD(sigma, left.T.contiguous(), right.T.contiguous(), 0.0 if bool(torch.isfinite(sigma).all()) else 1.0)
    probes = None
    if keep > PROBES and keep > GRAM // 4:
        # Random vectors measure the norm of a matrix that is not formed: E ||R w||^2 = ||R||^2 (Hutchinson, "A
        # stochastic estimator of the trace of the influence matrix", 1990).
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(keep, PROBES, generator=generator, dtype=torch.float64).to(M) / PROBES**0.5
    identity = torch.eye(keep, dtype=M.dtype, device=M.device) if probes is None else probes
    ends = (left, right) if probes is None else (left @ probes, right @ probes)
    residuals = [
        (_times(M, ends[1]) - left @ (sigma[:, None] * identity)).norm() / sigma[0],
        (_times(M.T, ends[0]) - right @ (sigma[:, None] * identity)).norm() / sigma[0],
        (left.T @ ends[0] - identity).norm(),
        (right.T @ ends[1] - identity).norm(),
    ]
    # With a complete basis the residuals above already show that M is rebuilt.
    if whole and keep < min(M.shape):
        missing = (M - (left * sigma) @ right.T).norm()
        residuals.append((missing - floor * min(M.shape) ** 0.5).clamp_min(0.0) / M.norm())
    # A stack's maximum, unlike Python's max, keeps a NaN.
    return SVD(sigma, left.T.contiguous(), right.T.contiguous(), float(torch.stack(residuals).max()))
