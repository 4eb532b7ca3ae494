"""The arithmetic of the benchmarks: what a step of the policy takes, and slopes."""

from __future__ import annotations

import pytest

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens_benchmarks.growth import Point, slopes
from dt_lens_benchmarks.rollouts import HOPPER, Limit, operations


def test_a_step_of_the_bundled_agents_shape_takes_its_products() -> None:
    cfg = HookedDecisionTransformerConfig(11, 3, d_model=128, n_layers=3, n_heads=1, d_mlp=512)
    assert operations(cfg, 20) == pytest.approx(HOPPER, rel=0.01)
    # One layer: queries of the last token only, 5 tokens; counted by hand for d_model 2 and d_mlp 8.
    small = HookedDecisionTransformerConfig(1, 1, d_model=2, n_layers=1, n_heads=1, d_mlp=8)
    embedded, qkv = 2 * 2 * 3, 3 * 2 * 2 * 6
    attention, out, mlp, head = 2 * 2 * 5 * 2, 2 * 2 * 2, 2 * 2 * 2 * 8, 2 * 2 * 1
    assert operations(small, 2) == embedded + qkv + attention + out + mlp + head


def test_the_limit_adds_the_times_of_products_and_physics() -> None:
    assert Limit(products=100.0, physics=4.0).steps(50.0) == pytest.approx(1 / (0.5 + 0.25))


def test_slopes_are_those_of_the_logarithms() -> None:
    found = [Point(n, 3.0 * n**2, 100 + 50 * n, 100) for n in (1, 4, 16)]
    assert slopes(found) == (pytest.approx(2), pytest.approx(1))
