"""Singular directions of named matrices: orientation proven through the model, and what rounding can tell apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dt_lens import DtLensError
from dt_lens.lens.matrices import MatrixFactors, Snapshot, Structure, catalogue, find_matrix
from dt_lens.svd.decomposition import (
    DEVIATIONS,
    MAX_ANGLE,
    Decomposition,
    blocks_of,
    decompose_matrix,
    rounding_noise,
)

Make = Callable[..., Any]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def directions(model: Any, name: str, rank: int | None = None, fold_layernorm: bool = True) -> Any:
    return decompose_matrix(MatrixFactors.of(model, find_matrix(model, name), fold_layernorm), rank)


def orthogonal(n: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize("fold_layernorm", [True, False])
def test_every_matrix_is_rebuilt(make_dt: Make, fold_layernorm: bool) -> None:
    model = make_dt()
    for matrix in catalogue(model, per_head=True).values():
        d = directions(model, matrix.name, fold_layernorm=fold_layernorm)
        M = matrix.dense(model, fold_layernorm)
        torch.testing.assert_close((d.left.T * d.sigma) @ d.right, M, rtol=0, atol=1e-12 * float(M.norm()))
        assert d.folded == (fold_layernorm and matrix.foldable)
        assert torch.equal(d.side(matrix.left), d.left)
        assert torch.equal(d.side(matrix.right), d.right)
        assert {n for n in ("read", "write", "neuron", "head", "query", "key") if getattr(d, n) is not None} == {
            matrix.left,
            matrix.right,
        }
    # Centring takes one dimension, a circuit has as many directions as its head.
    assert len(directions(model, "blocks.0.mlp.W_in", fold_layernorm=fold_layernorm).sigma) == 16 - fold_layernorm
    assert len(directions(model, "blocks.0.attn.OV.1").sigma) == 8


def test_folded_directions_have_no_mean(make_dt: Make) -> None:
    model = make_dt()
    for matrix in catalogue(model).values():
        d = directions(model, matrix.name)
        for side in matrix.residual_sides:
            reads = matrix.norm(matrix.side(side)) is not None
            assert (float(d.side(side).mean(1).abs().max()) < 1e-14) == reads
        assert float(directions(model, matrix.name, fold_layernorm=False).left.mean(1).abs().max()) > 1e-2


def test_signs_are_canonical(make_dt: Make) -> None:
    model = make_dt()
    for name in ("blocks.0.mlp.W_in", "blocks.0.mlp.W_out", "blocks.0.attn.OV.0"):
        d = directions(model, name)
        side = d.right if name.endswith("W_out") else d.left
        assert bool((side.gather(1, side.abs().argmax(1, keepdim=True)) > 0).all())
        # Minus the weights are the same directions, with the other side turned round.
        model.weights[name if "OV" not in name else "blocks.0.attn.W_V"].neg_()
        again = directions(model, name)
        turned, kept = (again.left, again.right) if name.endswith("W_out") else (again.right, again.left)
        torch.testing.assert_close(kept, side)
        torch.testing.assert_close(turned, -(d.left if name.endswith("W_out") else d.right))


def run_patched(model: Any, hook: str, value: Tensor, names: list[str]) -> dict[str, Tensor]:
    """A forward pass with the activation at ``hook`` replaced, and what ``names`` show."""
    shown: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        shown[hook.name] = x.detach().clone()

    with torch.no_grad(), model.hooks(fwd_hooks=[(hook, lambda x, hook: value), *((name, keep) for name in names)]):
        probe = {name: x[:2] for name, x in model.probe().items() if name != "attention_mask"}
        shown["actions"] = model(**probe).action_preds
    return shown


@pytest.mark.parametrize("sv", [0, 4])
def test_a_read_direction_moves_the_neurons_by_sigma_along_the_neuron_direction(make_dt: Make, sv: int) -> None:
    model = make_dt(seed=2, dtype=torch.float64)
    d = directions(model, "blocks.1.mlp.W_in")
    hooks = ("blocks.1.hook_resid_mid", "blocks.1.mlp.hook_pre")
    read, step = d.read[sv], 1e-6
    # A stream without a part along the direction: folding does not describe how a LayerNorm scales the token itself.
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    x = x - (x @ read)[..., None] * read
    length = x.std(-1, correction=0, keepdim=True)
    before, after = (
        run_patched(model, hooks[0], stream, [hooks[1]])[hooks[1]] for stream in (x - step * read, x + step * read)
    )
    moved = (after - before) / (2 * step) * length
    torch.testing.assert_close(moved, (d.sigma[sv] * d.neuron[sv]).expand_as(moved), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sv", [0, 3])
def test_neurons_write_along_the_write_direction_by_sigma(make_dt: Make, sv: int) -> None:
    model = make_dt(seed=2, dtype=torch.float64)
    d = directions(model, "blocks.1.mlp.W_out")
    post, out = "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    before = run_patched(model, post, x, [out])
    after = run_patched(model, post, x + d.neuron[sv], [out])
    moved = after[out] - before[out]
    torch.testing.assert_close(moved, (d.sigma[sv] * d.write[sv]).expand_as(moved))
    assert (after["actions"] - before["actions"]).abs().max() > 1e-4


@pytest.mark.parametrize("head", [0, 1])
def test_ov_moves_what_a_token_reads_to_where_its_head_writes(make_dt: Make, head: int) -> None:
    model = make_dt(seed=2, dtype=torch.float64)
    d = directions(model, f"blocks.0.attn.OV.{head}")
    e = 8
    # One head alone, attending to the first token alone: its write is OV's image of that token.
    other = model.weights["blocks.0.attn.W_O"][1 - head]
    other.zero_()
    for part in ("W_Q", "W_K", "b_Q", "b_K"):
        model.weights[f"blocks.0.attn.{part}"].zero_()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    x = x - (x @ d.read[0])[..., None] * d.read[0]
    length = x[:, :1].std(-1, correction=0, keepdim=True)
    bumped = x.clone()
    bumped[:, 0] += 1e-6 * d.read[0]
    names = ["blocks.0.hook_attn_out", "blocks.0.attn.hook_v"]
    before, after = (run_patched(model, "blocks.0.hook_resid_pre", s, names) for s in (x, bumped))
    moved = ((after[names[0]] - before[names[0]])[:, :1] / 1e-6) * length
    torch.testing.assert_close(moved, (d.sigma[0] * d.write[0]).expand_as(moved), rtol=1e-3, atol=1e-5)
    # And its inner vectors are the head's own.
    w_v = directions(model, "blocks.0.attn.W_V")
    assert w_v.head.shape[1] == 2 * e


@pytest.mark.parametrize("head", [0, 1])
def test_qk_scores_a_query_direction_against_a_key_direction(make_dt: Make, head: int) -> None:
    model = make_dt(seed=2, dtype=torch.float64, normalization="none")
    for part in ("b_Q", "b_K"):
        model.weights[f"blocks.0.attn.{part}"].zero_()
    d = directions(model, f"blocks.0.attn.QK.{head}")
    scale = model.structure.attn_scale[0]
    x = torch.zeros(2, 12, 16, dtype=torch.float64)
    x[:, 7], x[:, 3], x[:, 5] = d.query[1], d.key[1], d.query[1]
    scores = run_patched(model, "blocks.0.hook_resid_pre", x, ["blocks.0.attn.hook_attn_scores"])
    found = scores["blocks.0.attn.hook_attn_scores"][0, head]
    assert float(found[7, 3]) == pytest.approx(float(d.sigma[1]) * scale)
    # The other way round, a key vector asking, it is another number.
    assert abs(float(found[7, 5]) - float(d.sigma[1]) * scale) > 1e-3


def one_matrix(W: Tensor) -> MatrixFactors:
    structure = Structure(1, 1, W.shape[0], (1.0,), (None,), (None,))
    model = Snapshot({"blocks.0.mlp.W_in": W}, structure)
    return MatrixFactors.of(model, find_matrix(model, "blocks.0.mlp.W_in"))


def angles(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1).abs().clamp(max=1).acos()


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_what_rounding_mixes(dtype: torch.dtype) -> None:
    """Two sigmas close, the others far: rounding turns the pair within a block, and leaves it alone outside."""
    m, n, k = 24, 60, 8
    sigma = torch.tensor([10.0, 8.0, 6.5, 5.0, 3.5, 2.5, 1.5, 1.0], dtype=torch.float64)
    within, outside = [], []
    for seed in range(30):
        u, v = orthogonal(m, k, 2 * seed), orthogonal(n, k, 2 * seed + 1)
        exact = (u * sigma) @ v.T
        noise = float(rounding_noise(one_matrix(exact.to(dtype)), u.T, v.T)[2:4].max())
        limit = DEVIATIONS * noise / MAX_ANGLE
        for gap, turned, together in ((limit / 50, within, True), (limit * 1.5, outside, False)):
            close = sigma.clone()
            close[3] = close[2] - gap
            exact = (u * close) @ v.T
            d = decompose_matrix(one_matrix(exact.to(dtype)), k)
            starts = [0, 1, 2, *([] if together else [3]), 4, 5, 6, 7]
            assert d.blocks == tuple(zip(starts, [*starts[1:], k], strict=True))
            turned.append(float(angles(d.left[2:4], u.T[2:4]).max()))
            # Whatever happens within, the span stays.
            spans = torch.linalg.svdvals(d.left[2:4] @ u[:, 2:4])
            assert float(spans.min().clamp(max=1).acos()) < MAX_ANGLE
            alone = torch.tensor([0, 1, 4, 5, 6, 7])
            assert float(angles(d.left[alone], u.T[alone]).max()) < MAX_ANGLE
    assert float(np.mean(np.array(within) > MAX_ANGLE)) > 0.8
    assert float(np.mean(np.array(outside) < MAX_ANGLE)) == 1.0


@pytest.mark.parametrize(
    "name", ["blocks.0.mlp.W_in", "blocks.0.mlp.W_out", "blocks.0.attn.OV.1", "blocks.0.attn.QK.0"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_noise_is_predicted(make_dt: Make, name: str, dtype: torch.dtype) -> None:
    """Against roundings that really happen, through the LayerNorm and the other factor of a circuit."""
    predicted, seen = [], []
    for seed in range(30):
        model = make_dt(seed=seed, dtype=torch.float64)
        for weight_name, weight in model.weights.items():  # rows of different size, as trained weights have
            if weight_name.endswith((".ln1.w", ".ln2.w")):
                weight.mul_(4)
            if weight.ndim >= 2:
                weight.mul_(torch.logspace(0, 1, weight.shape[-2], dtype=torch.float64)[:, None])
        matrix = find_matrix(model, name)
        rounded = Snapshot({n: w.to(dtype) for n, w in model.weights.items()}, model.structure)
        norms = {n: w for n, w in model.weights.items() if ".ln" in n}  # only the matrices are rounded
        rounded.weights.update(norms)  # type: ignore[attr-defined]
        d = directions(model, name, rank=6)
        error = matrix.dense(rounded) - matrix.dense(model)
        seen.append(torch.einsum("ka,ab,kb->k", d.left, error, d.right))
        predicted.append(rounding_noise(MatrixFactors.of(rounded, matrix), d.left, d.right))
    ratio = torch.stack(seen).square().mean().sqrt() / torch.stack(predicted).square().mean().sqrt()
    assert 0.75 < float(ratio) < 1.33


def test_the_noisier_of_two_directions_decides_whether_they_are_one_block() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    mixing = MAX_ANGLE / DEVIATIONS  # noise that just joins sigmas that are 1 apart
    for noise, blocks in (
        ([1.1, 0, 0], ((0, 2), (2, 3))),
        ([0, 1.1, 0], ((0, 3),)),
        ([0, 0, 1.1], ((0, 1), (1, 3))),
        ([0.9, 0.9, 0.9], ((0, 1), (1, 2), (2, 3))),
    ):
        assert blocks_of(sigma, mixing * torch.tensor(noise, dtype=torch.float64)) == blocks


def test_sigmas_that_are_equal_are_one_block_in_any_dtype() -> None:
    for dtype in (*DTYPES, torch.float64):
        d = decompose_matrix(one_matrix(torch.diag(torch.tensor([4, 2, 2, 2, 1, 1]).to(dtype))))
        assert d.blocks == ((0, 1), (1, 4), (4, 6))
        assert d.block_of(2) == (1, 4)
    with pytest.raises(DtLensError, match=r"sv=6 is out of range.*has 6 directions"):
        d.block_of(6)


def test_a_random_model_in_single_precision_has_no_blocks(make_dt: Make) -> None:
    model = make_dt()
    for matrix in catalogue(model).values():
        d = directions(model, matrix.name)
        assert all(stop - start == 1 for start, stop in d.blocks)


def thin_circuit(W_V: Tensor, W_O: Tensor) -> MatrixFactors:
    structure = Structure(1, 1, W_V.shape[0], (1.0,), (None,), (None,))
    weights = {"blocks.0.attn.W_V": W_V[None], "blocks.0.attn.W_O": W_O[None]}
    model = Snapshot(weights, structure)
    return MatrixFactors.of(model, find_matrix(model, "blocks.0.attn.OV.0"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", ["wide", "tall", "circuit"])
def test_directions_that_turn_out_of_the_matrix_are_marked(shape: str, dtype: torch.dtype) -> None:
    """No sigma is near, and yet rounding turns weak directions into those that the matrix does not have."""
    k, long = 12, 400
    sigma = torch.logspace(0, -4 if dtype == torch.float16 else -3, k, dtype=torch.float64)
    silent = 0
    for seed in range(6):
        rows, columns = {"wide": (k, long), "tall": (long, k), "circuit": (long, long)}[shape]
        u, v, q = orthogonal(rows, k, 3 * seed), orthogonal(columns, k, 3 * seed + 1), orthogonal(k, k, 3 * seed + 2)
        if shape == "circuit":
            # W_V has the sigmas and W_O has none, so that only what W_V reads is lost.
            factors = thin_circuit(((u * sigma) @ q).to(dtype), (q.T @ v.T).to(dtype))
        else:
            factors = one_matrix(((u * sigma) @ v.T).to(dtype))
        d = decompose_matrix(factors)
        assert d.outside is not None and len(d.sigma) == k
        alone = torch.tensor([stop - start == 1 for start, stop in d.blocks for _ in range(start, stop)])
        for side, found, exact in ((0, d.left, u.T), (1, d.right, v.T)):
            turned, marked = angles(found, exact), d.outside[:, side] > 0
            assert float(turned[alone & ~marked].max()) < MAX_ANGLE
            silent += int((alone & marked & (turned > MAX_ANGLE)).sum())  # what gaps alone let pass
            if exact.shape[1] == k or (shape, side) == ("circuit", 1):
                assert not marked.any()
            else:
                assert set(d.outside[marked, side].tolist()) == {long - k}
                assert bool(marked[-1]) and not marked[:4].any()
                assert float(turned[marked].min()) > MAX_ANGLE / 10  # three deviations, and a margin
        if shape == "tall":
            assert d.indistinct(k - 1, "read") == len(range(*d.block_of(k - 1))) + long - k
            assert d.indistinct(k - 1, "neuron") == len(range(*d.block_of(k - 1)))
        few = decompose_matrix(factors, 9)
        assert few.outside is not None and torch.equal(few.outside, d.outside[:9])
        assert torch.equal(Decomposition.from_tensors(d.matrix, d.tensors()).outside, d.outside)
    assert silent > 5


def test_nothing_is_marked_behind_a_layernorm_that_only_centres(make_dt: Make) -> None:
    """The constant direction, which centring removes, is none that a direction could turn into."""
    d = directions(make_dt(dtype=torch.bfloat16), "blocks.0.mlp.W_in")
    assert d.outside is not None and not d.outside[:, 0].any()


def test_zero_and_nan(make_dt: Make) -> None:
    model = make_dt()
    model.weights["blocks.0.mlp.W_in"].zero_()
    d = directions(model, "blocks.0.mlp.W_in")
    assert (len(d.sigma), d.blocks, d.read.shape) == (0, (), (0, 16))
    model.weights["blocks.0.mlp.W_in"].fill_(0.3)  # all rows the same: behind a LayerNorm of equal scales that is zero
    model.weights["blocks.0.ln2.w"].fill_(1.1)
    assert not len(directions(model, "blocks.0.mlp.W_in").sigma)
    assert len(directions(model, "blocks.0.mlp.W_in", fold_layernorm=False).sigma) == 1
    model.weights["blocks.1.attn.W_V"][0, 3, 3] = float("nan")
    with pytest.raises(DtLensError, match=r"blocks.1.attn.OV.0: A matrix holds NaN"):
        directions(model, "blocks.1.attn.OV.0")
    assert len(directions(model, "blocks.1.attn.OV.1").sigma) == 8


def test_what_one_layer_writes_another_may_read(make_dt: Make) -> None:
    model = make_dt()
    d = directions(model, "blocks.0.mlp.W_out")
    model.embeddings["written"] = d.as_embedding(k=3)
    assert model.embeddings["written"].labels == [f"blocks.0.mlp.W_out[{i}]" for i in range(3)]
    with pytest.raises(DtLensError, match=r"neuron side of blocks.0.mlp.W_out is not in the residual stream"):
        d.as_embedding("neuron")
    assert "16 directions, neuron [24] -> write [16], raw" in repr(d)
