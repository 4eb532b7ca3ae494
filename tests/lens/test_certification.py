"""certify refuses every way in which an adapter can be wrong, and names the part that is."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

import dt_lens
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.errors import DtLensError
from dt_lens.lens import certification, matrices
from dt_lens.lens.matrices import catalogue
from dt_lens_adapters import hf_decision_transformer

Weights = dict[str, Tensor]
Mutation = Callable[[Weights], None]
PARTS = ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out")
NAMES = [f"blocks.{layer}.{part}" for layer in range(2) for part in PARTS]
FORWARD = {name: i for i, name in enumerate(NAMES)}
# d_model = d_mlp = n_heads * d_head, so that every wrong reading has the right shape.
SQUARE = {"hidden_size": 12, "n_inner": 12, "n_layer": 2, "n_head": 3, "state_dim": 12, "act_dim": 12}


@pytest.fixture(scope="module")
def right_model(make_hf: Any) -> Callable[..., Any]:
    """A model that the unchanged adapter wraps without an error."""

    @functools.cache
    def make(**options: Any) -> Any:
        hf = make_hf(**{**SQUARE, **options})
        dt_lens.wrap(hf)
        return hf

    return make


@pytest.fixture
def wrap_wrongly(monkeypatch: pytest.MonkeyPatch, right_model: Any) -> Iterator[Callable[..., str]]:
    """Wrap a model with an adapter whose weights went through ``mutation``, and return what certify says."""
    right = hf_decision_transformer.canonical_from_hf

    def attempt(mutation: Mutation, **options: Any) -> str:
        hf = right_model(**options)

        def wrong(tensors: Any, cfg: Any) -> Weights:
            weights = right(tensors, cfg)
            mutation(weights)
            return weights

        with monkeypatch.context() as patched:
            patched.setattr(hf_decision_transformer, "canonical_from_hf", wrong)
            with pytest.raises(DtLensError) as caught:
                dt_lens.wrap(hf)
        message = str(caught.value)
        assert message.startswith("certify: ") and message.endswith("."), message
        return message

    yield attempt


def culprit(message: str) -> str:
    found = re.match(r"certify: (.+?) does not reproduce its activation in the original model", message)
    assert found, message
    return found[1]


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Mutation:
    def mutation(weights: Weights) -> None:
        weights[name] = change(weights[name])

    return mutation


def exchanged(one: str, other: str) -> Mutation:
    def mutation(weights: Weights) -> None:
        weights[one], weights[other] = weights[other], weights[one]

    return mutation


def rotated_by_one(axis: int) -> Callable[[Tensor], Tensor]:
    return lambda W: W.roll(1, axis)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [-2, -1])
def test_permuted_rows_and_columns(wrap_wrongly: Any, name: str, axis: int) -> None:
    assert culprit(wrap_wrongly(changed(name, rotated_by_one(axis)))) == name


@pytest.mark.parametrize("name", NAMES)
def test_two_exchanged_rows(wrap_wrongly: Any, name: str) -> None:
    order = torch.arange(12)
    order[[4, 9]] = order[[9, 4]]
    axis = -1 if name.endswith(("W_O", "W_out")) else -2
    assert culprit(wrap_wrongly(changed(name, lambda W: W.index_select(axis, order)))) == name


@pytest.mark.parametrize("name", NAMES)
def test_transposed(wrap_wrongly: Any, name: str) -> None:
    message = wrap_wrongly(changed(name, lambda W: W.mT), n_head=1)
    assert culprit(message) == name and "it looks transposed" in message


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1.0001, 12**-0.5])
def test_rescaled(wrap_wrongly: Any, name: str, factor: float) -> None:
    message = wrap_wrongly(changed(name, lambda W: W * factor))
    assert culprit(message) == name
    assert f"it looks rescaled, {1 / factor:.4g} times it fits" in message


@pytest.mark.parametrize("name", [name for name in NAMES if "attn" in name])
def test_exchanged_heads(wrap_wrongly: Any, name: str) -> None:
    message = wrap_wrongly(changed(name, lambda W: W[[0, 2, 1]]))
    assert culprit(message) == name and "its heads look exchanged, in the order [0, 2, 1] they fit" in message


def test_heads_exchanged_in_all_matrices_alike(wrap_wrongly: Any) -> None:
    """The network computes the same; only the names of its heads are wrong."""

    def mutation(weights: Weights) -> None:
        for letter in "QKV":
            for kind in "Wb":
                name = f"blocks.1.attn.{kind}_{letter}"
                weights[name] = weights[name][[1, 0, 2]]
        weights["blocks.1.attn.W_O"] = weights["blocks.1.attn.W_O"][[1, 0, 2]]

    assert culprit(wrap_wrongly(mutation)) == "blocks.1.attn.W_Q"


@pytest.mark.parametrize("name", [name for name in NAMES if "attn" in name])
def test_a_bare_reshape_instead_of_a_split(wrap_wrongly: Any, name: str) -> None:
    def reshaped(W: Tensor) -> Tensor:
        if name.endswith("W_O"):
            return rearrange(rearrange(W, "h e d -> (h e) d"), "(e h) d -> h e d", h=3)
        return rearrange(W, "h d e -> d (h e)").reshape(W.shape)

    assert culprit(wrap_wrongly(changed(name, reshaped))) == name


def test_linear_read_as_conv1d(wrap_wrongly: Any) -> None:
    """All matrices transposed at once, as when an adapter takes nn.Linear's layout for Conv1D's."""

    def mutation(weights: Weights) -> None:
        for name in NAMES:
            weights[name] = weights[name].mT.contiguous().reshape(weights[name].shape)

    assert culprit(wrap_wrongly(mutation)) == "blocks.0.attn.W_Q"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *((f"blocks.{l}.attn.W_{a}", f"blocks.{l}.attn.W_{b}") for l in (0, 1) for a, b in ("QK", "KV", "QV")),
        *((f"blocks.0.{part}", f"blocks.1.{part}") for part in PARTS),
        ("blocks.0.mlp.W_in", "blocks.0.mlp.W_out"),
        ("blocks.1.mlp.W_in", "blocks.1.mlp.W_out"),
    ],
)  # fmt: skip
def test_exchanged_matrices(wrap_wrongly: Any, one: str, other: str) -> None:
    message = wrap_wrongly(exchanged(one, other))
    assert culprit(message) == min((one, other), key=FORWARD.__getitem__)
    assert f"what belongs there is called {max((one, other), key=FORWARD.__getitem__)}" in message


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", ["forgotten", "of another layer"])
def test_a_wrong_bias(wrap_wrongly: Any, name: str, change: str) -> None:
    bias = name.replace("W_", "b_")
    layer = int(name.split(".")[1])
    other = bias.replace(f"blocks.{layer}", f"blocks.{1 - layer}")
    message = wrap_wrongly(changed(bias, torch.zeros_like) if change == "forgotten" else exchanged(bias, other))
    expected = {name} if change == "forgotten" else {name, other.replace("b_", "W_")}
    assert culprit(message) == min(expected, key=FORWARD.__getitem__)
    assert "its matrix fits and its bias does not" in message


@pytest.mark.parametrize(
    ("mutation", "expected"),
    [
        (changed("blocks.1.ln1.w", torch.ones_like), "blocks.1.ln1"),
        (changed("blocks.1.ln2.w", torch.ones_like), "blocks.1.ln2"),
        (changed("blocks.0.ln2.b", torch.zeros_like), "blocks.0.ln2"),
        (exchanged("blocks.0.ln1.w", "blocks.0.ln2.w"), "blocks.0.ln1"),
        (changed("ln_final.w", torch.ones_like), "ln_final"),
        (changed("embed_ln.w", torch.ones_like), "embed_ln or embed.position.W"),
        (changed("embed.position.W", torch.zeros_like), "embed_ln or embed.position.W"),
        (changed("embed.state.W", lambda W: W.T), "embed.state.W"),
        (changed("embed.state.b", torch.zeros_like), "embed.state.W"),
        (exchanged("embed.state.W", "embed.action.W"), "embed.state.W|embed.action.W"),  # both are wrong
        (changed("embed.timestep.W", rotated_by_one(0)), "embed.timestep.W"),
        (changed("embed.return_to_go.W", lambda W: -W), "embed.return_to_go.W"),
        (changed("predict.action.W", lambda W: W.T), "predict.action.W"),
        (exchanged("predict.state.W", "predict.action.W"), "predict.action.W"),
        (changed("predict.state.W", rotated_by_one(1)), "predict.state.W"),
        (changed("predict.return_to_go.b", torch.zeros_like), "predict.return_to_go.W"),
    ],
)
def test_the_parts_between_the_matrices(wrap_wrongly: Any, mutation: Mutation, expected: str) -> None:
    assert culprit(wrap_wrongly(mutation)) in expected.split("|")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("act_fn", "gelu", "the activation function of block 0"),
        ("act_fn", "gelu_tanh", "the activation function of block 0"),
        ("eps", 1e-3, "blocks.0.ln1"),
        ("embed_ln_eps", 1e-2, "embed_ln or embed.position.W"),
        ("attn_scale_by_head", False, "the attention scale of block 0"),
        ("attn_scale_by_layer", True, "the attention scale of block 1"),
        ("action_tanh", False, "action_tanh"),
    ],
)
def test_a_wrong_option(monkeypatch: pytest.MonkeyPatch, make_hf: Any, option: str, value: Any, expected: str) -> None:
    right = hf_decision_transformer.config_from_hf
    monkeypatch.setattr(
        hf_decision_transformer,
        "config_from_hf",
        lambda *args, **kwargs: dataclasses.replace(right(*args, **kwargs), **{option: value}),
    )
    with pytest.raises(DtLensError) as caught:
        dt_lens.wrap(make_hf(**SQUARE))
    assert culprit(str(caught.value)) == expected


def test_gelu_is_not_its_approximation(monkeypatch: pytest.MonkeyPatch, make_hf: Any) -> None:
    hf = make_hf(activation_function="gelu_new")
    monkeypatch.setitem(dt_lens.decision_transformer.hf_layout.ACTIVATIONS, "gelu_new", "gelu")
    with pytest.raises(DtLensError, match="the activation function of block 0"):
        dt_lens.wrap(hf)


def test_a_forward_pass_that_is_not_the_originals(monkeypatch: pytest.MonkeyPatch, make_hf: Any) -> None:
    """Mistakes in the lens itself, whose weights are all right."""
    hf = make_hf(**SQUARE)
    ones = lambda self, mask, n: torch.ones(len(mask), 1, n, n, dtype=torch.bool)  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(HookedDecisionTransformer, "_allowed", ones)
        with pytest.raises(DtLensError, match="the attention mask of block 0"):
            dt_lens.wrap(hf)
    tokens = HookedDecisionTransformer._tokens
    with monkeypatch.context() as patched:
        patched.setattr(
            HookedDecisionTransformer, "_tokens", lambda self, *batch: self.hook_embed(tokens(self, *batch).flip(1))
        )
        with pytest.raises(DtLensError, match="certify: the order of the tokens does not"):
            dt_lens.wrap(hf)


def test_a_lens_that_makes_nan_of_good_numbers(monkeypatch: pytest.MonkeyPatch, make_hf: Any) -> None:
    hf = make_hf()
    monkeypatch.setattr("dt_lens.decision_transformer.model.activation", lambda name, x: x * float("nan"))
    with pytest.raises(DtLensError, match=r"the activation function of block 0 .*relative error nan"):
        dt_lens.wrap(hf)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("kind", ["QK", "OV", "W_Q", "W_O", "W_in", "W_out"])
def test_a_catalogue_that_is_wrong(monkeypatch: pytest.MonkeyPatch, make_hf: Any, kind: str, reference: bool) -> None:
    lens = dt_lens.wrap(make_hf(**SQUARE))
    if not reference:
        lens.reference = None
    name = next(n for n, m in catalogue(lens).items() if m.kind == kind and m.layer == 1)
    right = certification.catalogue

    def wrong(model: Any) -> Any:
        found = right(model)
        matrix = found[name]
        if len(matrix.factors) == 2:  # the other head's first factor
            factors = (matrix.factors[0]._replace(head=2), matrix.factors[1])
        else:  # another layer's weight
            factors = (matrix.factors[0]._replace(weight=matrix.factors[0].weight.replace("blocks.1", "blocks.0")),)
        return {**found, name: dataclasses.replace(matrix, factors=factors)}

    monkeypatch.setattr(certification, "catalogue", wrong)
    with pytest.raises(DtLensError, match=rf"certify: {re.escape(name)} does not"):
        dt_lens.certify(lens)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("mistake", ["averages over outputs", "forgets the scale", "forgets the centring"])
def test_folding_that_is_wrong(monkeypatch: pytest.MonkeyPatch, make_hf: Any, mistake: str, reference: bool) -> None:
    lens = dt_lens.wrap(make_hf(**SQUARE))
    if not reference:
        lens.reference = None

    def wrong(matrix: Tensor, w: Tensor, centre: bool = True, own: bool = False) -> Tensor:
        scaled = w.to(matrix)[:, None] * matrix
        if mistake == "averages over outputs":
            return scaled - scaled.mean(1, keepdim=True)
        return matrix - matrix.mean(0, keepdim=True) if mistake == "forgets the scale" else scaled + 0.1

    monkeypatch.setattr(matrices, "fold", wrong)
    if mistake == "forgets the centring":
        # Centred activations are not changed by centring, so a forward pass cannot tell.
        assert dt_lens.certify(lens).worst < 2e-5
        return
    with pytest.raises(DtLensError, match=r"certify: blocks.0.attn.W_Q with its LayerNorm folded does not"):
        dt_lens.certify(lens)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("kind", ["QK", "OV"])
def test_circuits_whose_folding_is_wrong(
    monkeypatch: pytest.MonkeyPatch, make_hf: Any, kind: str, reference: bool
) -> None:
    """Every other matrix is folded correctly, so only the circuit's own check can find it."""
    lens = dt_lens.wrap(make_hf(**SQUARE), check=False)
    if not reference:
        lens.reference = None
    right = matrices.Matrix.fold_change

    def wrong(self: matrices.Matrix, model: Any, *factors: Tensor, own: bool = False) -> tuple[Tensor, ...]:
        return factors if self.kind == kind else right(self, model, *factors, own=own)

    monkeypatch.setattr(matrices.Matrix, "fold_change", wrong)
    with pytest.raises(DtLensError, match=rf"certify: blocks\.0\.attn\.{kind}\.0 with its LayerNorm folded does not"):
        dt_lens.certify(lens)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(make_hf: Any, value: float) -> None:
    hf = make_hf()
    hf.encoder.h[1].mlp.c_fc.weight.data[0, 0] = value
    with pytest.raises(DtLensError, match=r"'blocks.1.mlp.W_in' holds NaN or infinite values"):
        dt_lens.wrap(hf)


def test_what_is_proven(make_hf: Any) -> None:
    lens = dt_lens.wrap(make_hf(**SQUARE))
    certificate = dt_lens.certify(lens, seed=3)
    assert set(catalogue(lens)) <= set(certificate.errors)
    folded = {name for name in certificate.errors if name.endswith("folded")}
    assert {name.split(" ")[0] for name in folded} == {n for n, m in catalogue(lens).items() if m.foldable}
    assert certificate.against == "the original model" and 0 < certificate.worst < 2e-5
    assert re.fullmatch(
        r"\d+ matrices and parts .* original model; largest relative error \d\.\de-0\d; not proven, because assumed.*",
        str(certificate),
    )


def test_an_object_that_is_not_a_wrapped_model_is_refused() -> None:
    with pytest.raises(DtLensError, match="certify takes a wrapped model, not an int"):
        dt_lens.certify(3)  # type: ignore[arg-type]


def test_matrices_that_nothing_proves_are_refused(make_hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = dt_lens.wrap(make_hf())
    right = certification.catalogue
    extra = dataclasses.replace(right(lens)["blocks.0.mlp.W_in"], name="blocks.0.mlp.W_gate")
    monkeypatch.setattr(certification, "catalogue", lambda model: {**right(model), extra.name: extra})
    with pytest.raises(DtLensError, match=r"no activation proves blocks\.0\.mlp\.W_gate"):
        dt_lens.certify(lens)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization": "post", "final_ln": False},
        {"normalization": "none", "embed_ln": False, "final_ln": False, "position": "learned", "n_position": 3},
        {"n_ctx": 1, "max_ep_len": 1},
        {"discrete_actions": True, "action_tanh": False, "position": "constant"},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_models_of_our_own_are_certified_too(options: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    sizes = {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_mlp": 12, "n_ctx": 4, "max_ep_len": 20}
    model = HookedDecisionTransformer(HookedDecisionTransformerConfig(5, 3, **{**sizes, **options}))
    certificate = dt_lens.certify(model, seed)
    assert set(catalogue(model)) <= set(certificate.errors)
    assert certificate.against == "the lens's own forward pass" and model.training
