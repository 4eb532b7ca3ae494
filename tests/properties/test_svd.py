"""Laws of decompositions and scans, over random matrices and models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from dt_lens import SingularEdit, WeightSVD
from dt_lens.lens.matrices import catalogue
from dt_lens.svd import solvers as decompose

Make = Callable[..., Any]
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
BARE = {"normalization": "none", "embed_ln": False, "final_ln": False}

numbers = st.one_of(
    st.floats(-1e3, 1e3, allow_subnormal=False), st.sampled_from([0.0, 1.0, -1.0, 2.0]), st.integers(-3, 3).map(float)
)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def matrices(shape: Any = shapes) -> st.SearchStrategy[Tensor]:
    return shape.flatmap(lambda s: hnp.arrays(np.float64, s, elements=numbers)).map(torch.from_numpy)


def assert_is_decomposition(found: decompose.SVD, M: Tensor, size: float) -> None:
    """Rebuilds, orthonormal, in order; ``size`` is what rounding errors are relative to."""
    rebuilt = (found.left.T * found.sigma) @ found.right
    assert float((rebuilt - M).abs().max()) <= 1e-9 * size
    for side in (found.left, found.right):
        torch.testing.assert_close(side @ side.T, torch.eye(len(side), dtype=M.dtype), rtol=0, atol=1e-9)
    assert bool((found.sigma > 0).all())
    assert bool((found.sigma.diff() <= 0).all())
    # As many as there are, no more: the rest of the energy is nil.
    assert float(found.sigma.square().sum()) == pytest.approx(float(M.square().sum()), rel=1e-9, abs=1e-18 * size**2)


@SETTINGS
@given(M=matrices(), gram=st.booleans())
def test_a_decomposition_rebuilds_its_matrix(M: Tensor, gram: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decompose, "GRAM", 0 if gram else 256)
        found = decompose.decompose([M])
        assert_is_decomposition(found, M, float(M.norm()))
        torch.testing.assert_close(decompose.decompose([M.T]).sigma, found.sigma, rtol=1e-9, atol=1e-12)


@SETTINGS
@given(data=st.data(), inner=st.integers(1, 9))
def test_a_decomposition_rebuilds_its_product(data: st.DataObject, inner: int) -> None:
    A = data.draw(matrices(st.tuples(st.integers(1, 9), st.just(inner))))
    B = data.draw(matrices(st.tuples(st.just(inner), st.integers(1, 9))))
    assert_is_decomposition(decompose.decompose([A, B]), A @ B, float(A.norm() * B.norm()))


@SETTINGS
@given(M=matrices(), rank=st.integers(1, 10))
def test_nothing_of_the_same_rank_is_closer(M: Tensor, rank: int) -> None:
    """Eckart and Young: what the first ``rank`` directions leave has the other sigmas for its size."""
    whole, cut = decompose.decompose([M]), decompose.decompose([M], rank)
    assert len(cut.sigma) == min(rank, len(whole.sigma))
    left_out = float((M - (cut.left.T * cut.sigma) @ cut.right).norm())
    assert left_out == pytest.approx(float(whole.sigma[rank:].norm()), abs=1e-9 * float(M.norm()))


def rotated(model: Any, make: Make, seed: int) -> Any:
    """The same model in another basis of the residual stream: every weight that reads or writes it is turned."""
    d = model.cfg.d_model
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    turned = make(dtype=torch.float64, **{**BARE, "d_model": d})
    for name, weight in model.weights.items():
        kind = name.split(".")[-1]
        if name.startswith("embed."):  # [n, d_model], [d_model]
            new = weight @ Q
        elif name.startswith("predict."):  # [d_model, n]
            new = Q.T @ weight if kind == "W" else weight
        elif kind in ("W_Q", "W_K", "W_V", "W_in"):
            new = Q.T @ weight
        elif kind in ("W_O", "W_out", "b_O", "b_out"):
            new = weight @ Q
        else:
            new = weight
        turned.weights[name].copy_(new)
    return turned


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_scan_of_a_rotated_model_is_the_same_scan(make_dt: Make, seed: int) -> None:
    model = make_dt(seed=seed, dtype=torch.float64, **BARE)
    turned = rotated(model, make_dt, seed)
    batch = model.probe()
    torch.testing.assert_close(turned(**batch).action_preds, model(**batch).action_preds)
    scans = [WeightSVD(m).scan(embeddings="*", seed=5) for m in (model, turned)]
    same = ["matrix", "side", "sv", "block", "embedding", "label"]
    assert scans[0][same].equals(scans[1][same])
    assert scans[0]["p_value"].min() < 0.01
    for column in ("cosine", "sigma", "z", "p_value", "q_value"):
        a, b = (scan[column].abs().to_numpy(dtype=float) for scan in scans)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=column)
    strongest = [WeightSVD(m).strongest(samples=60) for m in (model, turned)]
    for column in ("cosine", "null_median", "p_value"):
        a, b = (table[column].abs().to_numpy(dtype=float) for table in strongest)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=column)


def test_an_edit_of_a_rotated_model_is_the_same_edit(make_dt: Make) -> None:
    """Flips, scales and removals know no basis; a constant vector does."""
    model = make_dt(dtype=torch.float64, **BARE)
    turned = rotated(model, make_dt, 7)
    batch = model.probe()
    for name, side in (("blocks.0.mlp.W_in", "read"), ("blocks.1.attn.OV.0", "write"), ("blocks.0.attn.QK.1", "key")):
        for value in ("flip", "zero", 2.5, "constant"):
            edited = []
            for m in (model, turned):
                with SingularEdit(m, name, [0, 2], side=side, value=value):  # type: ignore[arg-type]
                    edited.append(m(**batch).action_preds)
            assert torch.allclose(*edited, atol=1e-9) == (value != "constant")


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    heads=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([4, 8, 12]),
    mlp=st.sampled_from([3, 8, 20]),
    normalization=st.sampled_from(["pre", "post", "none"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_every_matrix_of_any_model_is_rebuilt(
    make_dt: Make, seed: int, heads: int, width: int, mlp: int, normalization: str, dtype: torch.dtype
) -> None:
    model = make_dt(seed, dtype=dtype, d_model=width, n_heads=heads, d_mlp=mlp, normalization=normalization)
    for fold in (True, False):
        svd = WeightSVD(model, fold_layernorm=fold)
        for name, matrix in catalogue(model, per_head=True).items():
            d, M = svd[name], matrix.dense(model, fold)
            torch.testing.assert_close((d.left.T * d.sigma) @ d.right, M, rtol=0, atol=1e-9 * float(M.norm() + 1e-9))
            assert d.blocks[0][0] == 0
            assert d.blocks[-1][1] == len(d.sigma)
            assert all(a[1] == b[0] for a, b in zip(d.blocks, d.blocks[1:], strict=False))
