"""The catalogue's names, sides and factors, and the folding of a LayerNorm, against the definitions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dt_lens import DtLensError
from dt_lens.lens.matrices import Snapshot, Structure, catalogue, find_matrix, fold, select_matrices, unfold
from dt_lens.lens.weights import checksum, fingerprint

Make = Callable[..., Any]


def test_names_sides_and_order(make_dt: Make) -> None:
    found = catalogue(make_dt())
    first = [name for name, matrix in found.items() if matrix.layer == 0]
    assert first == [
        "blocks.0.attn.W_Q", "blocks.0.attn.W_K", "blocks.0.attn.W_V", "blocks.0.attn.W_O",
        "blocks.0.attn.OV.0", "blocks.0.attn.QK.0", "blocks.0.attn.OV.1", "blocks.0.attn.QK.1",
        "blocks.0.mlp.W_in", "blocks.0.mlp.W_out",
    ]  # fmt: skip
    assert len(found) == 2 * len(first)
    sides = {matrix.kind: (matrix.left, matrix.right) for matrix in found.values()}
    assert sides == {
        "W_Q": ("read", "head"),
        "W_K": ("read", "head"),
        "W_V": ("read", "head"),
        "W_O": ("head", "write"),
        "OV": ("read", "write"),
        "QK": ("query", "key"),
        "W_in": ("read", "neuron"),
        "W_out": ("neuron", "write"),
    }
    assert {m.kind for m in found.values() if m.foldable} == {"W_Q", "W_K", "W_V", "OV", "QK", "W_in"}
    assert found["blocks.1.attn.QK.0"].residual_sides == ("query", "key")


def test_a_matrix_is_what_its_definition_says(make_dt: Make) -> None:
    model = make_dt()
    w = {name: weight.double() for name, weight in model.weights.items()}
    attn, d, e = "blocks.1.attn", 16, 8

    def dense(name: str) -> torch.Tensor:
        return find_matrix(model, name).dense(model, fold_layernorm=False)

    for letter in "QKV":
        W = w[f"{attn}.W_{letter}"]
        assert torch.equal(dense(f"{attn}.W_{letter}")[:, e:], W[1])
        assert torch.equal(dense(f"{attn}.W_{letter}.1"), W[1])
    assert torch.equal(dense(f"{attn}.W_O")[e:], w[f"{attn}.W_O"][1])
    x, y = torch.randn(d).double(), torch.randn(d).double()
    torch.testing.assert_close(x @ dense(f"{attn}.OV.1"), x @ w[f"{attn}.W_V"][1] @ w[f"{attn}.W_O"][1])
    scores = (x @ w[f"{attn}.W_Q"][1]) @ (y @ w[f"{attn}.W_K"][1])
    torch.testing.assert_close(x @ dense(f"{attn}.QK.1") @ y, scores)
    assert torch.equal(dense("blocks.1.mlp.W_in"), w["blocks.1.mlp.W_in"])


def test_folding_is_the_layernorm_up_to_its_length_and_bias(make_dt: Make) -> None:
    model = make_dt(seed=3)
    for name, norm in (("blocks.0.attn.W_Q", "ln1"), ("blocks.1.mlp.W_in", "ln2"), ("blocks.1.attn.OV.0", "ln1")):
        matrix = find_matrix(model, name)
        w, b = (model.weights[f"blocks.{matrix.layer}.{norm}.{part}"].double() for part in "wb")
        x = torch.randn(7, 16, dtype=torch.float64) * 3 + 1
        raw, folded = matrix.dense(model, fold_layernorm=False), matrix.dense(model)
        seen = F.layer_norm(x, (16,), w, b, eps=0.0) @ raw - b @ raw
        length = x.var(-1, correction=0, keepdim=True).sqrt()
        torch.testing.assert_close(x / length @ folded, seen, rtol=1e-12, atol=1e-12)
        # The mean is one over the stream: of outputs it would be another matrix.
        assert folded.mean(0).abs().max() < 1e-15
        assert folded.mean(1).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_folding_leaves_the_weights_alone(make_dt: Make, dtype: torch.dtype) -> None:
    """What is folded in its own memory is a copy: ``double()`` of a float64 weight is the weight itself."""
    model = make_dt(dtype=dtype)
    before = {name: weight.clone() for name, weight in model.weights.items()}
    for matrix in catalogue(model).values():
        folded, raw = matrix.folded(model), matrix.raw(model)
        for one, other in zip(folded, matrix.fold_change(model, *raw), strict=True):
            assert torch.equal(one, other)
    assert all(torch.equal(weight, before[name]) for name, weight in model.weights.items())


def test_both_sides_of_qk_are_folded(make_dt: Make) -> None:
    model = make_dt(seed=3)
    w, b = (model.weights[f"blocks.0.ln1.{part}"].double() for part in "wb")
    matrix = find_matrix(model, "blocks.0.attn.QK.1")
    x, y = torch.randn(2, 16, dtype=torch.float64)
    raw = matrix.dense(model, fold_layernorm=False)
    left, right = (F.layer_norm(v, (16,), w, torch.zeros_like(b), eps=0.0) * v.std(correction=0) for v in (x, y))
    torch.testing.assert_close(x @ matrix.dense(model) @ y, left @ raw @ right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalization", ["post", "none"])
def test_without_a_layernorm_in_front_nothing_is_folded(make_dt: Make, normalization: str) -> None:
    model = make_dt(normalization=normalization)
    for matrix in catalogue(model).values():
        assert not matrix.foldable
        assert torch.equal(matrix.dense(model), matrix.dense(model, fold_layernorm=False))


def test_unfolding_inverts_folding() -> None:
    w = torch.rand(9) + 0.5
    change = torch.randn(9, 4, dtype=torch.float64)
    change -= change.mean(0)
    torch.testing.assert_close(fold(unfold(change, w, "blocks.0.ln1"), w), change)
    w[3] = 0.0
    with pytest.raises(DtLensError, match=r"blocks.0.ln1 has scale 0 at coordinate 3.*fold_layernorm=False"):
        unfold(change, w, "blocks.0.ln1")


def test_a_change_of_a_factor_is_scattered_to_where_it_came_from(make_dt: Make) -> None:
    model = make_dt()
    weights = {name: weight.double() for name, weight in model.weights.items()}
    for matrix in catalogue(model, per_head=True).values():
        for factor in matrix.factors:
            change = torch.randn_like(factor.view(weights))
            whole = factor.scatter(change, weights)
            changed = {**weights, factor.weight: weights[factor.weight] + whole}
            torch.testing.assert_close(factor.view(changed) - factor.view(weights), change)
            assert float(whole.norm()) == pytest.approx(float(change.norm()))


def test_sides_have_names(make_dt: Make) -> None:
    model = make_dt()
    assert find_matrix(model, "blocks.0.mlp.W_out").side(None) == "right"
    assert find_matrix(model, "blocks.0.mlp.W_in").side("neuron") == "right"
    with pytest.raises(DtLensError, match=r"OV.0 has two sides.*'read' or side='write'"):
        find_matrix(model, "blocks.0.attn.OV.0").side(None)
    with pytest.raises(DtLensError, match=r"QK.0 has no side 'read'; it has 'query' and 'key'"):
        find_matrix(model, "blocks.0.attn.QK.0").side("read")


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("blocks.0.mlp.Win", None, "Did you mean 'blocks.0.mlp.W_in'"),
        ("blocks.2.mlp.W_in", None, "Did you mean 'blocks"),
        ("nonsense", None, "It has blocks.0.attn.W_Q"),
        ("blocks.0.attn.OV", 2, "has no head 2; the model's heads are 0 to 1"),
        ("blocks.0.attn.W_Q", -1, "has no head -1"),
        ("blocks.0.mlp.W_in", 0, "blocks.0.mlp.W_in has no heads"),
    ],
)
def test_unknown_matrices(make_dt: Make, name: str, head: int | None, message: str) -> None:
    with pytest.raises(DtLensError, match=message):
        find_matrix(make_dt(), name, head)


def test_patterns(make_dt: Make) -> None:
    model = make_dt()

    def chosen(patterns: Any) -> list[str]:
        return [matrix.name for matrix in select_matrices(model, patterns)]

    assert len(chosen(None)) == len(chosen("*")) == 20
    assert chosen("*.W_in") == ["blocks.0.mlp.W_in", "blocks.1.mlp.W_in"]
    assert chosen(["*.W_in", "blocks.0.*.OV.1"]) == ["blocks.0.attn.OV.1", "blocks.0.mlp.W_in", "blocks.1.mlp.W_in"]
    assert chosen("*.W_Q.*") == [f"blocks.{layer}.attn.W_Q.{head}" for layer in (0, 1) for head in (0, 1)]
    assert find_matrix(model, "blocks.0.attn.W_Q", head=1).name == "blocks.0.attn.W_Q.1"
    with pytest.raises(DtLensError, match=r"No matrix of the model matches 'W_on'"):
        chosen(["*.W_in", "W_on"])
    with pytest.raises(
        DtLensError, match=r"'nope'; give names, such as blocks.0.attn.W_Q, or patterns, such as '"
    ) as said:
        chosen("nope")
    patterns = re.findall(r"'(\*[^']*)'", str(said.value))
    assert len(patterns) == 8 and len(chosen(patterns)) == 20


@pytest.mark.parametrize("hashed", [fingerprint, checksum])
def test_a_fingerprint_depends_on_every_bit(make_dt: Make, hashed: Any) -> None:
    model = make_dt()
    matrix = find_matrix(model, "blocks.0.attn.OV.1")
    before = hashed(model, matrix)
    assert hashed(Snapshot.of(model), matrix) == before
    for name in ("blocks.0.attn.W_V", "blocks.0.attn.W_O", "blocks.0.ln1.w"):
        weight = model.weights[name].view(-1)
        kept = weight.clone()
        weight[-2:] = kept[-2:].flip(0)  # the same numbers in another order
        assert hashed(model, matrix) != before
        weight.copy_(kept)
    model.weights["blocks.0.attn.W_V"][0].zero_()  # the other head's
    assert hashed(model, matrix) == before
    model.weights["blocks.0.attn.W_Q"].zero_()
    assert hashed(model, matrix) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_checksum_of_a_large_weight_depends_on_every_bit_and_on_order(dtype: torch.dtype, shift: int) -> None:
    """Larger than the table whose rows and columns are summed, and with a rest beyond it; at any place in memory."""
    structure = Structure(1, 1, 320, (1.0,), (None,), (None,))
    memory = torch.randn(320 * 421 + shift, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = memory[shift:].view(320, 421)
    matrix = find_matrix(Snapshot({"blocks.0.mlp.W_in": weight}, structure), "blocks.0.mlp.W_in")

    def found(weight: torch.Tensor) -> Any:
        return checksum(Snapshot({"blocks.0.mlp.W_in": weight}, structure), matrix)

    before = found(weight)
    assert found(weight.clone()) == before and found(weight.T.contiguous().T) != before
    for i, j in ((0, 0), (100, 3), (319, 420)):
        changed = weight.clone()
        changed.view(torch.int16 if dtype == torch.float16 else torch.int32)[i, j] ^= 1
        assert found(changed) != before
    for one, two in (((0, 0), (0, 1)), ((0, 0), (200, 300)), ((318, 0), (319, 420))):
        changed = weight.clone()
        changed[one], changed[two] = weight[two], weight[one]
        assert found(changed) != before
    assert found(weight.flip(0).contiguous()) != before and found(weight.flip(1).contiguous()) != before
