"""The leading singular triples of a matrix from its Gram matrix: as fast for a flat spectrum as for one that decays.

A Krylov space of the matrix grows with the flatness of its spectrum; the Gram matrix costs the same for all. Its
leading eigenvectors come from ARPACK's Lanczos iteration (Lehoucq, Sorensen and Yang, "ARPACK Users' Guide", 1998). In
float32 both take half the time, and the eigenvectors have six digits at most; the other digits come from Newton
corrections, ``(theta - G) z = r`` with the residual ``r`` in float64 and the equation solved in float32 (Sleijpen and
Van der Vorst, "A Jacobi-Davidson iteration method for linear eigenvalue problems", 1996).

Lanczos may miss one of several equal eigenvalues, and no residual shows that. A Cholesky factorisation does: what is
left of the Gram matrix without the directions found, taken from the smallest eigenvalue wanted, must be positive.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.linalg import LinAlgError
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, eigsh
from torch import Tensor

__all__ = ["SPARE", "leading"]

Array = NDArray[Any]

SEEDED = "rng" in inspect.signature(eigsh).parameters  # not before SciPy 1.17
SPARE = 8  # directions beyond those wanted: the corrections converge by the gap behind them
CORRECTIONS, STEPS = 3, 60  # at most: Newton corrections, and steps of conjugate gradients for each
DIRECT = 1024  # up to this size LAPACK computes the leading eigenvectors in float64 about as fast as Lanczos
RESTARTS = 60  # of Lanczos at most
NEAR = 1e-4  # the least gap behind the directions wanted, relative to the largest eigenvalue
# A sigma below this share of the largest one is not seen in a Gram matrix: its square is rounding.
SEEN = {np.dtype(np.float32): 3e-3, np.dtype(np.float64): 1e-6}


def leading(M: Tensor, rank: int, tolerance: float, kind: torch.dtype) -> tuple[Array, Array, Array]:
    """The leading ``(left [m, k], sigma [k], right [n, k])`` of a wide ``M [m, n]`` in float64, a few beyond ``rank``.

    Args:
        M: at least as wide as it is tall, on the CPU.
        rank: how many are wanted.
        tolerance: of ``||M right - sigma left|| / sigma_0``, at which the corrections stop.
        kind: the precision of the Gram matrix, float32 or float64.

    Raises:
        LinAlgError: when Lanczos or the corrections converge too slowly, or a direction was missed.
    """
    scale, gram = _gram(M, kind)
    count = min(rank + SPARE, len(gram) - 1)
    whole = kind == torch.float64 and len(gram) <= DIRECT
    X = np.linalg.qr((_by_lapack if whole else _lanczos)(gram, count).astype(np.float64))[0]
    wide = M.numpy()
    Y = wide.T @ X
    for correction in range(CORRECTIONS + 1):
        X, Y, theta = _ritz(X, Y)
        wanted = np.arange(min(rank, len(theta)))
        seen = theta[wanted] > SEEN[gram.dtype] ** 2 * theta[0]
        residual = wide @ Y[:, wanted] - X[:, wanted] * theta[wanted]
        error = np.linalg.norm(residual, axis=0) / np.sqrt(theta[0] * theta[wanted].clip(1e-300))
        enough = tolerance / len(wanted) ** 0.5
        poor = wanted[seen & (error > enough)]
        if not len(poor):
            break
        # The steps of conjugate gradients grow with the square root of this.
        if correction == CORRECTIONS or theta[poor[-1]] - theta[-1] < NEAR * theta[0]:
            raise LinAlgError("The corrections converge too slowly.")
        Z = _solved(gram, X, theta[poor] / scale, residual[:, poor] / scale, 0.01 * enough / error[poor])
        for _ in range(2):  # once is not enough for orthogonality, twice is
            Z = np.linalg.qr(Z - X @ (X.T @ Z))[0]
        X, Y = np.concatenate([X, Z], 1), np.concatenate([Y, wide.T @ Z], 1)
    sigma = np.sqrt(theta)
    zero = 8 * max(M.shape) * np.finfo(np.float64).eps * sigma[0]
    if (sigma[wanted[~seen]] > zero).any():
        raise LinAlgError("A sigma is too small to be seen in the Gram matrix.")
    if not whole:
        _require_all(gram, X, theta / scale, len(wanted))
    return X, sigma, Y / sigma.clip(np.finfo(np.float64).tiny)


def _gram(M: Tensor, kind: torch.dtype) -> tuple[float, Array]:
    """``M M^T`` in a precision, divided by the number that comes first."""
    scale = 1.0
    # NumPy sees that this product is symmetric, and computes half of it (BLAS syrk).
    with np.errstate(invalid="ignore"):
        gram = (narrow := M.to(kind).numpy()) @ narrow.T
    if not 1e-25 < gram.trace() < 1e30:  # squares leave float32's range
        largest = max(abs(float(end)) for end in M.aminmax())
        if not largest > 0:
            raise LinAlgError("A zero matrix has no leading directions.")
        scale = largest**2
        gram = (narrow := (M / largest).to(kind).numpy()) @ narrow.T
    return scale, gram


def _by_lapack(gram: Array, count: int) -> Array:
    """The eigenvectors ``[n, count]`` of the largest eigenvalues, by LAPACK."""
    ends = [len(gram) - count, len(gram) - 1]
    return np.asarray(scipy.linalg.eigh(gram, subset_by_index=ends, check_finite=False)[1])


def _lanczos(gram: Array, count: int) -> Array:
    """The eigenvectors ``[n, count]`` of the largest eigenvalues."""
    if not SEEDED:
        raise LinAlgError("This SciPy's Lanczos may draw numbers that nobody can seed.")
    # Random: what a LayerNorm centres has ones in its null space. Fixed: the same bits every time. ARPACK asks for more
    # random numbers where its space is exhausted, as with repeated eigenvalues.
    generator = np.random.default_rng(0)
    start = generator.standard_normal(len(gram)).astype(gram.dtype)
    try:
        tolerance = 1e-5 if gram.dtype == np.float32 else 0
        return np.asarray(eigsh(gram, k=count, v0=start, tol=tolerance, maxiter=RESTARTS, rng=generator)[1])
    except (ArpackError, ArpackNoConvergence) as error:
        raise LinAlgError(str(error)) from error


def _ritz(X: Array, Y: Array) -> tuple[Array, Array, Array]:
    """Rayleigh and Ritz in the span of ``X``, with ``Y = M^T X``: both turned, and the eigenvalues, largest first."""
    theta, turn = scipy.linalg.eigh(Y.T @ Y)
    turn = turn[:, ::-1]
    Y = Y @ turn
    theta = np.square(Y).sum(0)  # a small eigenvalue loses digits, the length of the image does not
    order = np.argsort(-theta, kind="stable")
    return X @ turn[:, order], Y[:, order], theta[order]


def _solved(gram: Array, X: Array, theta: Array, residual: Array, target: Array) -> Array:
    """``(theta_i - G) z_i = r_i`` outside the span of ``X`` by conjugate gradients; float64.

    Args:
        theta, residual: ``[k]``, ``[n, k]``.
        target: the relative residual at which an equation counts as solved, ``[k]``.
    """
    kind = gram.dtype
    basis, shift = X.astype(kind), theta.astype(kind)
    least = np.square(target.clip(3e-5, 0.1))

    def outside(V: Array) -> Array:
        return np.asarray(V - basis @ (basis.T @ V))

    lengths = np.linalg.norm(residual, axis=0)
    r = outside((residual / lengths).astype(kind))
    z, p, energy = np.zeros_like(r), r, np.square(r).sum(0)
    for _ in range(STEPS):
        image = outside(p * shift - gram @ p)
        bend = (p * image).sum(0)
        # A column that has converged, or whose equation is not positive, stays as it is.
        step = np.where((energy > least) & (bend > 0), energy / np.where(bend > 0, bend, 1), 0).astype(kind)
        if not step.any():
            break
        z, r = z + p * step, r - image * step
        before, energy = energy, np.square(r).sum(0)
        p = r + p * (energy / before.clip(1e-30)).astype(kind)
    return np.asarray(z.astype(np.float64) * lengths)


def _require_all(gram: Array, X: Array, theta: Array, rank: int) -> None:
    """Raise ``LinAlgError`` if the Gram matrix has an eigenvalue above the last one wanted that ``X`` lacks."""
    kind = gram.dtype
    rounding = 64 * float(np.finfo(kind).eps) * float(theta[0])
    rest = -gram
    rest += (X * theta).astype(kind) @ X.T.astype(kind)
    rest[np.diag_indices_from(rest)] += kind.type(theta[rank - 1] + rounding)
    if int(torch.linalg.cholesky_ex(torch.from_numpy(rest))[1]):
        raise LinAlgError("Lanczos has missed a direction.")
