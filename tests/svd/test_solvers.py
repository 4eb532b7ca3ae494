"""Every route to a singular value decomposition against float64 references, and the check that stands behind them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from dt_lens import DtLensError
from dt_lens.svd import solvers as decompose
from dt_lens.svd.solvers import SVD


def orthogonal(n: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]


def planted(m: int, n: int, sigma: Tensor, seed: int = 0) -> Tensor:
    return orthogonal(m, len(sigma), seed) * sigma @ orthogonal(n, len(sigma), seed + 1).T


def random(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KINDS: dict[str, Callable[[], Tensor]] = {
    "square": lambda: random(24, 24),
    "tall": lambda: random(40, 12),
    "wide": lambda: random(12, 40),
    "nearly square": lambda: random(20, 23),
    "row": lambda: random(1, 9),
    "column": lambda: random(9, 1),
    "rank-deficient": lambda: random(30, 7) @ random(7, 20, 1),
    "tied sigmas": lambda: planted(20, 15, torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0], dtype=torch.float64)),
    "identity": lambda: torch.eye(10, dtype=torch.float64),
    "steep": lambda: planted(20, 15, torch.logspace(0, -6, 15, dtype=torch.float64)),
    "tiny": lambda: random(10, 14) * 1e-180,
    "huge": lambda: random(10, 14) * 1e180,
    "one huge row": lambda: torch.cat([random(1, 14) * 1e6, random(9, 14)]),
}


def assert_decomposes(found: SVD, M: Tensor, rank: int | None = None) -> None:
    """Held against scipy: sigmas, number of directions, orthonormality, and the matrix rebuilt."""
    reference = scipy.linalg.svd(M.numpy(), compute_uv=False, lapack_driver="gesvd")
    true_rank = int((reference > reference[0] * 1e-12).sum())
    k = true_rank if rank is None else min(rank, true_rank)
    assert len(found.sigma) == len(found.left) == len(found.right) == k
    np.testing.assert_allclose(found.sigma.numpy(), reference[:k], rtol=1e-10, atol=1e-13 * reference[0])
    for side in (found.left, found.right):
        assert torch.dist(side @ side.T, torch.eye(k, dtype=M.dtype)) < 1e-10
    rebuilt = (found.left.T * found.sigma) @ found.right
    left_out = np.linalg.norm(reference[k:] / reference[0])
    assert float((M - rebuilt).div(reference[0]).norm()) == pytest.approx(left_out, abs=1e-9)
    assert found.error < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("rank", [None, 3, 1000])
def test_a_matrix(kind: str, large: bool, rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(decompose, "GRAM", 0)
    M = KINDS[kind]()
    assert_decomposes(decompose.decompose([M], rank), M, rank)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [None, 3])
def test_a_product(kind: str, rank: int | None) -> None:
    B = KINDS[kind]()
    if kind in ("tiny", "huge"):
        B = B / B.abs().max()
    for A in (random(25, len(B), 7), random(2, len(B), 7), planted(25, len(B), torch.ones(1).double(), 7)):
        assert_decomposes(decompose.decompose([A, B], rank), A @ B, rank)
        assert_decomposes(decompose.decompose([B.T, A.T], rank), (A @ B).T, rank)


@pytest.mark.parametrize("route", ["_lapack", "_gesvd", "_gram"])
@pytest.mark.parametrize("kind", ["square", "tall", "wide", "steep", "one huge row"])
def test_each_route_by_itself(route: str, kind: str) -> None:
    M = KINDS[kind]()
    if (route, kind) == ("_gram", "one huge row"):  # the others are a millionth of it; LAPACK takes them
        with pytest.raises(torch.linalg.LinAlgError, match="too small to be seen"):
            decompose._gram(M, None)
        return
    left, sigma, right = getattr(decompose, route)(M, None)
    reference = scipy.linalg.svd(M.numpy(), compute_uv=False)
    # What the Gram matrix costs a small sigma, the image's length gives back.
    np.testing.assert_allclose(sigma.numpy(), reference, rtol=1e-8, atol=1e-13 * reference[0])
    assert torch.dist((left * sigma) @ right.T, M) < 1e-8 * float(M.norm())


def routes_taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    taken: list[str] = []

    def watch(name: str) -> None:
        route = getattr(decompose, name)
        active = False

        def watched(M: Tensor, rank: int | None) -> object:
            nonlocal active
            if not active:  # the routes turn a matrix over by calling themselves
                taken.append(name)
            active, outer = True, active
            try:
                return route(M, rank)
            finally:
                active = outer

        monkeypatch.setattr(decompose, name, watched)

    for name in ("_leading_single", "_leading", "_gram", "_lapack", "_gesvd"):
        watch(name)
    return taken


def test_a_route_that_is_not_accurate_enough_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "GRAM", 10)
    taken = routes_taken(monkeypatch)
    steep = planted(120, 50, torch.logspace(0, -11, 50, dtype=torch.float64))  # squares of the last are below rounding
    assert_decomposes(decompose.decompose([steep]), steep)
    assert taken == ["_gram", "_lapack"]


def broken(kind: str) -> Callable[[Tensor, int | None], tuple[Tensor, Tensor, Tensor]]:
    def route(M: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
        left, sigma, right = torch.linalg.svd(M, full_matrices=False)
        right = right.T
        if kind == "turned":
            left = torch.cat([left[:, :1] + 1e-6 * left[:, 1:2], left[:, 1:]], 1)
        elif kind == "scaled":
            sigma = sigma * (1 + 1e-6)
        elif kind == "incomplete":
            left, sigma, right = left[:, :-1], sigma[:-1], right[:, :-1]
        elif kind == "swapped":
            sigma = sigma[torch.tensor([1, 0, *range(2, len(sigma))])]
        elif kind == "NaN":
            right = right * float("nan")
        elif kind == "raises":
            raise torch.linalg.LinAlgError("did not converge")
        return left, sigma, right

    return route


@pytest.mark.parametrize("kind", ["turned", "scaled", "incomplete", "swapped", "NaN", "raises"])
@pytest.mark.parametrize("shape", [(12, 15), (90, 110)])  # of many directions the error is estimated
def test_the_error_is_measured(kind: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    M = random(*shape)
    taken = routes_taken(monkeypatch)
    monkeypatch.setattr(decompose, "_lapack", broken(kind))
    assert_decomposes(decompose.decompose([M]), M)
    assert taken == ["_gesvd"]
    monkeypatch.setattr(decompose, "_gesvd", broken(kind))
    with pytest.raises(DtLensError, match=r"\[\d+, \d+\] matrix did not converge"):
        decompose.decompose([M])


def test_the_error_of_a_product_is_measured_on_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    A, B = random(9, 4), random(4, 9)
    cholesky, qr = torch.linalg.cholesky_ex, torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda G: (cholesky(G)[0] * (1 + 1e-6), cholesky(G)[1]))
    assert_decomposes(decompose.decompose([A, B]), A @ B)  # QR takes over
    monkeypatch.setattr(torch.linalg, "qr", lambda M: (qr(M)[0], qr(M)[1] * (1 + 1e-6)))
    with pytest.raises(DtLensError, match="product did not converge"):
        decompose.decompose([A, B])


@pytest.mark.parametrize(("condition", "orthogonalised"), [(10.0, 0), (1e5, 2), (1e9, 2)])
def test_only_badly_conditioned_factors_need_qr(
    condition: float, orthogonalised: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigma = torch.logspace(0, -float(np.log10(condition)), 6, dtype=torch.float64)
    A, B = planted(30, 6, sigma), planted(6, 25, sigma, 5)
    qr, calls = torch.linalg.qr, []

    def counted(M: Tensor) -> object:
        calls.append(1)
        return qr(M)

    monkeypatch.setattr(torch.linalg, "qr", counted)
    assert_decomposes(decompose.decompose([A, B], 4), A @ B, 4)
    assert len(calls) == orthogonalised


def test_zero() -> None:
    for factors in ([torch.zeros(4, 6).double()], [random(4, 3), torch.zeros(3, 6).double()]):
        found = decompose.decompose(factors)
        assert found.sigma.shape == (0,)
        assert found.left.shape == (0, 4)
        assert found.right.shape == (0, 6)


def test_what_rounding_leaves_of_nothing_is_not_a_direction() -> None:
    basis = orthogonal(20, 8, 0)
    # The product of a matrix with what is orthogonal to its rows is zero but for rounding.
    assert not len(decompose.decompose([random(5, 4) @ basis[:, :4].T, basis[:, 4:] @ random(4, 7, 1)]).sigma)
    M = torch.full((6, 5), 0.1, dtype=torch.float64)
    centred = M - M.mean(0)
    assert not len(decompose.decompose([centred], floor=1e-15).sigma)
    # The floor is absolute, whatever power of two the matrix is scaled by on the way.
    for scale in (1e-8, 1.0, 1e8):
        tall = planted(8, 8, torch.tensor([1.0, 0.5, 1e-3]).double()) * scale
        assert len(decompose.decompose([tall], floor=0.01 * scale).sigma) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad: float) -> None:
    M = random(4, 4)
    M[2, 1] = bad
    for factors in ([M], [M, random(4, 4)], [random(4, 4), M]):
        with pytest.raises(DtLensError, match="NaN or infinite"):
            decompose.decompose(factors)
