"""Singular value decompositions in float64 that use the structure at hand and check themselves.

A thin product is never multiplied out (QR of each factor, then a small SVD); a wide matrix goes through the Gram matrix
of its short side; when few directions of a large matrix are wanted, randomised iteration finds them (Halko, Martinsson
and Tropp, 2011). Whatever the route, the residual is measured, and LAPACK's full SVD takes over when it is too large.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dt_lens.errors import DtLensError

__all__ = ["SVD", "decompose"]

TOLERANCE = 1e-9  # relative residual and loss of orthogonality that a route may leave


class SVD(NamedTuple):
    """``sigma [k]``, unit rows ``left [k, m]`` and ``right [k, n]``, and the measured relative error."""

    sigma: Tensor
    left: Tensor
    right: Tensor
    error: float


def decompose(factors: list[Tensor], rank: int | None = None) -> SVD:
    """The leading ``rank`` singular triples of a product of one or two factors; up to the numerical rank when ``None``.

    Args:
        factors: ``[A]`` with ``A [m, n]``, or ``[A, B]`` with ``A [m, r]``, ``B [r, n]``; float64.

    Raises:
        DtLensError: when a factor holds values that are not finite, or no solver reaches the tolerance.
    """
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        raise DtLensError("A matrix holds NaN or infinite values, so it has no singular value decomposition.")
    if len(factors) == 2:
        (A, B) = factors
        qa, ra = torch.linalg.qr(A)
        qb, rb = torch.linalg.qr(B.T)
        inner = decompose([ra @ rb.T], rank)
        return SVD(inner.sigma, inner.left @ qa.T, inner.right @ qb.T, inner.error)
    M = factors[0]
    small = min(M.shape)
    routes = [_gram, _lapack] if small > 256 else [_lapack]
    if rank is not None and rank * 8 < small:
        routes.insert(0, _randomised)
    for route in routes:
        result = _cut(route(M, rank), M, rank)
        if result.error <= TOLERANCE:
            return result
    raise DtLensError(
        f"The singular value decomposition of a {list(M.shape)} matrix did not converge (relative error "
        f"{result.error:.1e})."
    )


Triple = tuple[Tensor, Tensor, Tensor]  # left [m, k], sigma [k], right [n, k]


def _lapack(M: Tensor, rank: int | None) -> Triple:
    left, sigma, right = torch.linalg.svd(M, full_matrices=False)
    return left, sigma, right.T


def _gram(M: Tensor, rank: int | None) -> Triple:
    if M.shape[0] > M.shape[1]:
        right, sigma, left = _gram(M.T, rank)
        return left, sigma, right
    _, left = torch.linalg.eigh(M @ M.T)
    left = left.flip(-1)
    # sqrt(eigenvalue) loses half the digits of small sigmas; the length of the image does not.
    image = M.T @ left
    sigma = image.norm(dim=0)
    order = sigma.argsort(descending=True, stable=True)
    sigma, left, image = sigma[order], left[:, order], image[:, order]
    return left, sigma, image / sigma.clamp_min(1e-300)


def _randomised(M: Tensor, rank: int | None) -> Triple:
    assert rank is not None
    generator = torch.Generator(M.device).manual_seed(0)
    width = min(rank + 16, *M.shape)
    Q = torch.randn(M.shape[1], width, generator=generator, dtype=M.dtype, device=M.device)
    for _ in range(12):
        Q, _ = torch.linalg.qr(M.T @ torch.linalg.qr(M @ Q)[0])
    left, sigma, inner = torch.linalg.svd(M @ Q, full_matrices=False)
    return left, sigma, Q @ inner.T


def _cut(found: Triple, M: Tensor, rank: int | None) -> SVD:
    """Cut at the rank, and measure: ``M right = sigma left``, ``M^T left = sigma right``, both sides orthonormal."""
    left, sigma, right = found
    top = sigma[0] if len(sigma) and sigma[0] > 0 else sigma.new_ones(())
    keep = int((sigma > top * max(M.shape) * torch.finfo(M.dtype).eps * 8).sum())
    keep = keep if rank is None else min(keep, rank)
    left, sigma, right = left[:, :keep], sigma[:keep], right[:, :keep]
    if not keep:
        return SVD(sigma, left.T, right.T, 0.0)
    identity = torch.eye(keep, dtype=M.dtype, device=M.device)
    residual = max(
        (M @ right - left * sigma).norm() / top,
        (M.T @ left - right * sigma).norm() / top,
        (left.T @ left - identity).abs().max(),
        (right.T @ right - identity).abs().max(),
    )
    if rank is None:
        residual = max(residual, (M - (left * sigma) @ right.T).norm() / M.norm())
    return SVD(sigma, left.T.contiguous(), right.T.contiguous(), float(residual))
