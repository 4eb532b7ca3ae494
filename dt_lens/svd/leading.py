"""The leading singular triples of a matrix from its Gram matrix: as fast for a flat spectrum as for one that decays.

A Krylov space of the matrix grows with the flatness of its spectrum; the Gram matrix costs the same for all. Its
leading eigenvectors come from a block Krylov space (Golub and Underwood, "The block Lanczos method for computing
eigenvalues", 1977). In float32 both take half the time, and the eigenvectors have six digits at most; the other digits
come from Newton corrections, ``(theta - G) z = r``, with the residual ``r`` in float64 and the equation solved in
float32 (Sleijpen and Van der Vorst, "A Jacobi-Davidson iteration method for linear eigenvalue problems", 1996).

A Krylov space may miss one of several equal eigenvalues, and no residual shows that. A Cholesky factorisation does: the
smallest eigenvalue wanted minus what is left of the Gram matrix outside the directions found must be positive.

All products are torch's: NumPy's and SciPy's libraries have threads of their own, which keep a core busy for a while
after each call, and slow torch's down to a third. Vectors are rows, in which order few of them are multiplied fastest.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import scipy.linalg
import torch
from scipy.linalg import LinAlgError
from torch import Tensor

__all__ = ["SEEN", "SPARE", "leading", "rows_times", "symmetric_product"]

SPARE = 8  # directions beyond those wanted: the corrections converge by the gap behind them
CORRECTIONS, STEPS = 3, 60  # at most: Newton corrections, and steps of conjugate gradients for each
DIRECT = 1024  # up to this size LAPACK computes the leading eigenvectors in float64 about as fast
PARTS = 8  # of a Gram matrix, which is symmetric: so many blocks of rows, of which only those up to the diagonal
WIDTH = 8  # vectors by which a Krylov space grows at least
FIRST = 6  # after so many of them it is looked at for the first time
WIDEST = 768  # vectors of a Krylov space at most
REACHED = {torch.float32: 1e-5, torch.float64: 1e-12}  # the residual of an eigenvector, relative to the largest value
NEAR = 1e-4  # the least gap behind the directions wanted, relative to the largest eigenvalue
OUTLYING = 2  # times the largest of the others, sigmas that stand out
FAR = 32  # times: then the others need a Gram matrix of their own
# A sigma below this share of the largest one is not seen in a Gram matrix: its square is rounding.
SEEN = {torch.float32: 3e-3, torch.float64: 1e-6}


class _Ritz(NamedTuple):
    """Approximate eigenvectors of a Gram matrix ``[n, n]``: values ``[k]``, largest first, and vectors ``[k, n]``."""

    values: Tensor
    vectors: Tensor


def leading(
    M: Tensor, rank: int, tolerance: float, kind: torch.dtype, gram: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``(left [k, m], sigma [k], right [k, n])`` of a wide ``M [m, n]`` in float64, a few beyond ``rank``.

    Args:
        M: at least as wide as it is tall.
        rank: how many are wanted.
        tolerance: of ``||M right - sigma left|| / sigma_0``, at which the corrections stop.
        kind: the precision of the Gram matrix, float32 or float64.
        gram: ``M M^T`` in float64, if it is at hand.

    Raises:
        LinAlgError: when the Krylov space or the corrections converge too slowly, or a direction was missed.
    """
    scale, gram = _gram(M, kind, gram)
    try:
        return _leading(M, rank, tolerance, kind, scale, gram)
    except LinAlgError:
        if kind != torch.float32 or rank < 2 or scale != 1:
            raise
    return _beside_outliers(M, rank, tolerance, gram)


def _beside_outliers(M: Tensor, rank: int, tolerance: float, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``leading`` of a matrix whose first few sigmas are far larger than the others, which are close together.

    Beside a large eigenvalue the gaps between the others are small, so the large ones are found first and taken off.
    ``gram`` is lost.
    """
    left, sigma, _ = _leading(M, 1, tolerance, torch.float32, 1.0, gram)
    many = int((sigma > OUTLYING * sigma[-1]).sum())
    if not 0 < many < min(rank, SPARE):
        raise LinAlgError("No few directions stand out.")
    if many > 1:
        left = _leading(M, many, tolerance, torch.float32, 1.0, gram)[0]
    left = left[:many]
    image = rows_times(left, M)
    rest = torch.addmm(M, left.T, image, alpha=-1)
    if float(sigma[0]) < FAR * float(sigma[-1]):
        gram -= ((left * image.square().sum(1)[:, None]).T @ left).to(gram)
    else:  # the others are lost in the rounding of this Gram matrix
        gram = symmetric_product(rest.to(gram))
    others, sigma, _ = _leading(rest, rank - many, tolerance, torch.float32, 1.0, gram)
    if not float(sigma[0]) * OUTLYING < float(image.norm(dim=1).min()):
        raise LinAlgError("The directions that stand out are not all found.")
    del rest
    X = _orthonormal(torch.cat([left, others]))
    X, Y, theta = _ritz(X, rows_times(X, M))
    return _triples(X, Y, theta.sqrt())


def _leading(
    M: Tensor, rank: int, tolerance: float, kind: torch.dtype, scale: float, gram: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``leading``, from a Gram matrix that was divided by ``scale``."""
    count = min(rank + SPARE, len(gram) - 1)
    whole = kind == torch.float64 and len(gram) <= DIRECT
    first = (_by_lapack if whole else _krylov)(gram, count)
    if not whole:
        _require_all(gram, first, count, min(rank, count))
    X = _orthonormal(first.vectors[:count].double())
    Y = rows_times(X, M)
    for correction in range(CORRECTIONS + 1):
        X, Y, theta = _ritz(X, Y)
        wanted = min(rank, len(theta))
        least = theta[:wanted].clamp_min(1e-300)
        seen = theta[:wanted] > SEEN[kind] ** 2 * theta[0]
        residual = _after(M, Y[:wanted]) - X[:wanted] * theta[:wanted, None]
        error = residual.norm(dim=1) / (theta[0] * least).sqrt()
        enough = tolerance / wanted**0.5
        poor = (seen & (error > enough)).nonzero().flatten()
        if not len(poor):
            break
        # The steps of conjugate gradients grow with the square root of this.
        if correction == CORRECTIONS or theta[poor[-1]] - theta[-1] < NEAR * theta[0]:
            raise LinAlgError("The corrections converge too slowly.")
        rest = _Ritz(first.values[count:], first.vectors[count:])
        Z = _solved(gram, X, theta[poor] / scale, residual[poor] / scale, 0.01 * enough / error[poor], rest)
        for _ in range(2):  # once is not enough for orthogonality, twice is
            Z = _orthonormal(Z - (Z @ X.T) @ X)
        X, Y = torch.cat([X, Z]), torch.cat([Y, rows_times(Z, M)])
    sigma = theta.sqrt()
    zero = 8 * max(M.shape) * torch.finfo(torch.float64).eps * sigma[0]
    if not bool(seen.all()):
        # What is found in place of an unseen direction is any vector of many, whose own image may be far shorter.
        found = wanted - int((~seen).sum())
        if float(_left_over(M, X[:found], Y[:found])) > zero:
            raise LinAlgError("A sigma is too small to be seen in the Gram matrix.")
    return _triples(X, Y, sigma)


def _triples(X: Tensor, Y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors, sigmas and right vectors, from ``X`` and its image ``Y = X M``, whose rows have these lengths."""
    return X, sigma, Y / sigma.clamp_min(torch.finfo(torch.float64).tiny)[:, None]


def _left_over(M: Tensor, X: Tensor, Y: Tensor) -> Tensor:
    """The Frobenius norm of ``M - X^T Y``, which is at least the largest sigma outside the directions ``X``."""
    squares = M.new_zeros((), dtype=torch.float64)
    for part in range(PARTS):
        rows = slice(len(M) * part // PARTS, len(M) * (part + 1) // PARTS)
        squares += (M[rows].double() - X[:, rows].T @ Y).square().sum()
    return squares.sqrt()


def _gram(M: Tensor, kind: torch.dtype, known: Tensor | None = None) -> tuple[float, Tensor]:
    """``M M^T`` in a precision, divided by the number that comes first."""
    scale, gram = 1.0, symmetric_product(M.to(kind)) if known is None else known.to(kind)
    if not 1e-25 < float(gram.trace()) < 1e30:  # squares leave float32's range
        largest = max(abs(float(end)) for end in M.aminmax())
        if not largest > 0:
            raise LinAlgError("A zero matrix has no leading directions.")
        scale, gram = largest**2, symmetric_product((M / largest).to(kind))
    return scale, gram


def symmetric_product(M: Tensor) -> Tensor:
    """``M M^T``, of which little more than half is computed."""
    gram = M.new_empty(len(M), len(M))
    ends = [len(M) * part // PARTS for part in range(PARTS + 1)]
    for begin, end in pairwise(ends):
        gram[begin:end, :end] = M[begin:end] @ M[:end].T
        gram[:begin, begin:end] = gram[begin:end, :begin].T
    return gram


def _by_lapack(gram: Tensor, count: int) -> _Ritz:
    """The eigenvectors of the ``count`` largest eigenvalues, by LAPACK."""
    ends = [len(gram) - count, len(gram) - 1]
    values, vectors = scipy.linalg.eigh(gram.cpu().numpy(), subset_by_index=ends, check_finite=False)
    return _Ritz(torch.from_numpy(values).to(gram).flip(0), torch.from_numpy(vectors).to(gram).flip(1).T)


def _krylov(gram: Tensor, count: int) -> _Ritz:
    """The eigenvectors of a Gram matrix in a block Krylov space in which the ``count - SPARE`` largest have converged.

    Raises:
        LinAlgError: when they have not before the space is too large.
    """
    size, wanted = len(gram), max(count - SPARE, 1)
    # A large matrix is read from memory once for however many vectors.
    width = min(max(WIDTH if size <= DIRECT else 2 * WIDTH, wanted // 2), size)
    limit = min(max(WIDEST, 8 * wanted), size)
    # Random: what a LayerNorm centres has ones in its null space. Fixed: the same bits every time.
    start = torch.randn(width, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(gram)
    V, T = gram.new_empty(limit, size), gram.new_zeros(limit, limit)
    V[:width] = _orthonormal(start)
    held, steps, check, before = 0, 0, FIRST, (0, 0.0)
    while True:
        have, steps = held + width, steps + 1
        basis = V[:have]
        image = V[held:have] @ gram
        along = image @ basis.T
        T[held:have, :have], T[:have, held:have] = along, along.T
        image -= along @ basis
        full = have + width > limit
        if steps >= check or full:
            values, turn = torch.linalg.eigh(T[:have, :have])
            # What a Ritz vector's image has outside the space comes from its part in the last vectors.
            outside = float((turn[held:, -wanted:].T @ image).norm(dim=1).max()) / float(values[-1])
            if outside <= REACHED[gram.dtype]:
                return _Ritz(values.flip(0), turn.flip(1).T @ basis)
            if full or not math.isfinite(outside):
                raise LinAlgError("The Krylov space converges too slowly.")
            check, before = _next_check(steps, math.log(outside / REACHED[gram.dtype]), before)
        new = _orthonormal(image)
        V[have : have + width] = _orthonormal(new - (new @ basis.T) @ basis)
        held = have


def _next_check(steps: int, left: float, before: tuple[int, float]) -> tuple[int, tuple[int, float]]:
    """After how many steps to look again, by how fast the logarithm of the residual has been falling."""
    fall = (before[1] - left) / (steps - before[0]) if before[0] else 0.0
    ahead = math.ceil(left / fall) if fall > 0 else 2
    return steps + min(max(ahead, 1), max(2, steps // 2)), (steps, left)


def _orthonormal(rows: Tensor) -> Tensor:
    made: Tensor = torch.linalg.qr(rows.T)[0].T.contiguous()
    return made


def rows_times(X: Tensor, M: Tensor) -> Tensor:
    """``X M`` for a few rows ``X [k, m]``, in whichever order is the faster one for how ``M`` lies in memory."""
    return X.contiguous() @ M if M.stride(1) == 1 else (M.T @ X.T.contiguous()).T.contiguous()


def _after(M: Tensor, Y: Tensor) -> Tensor:
    """``Y M^T`` for rows ``Y [k, n]``, the same way."""
    return rows_times(Y, M.T)


def _ritz(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh and Ritz in the span of ``X``, with ``Y = X M``: both turned, and the eigenvalues, largest first."""
    turn = torch.linalg.eigh(Y @ Y.T)[1].flip(1).T
    Y = turn @ Y
    theta = Y.square().sum(1)  # a small eigenvalue loses digits, the length of the image does not
    order = theta.argsort(descending=True, stable=True)
    return turn[order] @ X, Y[order], theta[order]


def _solved(gram: Tensor, X: Tensor, theta: Tensor, residual: Tensor, target: Tensor, rest: _Ritz) -> Tensor:
    """``(theta_i - G) z_i = r_i`` outside the span of ``X`` by conjugate gradients; float64.

    Args:
        theta, residual: ``[k]``, ``[k, n]``.
        target: the relative residual at which an equation counts as solved, ``[k]``.
        rest: approximate eigenvectors outside the span of ``X``, in which the equations are solved at once.
    """
    basis, shift = X.to(gram), theta.to(gram)[:, None]
    least = target.clamp(3e-5, 0.1).square().to(gram)

    def outside(V: Tensor) -> Tensor:
        return V - (V @ basis.T) @ basis

    lengths = residual.norm(dim=1, keepdim=True)
    right = outside((residual / lengths).to(gram))
    far = (shift - rest.values).clamp_min(NEAR * float(theta.max()))
    z = outside(((right @ rest.vectors.T) / far) @ rest.vectors)
    r = outside(right - z * shift + z @ gram)
    p, energy = r, r.square().sum(1)
    for _ in range(STEPS):
        image = outside(p * shift - p @ gram)
        bend = (p * image).sum(1)
        # A row that has converged, or whose equation is not positive, stays as it is.
        open_ = (energy > least) & (bend > 0)
        if not bool(open_.any()):
            break
        step = torch.where(open_, energy / bend.where(bend > 0, 1), 0)[:, None]
        z, r = z + p * step, r - image * step
        before, energy = energy, r.square().sum(1)
        p = r + p * (energy / before.clamp_min(1e-30))[:, None]
    found: Tensor = z.double() * lengths
    return found


def _require_all(gram: Tensor, found: _Ritz, count: int, wanted: int) -> None:
    """Raise ``LinAlgError`` if the Gram matrix has an eigenvalue above the last one wanted that was not found.

    In single precision none may be near it either, as then the corrections, which see the Gram matrix only, would fail.
    If ``t - G`` is positive outside a space, no eigenvalue above ``t`` is missing in it (Courant and Fischer).
    """
    largest, last = float(found.values[0]), float(found.values[wanted - 1])
    rounding = 64 * torch.finfo(gram.dtype).eps * largest
    if gram.dtype == torch.float32:
        behind = last - float(found.values[count - 1])
        limit = max(last - max(NEAR * largest, behind / 4), rounding)
    else:
        limit = last + rounding
    space = found.vectors[: 4 * count]
    rest = torch.addmm(gram, space.T, space, beta=-1, alpha=2 * largest)
    rest.diagonal().add_(limit)
    if int(torch.linalg.cholesky_ex(rest)[1]):
        raise LinAlgError("The Krylov space has missed a direction, or there are others near those wanted.")
