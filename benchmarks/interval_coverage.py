"""How often the intervals of means and the tests of differences are right, on outcomes as agents have them.

``python benchmarks/interval_coverage.py [SAMPLES]`` prints the two tables of ``docs/method_behaviour.md``, in a few
seconds. All samples share their resamples, which are those of ``bootstrap_interval(x, resamples=2000, seed=0)``, so
that a matrix product does them all at once; the first samples of every cell are compared with ``dt_lens.statistics``
itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dt_lens.statistics.outcomes import NEARLY_EQUAL, bootstrap_interval, interval_note, mean_test, sign_flip

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Array]
RESAMPLES = 2000
CHECKED = 5  # samples of each cell for which the functions themselves are called
TAIL = 0.025


def rare(rng: np.random.Generator, size: tuple[int, int]) -> Array:
    """Every episode returns 1, but one in twenty fails and returns 0."""
    return np.where(rng.random(size) < 0.05, 0.0, 1.0)


def rare_with_noise(rng: np.random.Generator, size: tuple[int, int]) -> Array:
    """One in twenty fails and returns a tenth of what the others return, give or take."""
    return np.where(rng.random(size) < 0.05, rng.normal(300, 100, size), rng.normal(3000, 50, size))


def lognormal(rng: np.random.Generator, size: tuple[int, int]) -> Array:
    """A long tail."""
    return rng.lognormal(0, 1, size)


def two_humps(rng: np.random.Generator, size: tuple[int, int]) -> Array:
    """Half of the episodes fall early."""
    return np.where(rng.random(size) < 0.5, rng.normal(300, 100, size), rng.normal(3000, 200, size))


def normal(rng: np.random.Generator, size: tuple[int, int]) -> Array:
    """For comparison."""
    return rng.normal(0, 1, size)


MEANS: dict[Draw, float] = {
    rare: 0.95,
    rare_with_noise: 0.05 * 300 + 0.95 * 3000,
    lognormal: float(np.exp(0.5)),
    two_humps: 1650.0,
    normal: 0.0,
}
SIZES = (20, 50, 100, 200)


class Resampled:
    """The resamples of many samples ``x [sample, n]``, and the intervals and p-values that come of them."""

    def __init__(self, x: Array) -> None:
        self.x, n = x, x.shape[1]
        drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
        weights = np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float64).T / n
        self.mean, self.error = x.mean(1), x.std(1, ddof=1) / np.sqrt(n)
        centred = x - self.mean[:, None]
        self.shift = centred @ weights  # [sample, resample]
        variance = np.maximum(centred**2 @ weights - self.shift**2, 0) / (n - 1)
        self.flat = np.sqrt(variance) <= NEARLY_EQUAL * self.error[:, None]
        with np.errstate(all="ignore"):
            self.t = np.where(np.abs(self.shift) < 1e-12 * np.ptp(x), 0.0, self.shift / np.sqrt(variance))
        self.students = self.flat.mean(1) > TAIL

    def studentised(self) -> Array:
        """The intervals of ``bootstrap_interval``, ``[2, sample]``; ``nan`` where a sample does not vary."""
        low, high = np.quantile(self.t, TAIL, axis=1, method="higher"), np.quantile(self.t, 1 - TAIL, 1, method="lower")
        bound = stats.t.isf(TAIL, self.x.shape[1] - 1)
        low, high = np.where(self.students, -bound, low), np.where(self.students, bound, high)
        ends = np.stack([self.mean - high * self.error, self.mean - low * self.error])
        return np.where(np.ptp(self.x, axis=1) > 0, ends, np.nan)

    def corrected(self) -> Array:
        """Bias-corrected and accelerated intervals (BCa), as until version 0.2, ``[2, sample]``."""
        centred = self.x - self.mean[:, None]
        below = (self.shift < 0).mean(1) + (self.shift == 0).mean(1) / 2
        bias = stats.norm.ppf(np.clip(below, 1 / RESAMPLES, 1 - 1 / RESAMPLES))
        acceleration = (centred**3).sum(1) / np.maximum(6 * (centred**2).sum(1) ** 1.5, 1e-300)
        ends = []
        for z in (stats.norm.ppf(TAIL), stats.norm.isf(TAIL)):
            level = stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
            place = np.clip((level * RESAMPLES).astype(int), 0, RESAMPLES - 1)
            ends.append(self.mean + np.take_along_axis(np.sort(self.shift, 1), place[:, None], 1)[:, 0])
        return np.where(np.ptp(self.x, axis=1) > 0, np.stack(ends), np.nan)

    def mean_test(self, value: float) -> Array:
        """The p-values of ``mean_test(x - value)``, ``[sample]``."""
        with np.errstate(all="ignore"):
            t = (self.mean - value) / self.error
        t = np.nan_to_num(t, posinf=0, neginf=0)  # of samples that do not vary
        slack = 1e-9 * (1 + np.abs(t))
        low, high = (self.t <= (t + slack)[:, None]).sum(1), (self.t >= (t - slack)[:, None]).sum(1)
        tail = np.minimum(low, high)
        boot = np.minimum(1, 2 * (tail + 1) / (RESAMPLES + 1))
        found = np.where(self.students, 2 * stats.t.sf(np.abs(t), self.x.shape[1] - 1), boot)
        return np.where(np.ptp(self.x, axis=1) > 0, found, np.nan)


def flipped(d: Array) -> Array:
    """The p-values of ``sign_flip``, by signs that all samples share, ``[sample]``."""
    signs = np.random.default_rng(0).integers(0, 2, (RESAMPLES, d.shape[1]), dtype=np.int8) * 2.0 - 1
    as_extreme = np.abs(d @ signs.T) >= np.abs(d.sum(1))[:, None] - 1e-12 * np.abs(d).sum(1)[:, None]
    return np.asarray((as_extreme.sum(1) + 1) / (RESAMPLES + 1))


def covered(ends: Array, value: float) -> str:
    """The share of samples whose interval covers, and in brackets that of those that have an interval."""
    known = ~np.isnan(ends[0])
    hits = (ends[0] <= value) & (value <= ends[1])
    if not known.any():
        return "-"
    return f"{hits.mean():.1%}" + ("" if known.all() else f" ({hits[known].mean():.1%})")


def main(samples: int) -> None:
    """Print both tables."""
    print("| outcomes | n | studentised | samples with a note on rare outcomes | BCa |")
    print("|---|---:|---:|---:|---:|")
    levels = []
    for draw, mean in MEANS.items():
        name = getattr(draw, "__name__", "").replace("_", " ")
        for n in SIZES:
            x = draw(np.random.default_rng([1, n]), (samples, n))
            found = Resampled(x)
            ends, p, flips = found.studentised(), found.mean_test(mean), flipped(x - mean)
            for i in range(CHECKED):
                np.testing.assert_allclose(bootstrap_interval(x[i], resamples=RESAMPLES), ends[:, i], rtol=1e-6)
                np.testing.assert_allclose(mean_test(x[i] - mean, resamples=RESAMPLES), p[i], atol=2e-3)
                np.testing.assert_allclose(sign_flip(x[i] - mean, resamples=RESAMPLES), flips[i], atol=2e-3)
            told = np.array(["rare" in interval_note(row) or "equal" in interval_note(row) for row in x])
            cells = covered(ends, mean), f"{told.mean():.0%}", covered(found.corrected(), mean)
            print(f"| {name} | {n} | {' | '.join(cells)} |", flush=True)
            levels.append(f"| {name} | {n} | {(flips <= 0.05).mean():.1%} | {(p <= 0.05).mean():.1%} |")
    print("\n| differences with mean 0 | n | sign flips | mean test |\n|---|---:|---:|---:|")
    print("\n".join(levels))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
