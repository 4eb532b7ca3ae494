"""The leading directions from the Gram matrix, whatever the spectrum, against LAPACK in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dt_lens.svd import leading as gram
from dt_lens.svd import solvers
from dt_lens.svd.solvers import SVD, decompose

Array = np.typing.NDArray[np.float64]
ANGLE = 1e-5  # radians


def orthogonal(n: int, k: int, seed: int) -> Array:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, k)))[0]


def planted(sigma: Array, n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy((orthogonal(len(sigma), len(sigma), seed) * sigma) @ orthogonal(n, len(sigma), seed + 1).T)


def flat(m: int, n: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).standard_normal((m, n)))


I = np.arange(1.0, 321)
SPECTRA: dict[str, Callable[[], Tensor]] = {
    "flat": lambda: flat(320, 700),
    "decaying": lambda: planted(I**-0.5, 700),
    "trained": lambda: flat(320, 700) + planted(np.r_[300 / I[:64] ** 0.5, np.zeros(256)], 700),
    "tied": lambda: planted(np.repeat([3.0, 2.0, 1.0, 0.5], 80), 700),
    "pairs": lambda: planted(np.repeat(I[:160] ** -0.5, 2), 700),
    "clustered": lambda: planted(np.repeat([3.0, 2.0], 160) * (1 + 1e-6 * I / 320), 700),
    "all equal": lambda: planted(np.ones(320), 700),
    "rank-deficient": lambda: planted(np.r_[np.linspace(3, 1, 7), np.zeros(313)], 700),
    "steep": lambda: planted(10.0 ** (-I / 3), 700),
    "centred": lambda: flat(320, 700) - flat(320, 700).mean(0),
    "square": lambda: flat(320, 320),
    "tall": lambda: flat(700, 320),
    "tiny": lambda: flat(320, 700) * 1e-50,
    "huge": lambda: flat(320, 700) * 1e50,
}


def assert_leading(found: SVD, M: Tensor, k: int) -> None:
    """Sigmas to ten digits; every direction, or its block of near-equal sigmas, within ANGLE of LAPACK's."""
    left, sigma, right = scipy.linalg.svd(M.numpy(), full_matrices=False)
    k = min(k, int((sigma > 1e-12 * sigma[0]).sum()))
    assert len(found.sigma) == k
    np.testing.assert_allclose(found.sigma.numpy(), sigma[:k], rtol=1e-10)
    ends = [0, *(i for i in range(1, len(sigma)) if sigma[i - 1] - sigma[i] > 1e-9 * sigma[0]), len(sigma)]
    for mine, theirs in ((found.left.numpy(), left.T), (found.right.numpy(), right)):
        np.testing.assert_allclose(mine @ mine.T, np.eye(k), atol=1e-9)
        for start, stop in pairwise(ends):
            if start < k:
                # What of my directions lies outside LAPACK's block.
                block = theirs[start:stop]
                outside = mine[start:stop] - mine[start:stop] @ block.T @ block
                assert np.linalg.norm(outside, 2) < ANGLE


@pytest.mark.parametrize("kind", SPECTRA)
def test_any_spectrum(kind: str) -> None:
    M = SPECTRA[kind]()
    found = decompose([M], 6)
    assert_leading(found, M, 6)
    assert found.error < 1e-9
    again = decompose([M], 6)
    assert torch.equal(found.left, again.left) and torch.equal(found.right, again.right)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.floats(-4, 0), min_size=1, max_size=12),
    st.integers(1, 40),
    st.integers(1, 12),
    st.sampled_from([1.0, 1e-20, 1e20]),
)
def test_spectra_of_steps(levels: list[float], width: int, rank: int, scale: float) -> None:
    """Steps of any height, each of any width, and zeros behind them."""
    sigma = np.sort(np.repeat(10.0 ** np.array(levels), width)[:258])[::-1]
    M = planted(np.r_[sigma, np.zeros(258 - len(sigma))] * scale, 270)
    assert_leading(decompose([M], rank), M, rank)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_direction_that_the_krylov_space_missed_is_noticed(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "DIRECT", 0)
    M, krylov = planted(I**-0.5, 700), gram._krylov
    gram.leading(M, 6, 1e-3, kind)

    def missing(matrix: Any, count: int) -> Any:
        found = krylov(matrix, count)  # largest eigenvalue first
        some = [i for i in range(len(found.values)) if i != 2]
        return found._replace(values=found.values[some], vectors=found.vectors[some])

    monkeypatch.setattr(gram, "_krylov", missing)
    with pytest.raises(scipy.linalg.LinAlgError, match="missed"):
        gram.leading(M, 6, 1e-3, kind)  # the residuals of those found are small enough
    assert_leading(decompose([M], 6), M, 6)


def test_near_equal_sigmas_are_left_to_float64() -> None:
    """The corrections see the Gram matrix in float32, in which these are one."""
    with pytest.raises(scipy.linalg.LinAlgError, match="near"):
        gram.leading(SPECTRA["clustered"](), 6, 1e-10, torch.float32)


def test_what_single_precision_leaves_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    M = SPECTRA["flat"]()
    solved, calls = gram._solved, []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return solved(*args)

    monkeypatch.setattr(gram, "_solved", counted)
    gram.leading(M, 6, 1e-10, torch.float32)
    assert 1 <= len(calls) <= 2
    # A correction of the wrong sign corrects nothing, and is noticed.
    monkeypatch.setattr(gram, "_solved", lambda *args: torch.randn(args[3].shape, dtype=torch.float64))
    with pytest.raises(scipy.linalg.LinAlgError, match="too slowly"):
        gram.leading(M, 6, 1e-10, torch.float32)


def test_a_zero_matrix_has_no_directions() -> None:
    found = decompose([torch.zeros(300, 300, dtype=torch.float64)], 10)
    assert len(found.sigma) == 0 and found.left.shape == (0, 300)


def test_repeated_sigmas_and_an_exhausted_space_give_the_same_bits_every_time() -> None:
    """What extends the Krylov space is then rounding."""
    M = torch.block_diag(*[torch.ones(40, 40, dtype=torch.float64)] * 10)
    first, second = decompose([M], 10), decompose([M], 10)
    assert torch.equal(first.left, second.left) and torch.equal(first.right, second.right)
    torch.testing.assert_close(first.sigma, torch.full((10,), 40.0, dtype=torch.float64))


@pytest.mark.parametrize(("many", "times"), [(1, 16.0), (3, 8.0), (5, 3.0), (1, 100.0)])
def test_a_few_large_sigmas_above_a_flat_spectrum_do_not_make_it_slow(
    many: int, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted direction, or the one that a trained weight often has: the rest is decomposed without it."""
    generator = torch.Generator().manual_seed(1)
    m, n = 600, 2000
    M = torch.randn(m, n, generator=generator, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(k, many, generator=generator, dtype=torch.float64))[0] for k in (m, n))
    M += (left * (times * (m**0.5 + n**0.5) * torch.linspace(1, 1.5, many, dtype=torch.float64))) @ right.T
    U, S, V = torch.linalg.svd(M, full_matrices=False)

    def slow(*_: Any, **__: Any) -> Any:
        raise AssertionError("all directions are computed for the sake of ten")

    for route in ("_gram", "_lapack", "_gesvd", "_leading"):
        monkeypatch.setattr(solvers, route, slow)
    for one in (M, M.T):
        found = decompose([one], 10)
        torch.testing.assert_close(found.sigma, S[:10], rtol=1e-12, atol=0)
        sides = (found.left, found.right) if one is M else (found.right, found.left)
        for side, reference in zip(sides, (U.T, V), strict=True):
            assert float((side * reference[:10]).sum(1).abs().min()) > 1 - 1e-12


@pytest.mark.parametrize("small", [[3e-11], [4e-11, 1e-11], [2e-7, 3e-11]])
def test_a_wide_matrix_keeps_its_tiny_sigmas(small: list[float]) -> None:
    """Beyond a share of 1e-6 the eigenvectors of a Gram matrix are mixtures, whose images may count as zeros."""
    generator = torch.Generator().manual_seed(3)
    sigma = torch.tensor([1, 0.9, *small], dtype=torch.float64)
    k = len(sigma)
    left, right = (torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0] for n in (700, 2800))
    M = (left * sigma) @ right.T
    for one in (M, M.T):
        for rank in (k, k + 2, None):
            found = decompose([one], rank).sigma
            assert len(found) == k, rank
            torch.testing.assert_close(found, sigma, rtol=1e-3, atol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threads", [1, 2])
def test_a_tiny_sigma_is_found_when_more_are_asked_for_than_there_are(seed: int, threads: int) -> None:
    """Also where rounding, which depends on the threads, finds another direction in its place."""
    generator, before = torch.Generator().manual_seed(seed), torch.get_num_threads()
    left, right = (torch.linalg.qr(torch.randn(n, 6, generator=generator, dtype=torch.float64))[0] for n in (600, 900))
    sigma = torch.tensor([1, 0.9, 0.8, 0.7, 0.6, 3e-11], dtype=torch.float64)
    M = (left * sigma) @ right.T
    torch.set_num_threads(threads)
    try:
        for rank in (5, 6, 8, 10, None):
            assert len(decompose([M], rank).sigma) == min(rank or 6, 6), rank
    finally:
        torch.set_num_threads(before)
