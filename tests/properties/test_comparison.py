"""Laws of comparisons, over random models and changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dt_lens
from dt_lens.lens.matrices import MatrixFactors, find_matrix
from dt_lens.svd.decomposition import Decomposition, decompose_matrix
from dt_lens.svd.two_models.direction_pairs import match_directions
from dt_lens.svd.two_models.matrix_change import haar_angle

Make = Callable[..., Any]
BARE = {"normalization": "none", "embed_ln": False, "final_ln": False}
SETTINGS = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
seeds = st.integers(0, 10_000)
names = st.sampled_from(["blocks.0.mlp.W_in", "blocks.1.mlp.W_out", "blocks.0.attn.W_V", "blocks.1.attn.W_O"])


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int, d: int) -> torch.Tensor:
    return torch.linalg.qr(random(seed, d, d))[0]


def turned(model: Any, Q: torch.Tensor) -> Any:
    """The same model in another basis of the residual stream."""
    other = copy.deepcopy(model)
    for name, weight in other.weights.items():
        kind = name.split(".")[-1]
        if name.startswith("blocks") and kind in ("W_Q", "W_K", "W_V", "W_in"):
            weight.copy_(Q.T @ weight)
        elif name.startswith("embed.") or kind in ("W_O", "W_out"):
            weight.copy_(weight @ Q)
        elif name.startswith("predict.") and kind == "W":
            weight.copy_(Q.T @ weight)
    return other


@SETTINGS
@given(seed=seeds, fold=st.booleans())
def test_a_model_and_itself_do_not_differ(make_dt: Make, seed: int, fold: bool) -> None:
    model = make_dt(seed)
    table = dt_lens.compare(model, copy.deepcopy(model), "blocks.1.*", fold_layernorm=fold).table
    changes = [
        name for name in table if "change" in name or (name.endswith(("_angle", "_angle_max")) and "haar" not in name)
    ]
    assert len(changes) == 11
    assert (table[changes] == 0).all(axis=None)


@SETTINGS
@given(seed=seeds, k=st.integers(1, 6))
def test_two_models_in_another_basis_compare_the_same(make_dt: Make, seed: int, k: int) -> None:
    """Both turned alike: every number that knows no basis is the same, and so are the labels that moved."""
    a, b = (make_dt(s, dtype=torch.float64, **BARE) for s in (seed, seed + 1))
    Q = rotation(seed, 16)
    first, second = (
        dt_lens.compare(one, two, "blocks.0.*", k=k) for one, two in ((a, b), (turned(a, Q), turned(b, Q)))
    )
    for column in first.table.select_dtypes("number"):
        np.testing.assert_allclose(
            first.table[column].astype(float), second.table[column].astype(float), rtol=1e-6, atol=1e-6, err_msg=column
        )
    labels = [c.labels("blocks.0.mlp.W_in", "state_in", k=k, n=None).set_index("label") for c in (first, second)]
    np.testing.assert_allclose(labels[0]["change"], labels[1].loc[labels[0].index, "change"], atol=1e-6)


@SETTINGS
@given(seed=seeds)
def test_one_model_turned_keeps_its_spectra_and_loses_its_directions(make_dt: Make, seed: int) -> None:
    a = make_dt(seed, dtype=torch.float64, d_model=64, n_heads=2, **BARE)
    table = dt_lens.compare(a, turned(a, rotation(seed, 64)), ["*.W_*", "*.OV.*"], k=4).table
    np.testing.assert_allclose(table[["spectrum_change", "spectrum_change_max"]], 0, atol=1e-9)
    # The stream is turned at random, so its side shows what chance gives; the other side is the same space still.
    for side in ("left", "right"):
        facing = table[table[f"{side}_side"].isin(["read", "write"])]
        assert facing[f"{side}_overlap"].mean() == pytest.approx(4 / 64, abs=0.04)
        np.testing.assert_allclose(facing[f"{side}_haar_overlap"], 4 / 64)
        assert facing[f"{side}_angle"].mean() == pytest.approx(facing[f"{side}_haar_angle"].mean(), abs=4)
        inside = table[table[f"{side}_side"].isin(["neuron", "head"])]
        np.testing.assert_allclose(inside[f"{side}_angle_max"], 0, atol=1e-4)


@pytest.mark.parametrize(("k", "d"), [(1, 10), (3, 40), (10, 128), (8, 8)])
def test_the_haar_baseline_is_what_random_subspaces_do(k: int, d: int) -> None:
    rng = np.random.default_rng(1)
    angles, overlaps = [], []
    for _ in range(200):
        frames = [np.linalg.qr(rng.standard_normal((d, k)))[0] for _ in range(2)]
        cosines = np.linalg.svd(frames[0].T @ frames[1], compute_uv=False).clip(0, 1)
        angles.append(np.degrees(np.arccos(cosines)).mean())
        overlaps.append((cosines**2).mean())
    assert np.mean(overlaps) == pytest.approx(k / d, rel=0.1)
    assert haar_angle(k, d) == pytest.approx(np.mean(angles), abs=0.2 if k == d else 20 / k**2 / d**0.5 + 1)


@SETTINGS
@given(seed=seeds, name=names, size=st.floats(1e-6, 10.0), fold=st.booleans())
def test_a_rank_one_change_of_known_size(make_dt: Make, seed: int, name: str, size: float, fold: bool) -> None:
    a = make_dt(seed, dtype=torch.float64)
    b = copy.deepcopy(a)
    matrix = find_matrix(a, name)
    M = matrix.dense(a, fold)
    left, right = random(seed, M.shape[0]), random(seed + 1, M.shape[1])
    (factor,) = matrix.factors
    change = torch.outer(left, right)
    folded = matrix.fold_change(a, change)[0] if fold else change
    change = change * (size * M.norm() / folded.norm())
    b.weights[factor.weight].add_(factor.scatter(change, b.weights))
    found = dt_lens.compare(a, b, name, fold_layernorm=fold)
    row = found.table.iloc[0]
    assert row["relative_change"] == pytest.approx(size, rel=1e-6)
    for column in ("change_stable_rank", "change_effective_rank", "change_leading_share"):
        # What is left of the rounding of B = A + change.
        assert row[column] == pytest.approx(1.0, abs=1e-12 / size * 1e3 + 1e-9), column
    # Weyl: no sigma moves by more than the change's only one.
    assert row["spectrum_change_max"] * found.spectra[name][0][0] <= size * float(M.norm()) * (1 + 1e-9)
    direction = found.change(name, 1)
    wanted = folded / folded.norm()
    assert abs(float(direction.left[0] @ wanted @ direction.right[0])) == pytest.approx(1.0, abs=1e-6)


@SETTINGS
@given(seed=seeds, angle=st.floats(0.1, 1.5), at=st.integers(0, 8))
def test_near_equal_sigmas_are_one_block_and_turning_them_is_no_change(
    make_dt: Make, seed: int, angle: float, at: int
) -> None:
    """Directions of equal sigma turned into each other: another decomposition of the same matrix."""
    a = make_dt(seed, **BARE)
    weight = a.weights["blocks.0.mlp.W_in"]
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    s = torch.linspace(4, 1, 16, dtype=torch.float64)
    s[at + 1] = s[at]
    b = copy.deepcopy(a)
    for model, gap in ((a, 1e-7), (b, -1e-7)):  # the order of the two is exchanged
        sigma = s.clone()
        sigma[at] += gap
        model.weights["blocks.0.mlp.W_in"].copy_((u * sigma) @ v)
    c, t = np.cos(angle), np.sin(angle)
    pair = torch.tensor([[c, -t], [t, c]], dtype=torch.float64)
    u2, v2 = u.clone(), v.clone()
    u2[:, at : at + 2], v2[at : at + 2] = u[:, at : at + 2] @ pair, pair.T @ v[at : at + 2]
    sigma = s.clone()
    sigma[at] -= 1e-7
    b.weights["blocks.0.mlp.W_in"].copy_((u2 * sigma) @ v2)
    found = dt_lens.compare(a, b, "blocks.0.mlp.W_in", k=at + 1)
    row = found.table.iloc[0]
    assert row["k"] in (at, at + 2)  # the block is not cut
    assert row["relative_change"] < 1e-5
    assert max(row["left_angle_max"], row["right_angle_max"]) < 0.01
    directions = found.directions("blocks.0.mlp.W_in")
    assert directions["matched"].all() and len(directions) == 15
    block = directions[directions["block_a"] == 2].iloc[0]
    assert (block["sv_a"], block["sv_b"], block["block_b"], block["sign"]) == (at, at, 2, 1)
    assert directions["overlap"].min() > 0.999
    assert directions[["read_angle", "neuron_angle"]].max(axis=None) < 0.5


@SETTINGS
@given(seed=seeds, at=st.integers(0, 5))
def test_a_block_that_came_apart_is_matched_with_all_its_parts(make_dt: Make, seed: int, at: int) -> None:
    a = make_dt(seed, **BARE)
    u, v = rotation(seed, 16), rotation(seed + 1, 24)[:16]
    s = torch.linspace(4, 1, 16, dtype=torch.float64)
    found: list[Decomposition] = []
    for gap in (0.0, 0.05):
        sigma = s.clone()
        sigma[at + 1] = sigma[at] - gap
        a.weights["blocks.0.mlp.W_in"].copy_((u * sigma) @ v)
        found.append(decompose_matrix(MatrixFactors.of(a, find_matrix(a, "blocks.0.mlp.W_in"))))
    pairs = match_directions(*found)
    assert len(pairs) == 15 and all(pair.overlap > 0.999 for pair in pairs)
    assert pairs[at].a == pairs[at].b == (at, at + 1)
    back = match_directions(found[1], found[0])
    assert {(p.b, p.a) for p in pairs} == {(p.a, p.b) for p in back}


@SETTINGS
@given(seed=seeds)
def test_exchanging_the_models_exchanges_the_sides(make_dt: Make, seed: int) -> None:
    a, b = make_dt(seed), make_dt(seed + 1)
    there, back = (dt_lens.compare(one, two, "blocks.0.*", k=3) for one, two in ((a, b), (b, a)))
    for column in ("change_stable_rank", "change_effective_rank", "left_angle", "right_angle", "left_overlap"):
        np.testing.assert_allclose(there.table[column], back.table[column], rtol=1e-6, atol=1e-6)
    for name, (one, two, change) in there.spectra.items():
        np.testing.assert_allclose(back.spectra[name][0], two)
        np.testing.assert_allclose(back.spectra[name][1], one)
        np.testing.assert_allclose(back.spectra[name][2], change, atol=1e-9)
    moved = [c.labels("blocks.0.mlp.W_in", "state_in", n=None).set_index("label")["change"] for c in (there, back)]
    np.testing.assert_allclose(moved[0], -moved[1][moved[0].index], atol=1e-9)
