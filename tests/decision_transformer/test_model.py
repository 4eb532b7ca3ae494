"""The hooked model against its formulas, written out naively; what it reads, and how it is copied and moved."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.errors import DtLensError
from dt_lens.lens.certification import certify

OUTPUTS = ("state_preds", "action_preds", "return_preds", "last_hidden_state")
Make = Callable[..., HookedDecisionTransformer]
Run = Callable[[HookedDecisionTransformer, dict[str, Tensor]], dict[str, Tensor]]


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centred**2).sum(-1, keepdim=True) / x.shape[-1]
    return centred / torch.sqrt(variance + eps) * w + b


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


NONLINEAR = {
    "relu": lambda x: x * (x > 0),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
}


def naive(model: HookedDecisionTransformer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The forward pass token by token and head by head, from the formulas, in the weights' own precision."""
    cfg, W = model.cfg, model.weights

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, W[f"{name}.w"], W[f"{name}.b"], eps)

    def attend(layer: int, x: Tensor, real: Tensor) -> Tensor:
        a = f"blocks.{layer}.attn"
        out = W[f"{a}.b_O"].expand(len(x), -1).clone()
        for head in range(cfg.n_heads):
            q, k, v = (x @ W[f"{a}.W_{c}"][head] + W[f"{a}.b_{c}"][head] for c in "QKV")
            for i in range(len(x)):
                seen = [j for j in range(i + 1) if real[j] or j == i]
                scores = torch.stack([(q[i] * k[j]).sum() for j in seen])
                if cfg.attn_scale_by_head:
                    scores = scores / math.sqrt(cfg.d_model // cfg.n_heads)
                if cfg.attn_scale_by_layer:
                    scores = scores / (layer + 1)
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                out[i] += sum(w * v[j] for w, j in zip(weights, seen, strict=True)) @ W[f"{a}.W_O"][head]
        return out

    def think(layer: int, x: Tensor) -> Tensor:
        m = f"blocks.{layer}.mlp"
        if cfg.gated_mlp:
            post = NONLINEAR[cfg.act_fn](x @ W[f"{m}.W_gate"]) * (x @ W[f"{m}.W_in"]) + W[f"{m}.b_in"]
            return post @ W[f"{m}.W_out"] + W[f"{m}.b_out"]
        return NONLINEAR[cfg.act_fn](x @ W[f"{m}.W_in"] + W[f"{m}.b_in"]) @ W[f"{m}.W_out"] + W[f"{m}.b_out"]

    made: dict[str, list[Tensor]] = {name: [] for name in OUTPUTS}
    for row in range(len(batch["timesteps"])):
        tokens, real = [], []
        for step, t in enumerate(batch["timesteps"][row]):
            for kind, key in (("return_to_go", "returns_to_go"), ("state", "states"), ("action", "actions")):
                if kind == "action" and step == batch["actions"].shape[1]:
                    continue  # not taken yet
                rows = W[f"embed.{kind}.W"][: batch[key].shape[-1]]
                x = batch[key][row, step] @ rows + W[f"embed.{kind}.b"]
                if cfg.embed_act == "tanh":
                    x = NONLINEAR["tanh"](x)
                x = x + W["embed.timestep.W"][batch["timesteps"][row, -1] if cfg.timestep_of == "window" else t]
                tokens.append(x + W["embed.position.W"][step] if cfg.position == "step" else x)
                real.append("attention_mask" not in batch or bool(batch["attention_mask"][row, step]))
        x, real = torch.stack(tokens), torch.tensor(real)
        if cfg.embed_ln:
            x = norm("embed_ln", x, cfg.embed_ln_eps)
        if cfg.position == "constant":
            x = x + W["embed.position.W"][0]
        elif cfg.position == "learned":
            x = torch.stack([token + W["embed.position.W"][i] for i, token in enumerate(x)])
        for layer in range(cfg.n_layers):
            one, two = f"blocks.{layer}.ln1", f"blocks.{layer}.ln2"
            if cfg.normalization == "pre":
                x = x + attend(layer, norm(one, x, cfg.eps), real)
                x = x + think(layer, norm(two, x, cfg.eps))
            elif cfg.normalization == "post":
                x = norm(one, x + attend(layer, x, real), cfg.eps)
                x = norm(two, x + think(layer, x), cfg.eps)
            else:
                x = x + attend(layer, x, real)
                x = x + think(layer, x)
        if cfg.final_ln:
            x = norm("ln_final", x, cfg.eps)
        action = x[1::3] @ W["predict.action.W"] + W["predict.action.b"]
        made["action_preds"].append(torch.tanh(action) if cfg.action_tanh else action)
        for head, name in (("state", "state_preds"), ("return_to_go", "return_preds")):
            if head in cfg.predicts:
                made[name].append(x[2::3] @ W[f"predict.{head}.W"] + W[f"predict.{head}.b"])
        made["last_hidden_state"].append(x)
    return {name: torch.stack(rows) for name, rows in made.items() if rows}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_it_computes_the_formulas(make: Make, run: Run, make_batch: Any, name: str, padding: str) -> None:
    model = make(name).double()
    batch = make_batch(model.cfg, padding=padding)
    batch = {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}
    mine, theirs = run(model, batch), naive(model, batch)
    assert set(mine) == set(theirs)
    for output in mine:
        torch.testing.assert_close(mine[output], theirs[output], rtol=1e-10, atol=1e-10)


def test_the_future_and_the_padding_are_not_seen(make: Make, run: Run, make_batch: Any, name: str) -> None:
    model = make(name)
    batch = make_batch(model.cfg, batch=1)
    plain = run(model, batch)
    for step in range(4):
        for position, key in enumerate(("returns_to_go", "states", "actions")):
            changed = {k: x.clone() for k, x in batch.items()}
            changed[key][:, step] += 1
            moved = (run(model, changed)["last_hidden_state"] - plain["last_hidden_state"]).abs().amax((0, 2))
            token = 3 * step + position
            assert moved[:token].max() == 0 if token else True
            assert (moved[token:] > 1e-6).all(), f"token {token} is not read by all that come after"
    for padding in ("left", "right"):
        batch = make_batch(model.cfg, batch=4, padding=padding)
        real = batch["attention_mask"].bool()
        changed = {k: x.clone() for k, x in batch.items()}
        for key in ("returns_to_go", "states", "actions"):
            changed[key][~real] = 100.0
        before, after = run(model, batch), run(model, changed)
        for output in set(before) & set(OUTPUTS[:3]):
            torch.testing.assert_close(after[output][real], before[output][real], rtol=0, atol=1e-6)
            assert torch.isfinite(after[output]).all()


def test_left_padding_is_a_shorter_window(make: Make, run: Run, make_batch: Any) -> None:
    model = make()
    whole = make_batch(model.cfg, batch=2, steps=4)
    short = {k: x[:, 2:] for k, x in whole.items()}
    mask = torch.tensor([[0, 0, 1, 1]] * 2)
    padded, alone = run(model, {**whole, "attention_mask": mask}), run(model, short)
    for output in OUTPUTS[:3]:
        torch.testing.assert_close(padded[output][:, 2:], alone[output], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "learned", "gated", "tanh"])
def test_the_last_action_may_be_missing(make: Make, run: Run, make_batch: Any, name: str) -> None:
    model = make(name).double()
    for steps in (1, 4):
        whole = make_batch(model.cfg, steps=steps, padding="left")
        whole = {key: x.double() if x.is_floating_point() else x for key, x in whole.items()}
        short = {**whole, "actions": whole["actions"][:, :-1]}
        mine, theirs = run(model, short), naive(model, short)
        assert set(mine) == set(theirs)
        for output in theirs:
            torch.testing.assert_close(mine[output], theirs[output], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(mine["action_preds"], run(model, whole)["action_preds"], rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            out, cache = model.run_with_cache(**short)
        torch.testing.assert_close(out.action_preds, mine["action_preds"], rtol=1e-10, atol=1e-10)
        assert cache["hook_embed"].shape[1] == 3 * steps - 1 and cache["hook_embed_action"].shape[1] == steps - 1


def test_an_action_is_an_id_or_one_hot_and_padding_is_the_last(make: Make, run: Run, make_batch: Any) -> None:
    model = make("gated")
    ids = torch.tensor([[0, 3, 2, 1]])
    batch = make_batch(model.cfg, batch=1)
    expected = run(model, {**batch, "actions": ids})
    wide = torch.nn.functional.one_hot(ids, 4).float()
    for output, got in run(model, {**batch, "actions": wide}).items():
        torch.testing.assert_close(got, expected[output])
    with torch.no_grad():
        _, cache = model.run_with_cache(**{**batch, "actions": ids})
    W = model.weights
    assert torch.equal(cache["hook_embed_action"][0, 1], W["embed.action.W"][3] + W["embed.action.b"])
    narrow = run(model, {**batch, "actions": wide[..., :3] * 0})["last_hidden_state"]
    assert torch.equal(narrow, run(model, {**batch, "actions": wide * 0})["last_hidden_state"])


@pytest.mark.parametrize("hooked", [False, True])
def test_gradients_reach_every_weight(make: Make, make_batch: Any, hooked: bool) -> None:
    model = make(position="learned", n_position=12).train()
    batch = make_batch(model.cfg)
    hooks = [(lambda name: True, lambda x, hook: x)] if hooked else []
    out = model.run_with_hooks(**batch, fwd_hooks=hooks)
    sum(getattr(out, output).pow(2).sum() for output in OUTPUTS).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias shifts all scores of a query alike, so it has no effect.
    assert [name for name in still if "b_K" not in name] == []


def test_dropout_acts_in_training_only(make: Make, run: Run, make_batch: Any) -> None:
    model = make(embed_dropout=0.5, attn_dropout=0.5, resid_dropout=0.5)
    batch = make_batch(model.cfg)
    assert torch.equal(run(model, batch)["action_preds"], run(model, batch)["action_preds"])
    model.train()
    assert not torch.equal(run(model, batch)["action_preds"], run(model, batch)["action_preds"])


def test_deepcopy_stands_alone(make: Make, run: Run, make_batch: Any) -> None:
    model = make()
    batch = make_batch(model.cfg)
    plain = run(model, batch)
    model.get_parameter("embed.state.W").requires_grad_(False)
    copied = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(run(copied, batch).values(), plain.values(), strict=True))
    assert copied.identity != model.identity and copied.facts == model.facts and not copied.training
    assert not copied.get_parameter("embed.state.W").requires_grad
    copied.weights["blocks.0.mlp.W_in"].zero_()
    assert all(torch.equal(a, b) for a, b in zip(run(model, batch).values(), plain.values(), strict=True))


def test_every_tensor_is_on_the_models_device(
    make: Make, make_batch: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A tensor on another device than the weights would be an error on a GPU; it is one on the meta device too."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # meta tensors have no values to check
    model = make(name).to("meta")
    batch = {key: x.to("meta") for key, x in make_batch(model.cfg, padding="left").items()}
    for given in (batch, {k: x for k, x in batch.items() if k != "attention_mask"}, model.probe()):
        assert model(**given).action_preds.is_meta
        _, cache = model.run_with_cache(**given)
        assert all(activation.is_meta for activation in cache.values())


def test_the_users_random_numbers_are_left_alone(make: Make) -> None:
    model = make()
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    copy.deepcopy(model)
    model.probe()
    certify(model)
    assert torch.equal(torch.randn(4), expected)


def test_actions_by_number_or_one_hot(make: Make, run: Run, make_batch: Any) -> None:
    model = make(discrete_actions=True, action_tanh=False)
    batch = make_batch(model.cfg)
    ids = torch.randint(3, (3, 4), generator=torch.Generator().manual_seed(0))
    one_hot = nn.functional.one_hot(ids, 3).float()
    by_id, by_vector = run(model, {**batch, "actions": ids}), run(model, {**batch, "actions": one_hot})
    for output in OUTPUTS:
        torch.testing.assert_close(by_id[output], by_vector[output], rtol=1e-5, atol=1e-6)
    assert model.probe()["actions"].sum(-1).eq(1).all()
    certify(model)


class Picture(nn.Module):
    """A user's state encoder, with a buffer and a nonlinearity, for states that are pictures."""

    state_shape = (1, 4, 4)

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.out = nn.Linear(8, d_model)
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.conv(x.flatten(0, 1) + self.shift).relu().flatten(1)
        return self.out(seen).unflatten(0, x.shape[:2])


def test_a_users_state_encoder(make: Make, run: Run, make_batch: Any) -> None:
    model = make(encoder=Picture(8))
    assert "embed.state.conv.weight" in model.weights and "embed.state.W" not in model.weights
    assert "state_in" not in model.embeddings and "state_out" in model.embeddings
    assert "blocks.0.mlp.W_in" in certify(model).errors
    batch = make_batch(model.cfg)
    batch["states"] = torch.randn(3, 4, 1, 4, 4)
    plain = run(model, batch)
    copied = copy.deepcopy(model)
    assert torch.equal(run(copied, batch)["action_preds"], plain["action_preds"])
    copied.weights["embed.state.conv.weight"].zero_()
    assert torch.equal(run(model, batch)["action_preds"], plain["action_preds"])
    assert not torch.equal(run(copied, batch)["action_preds"], plain["action_preds"])


def test_more_tokens_than_positions(make: Make, run: Run, make_batch: Any) -> None:
    model = make(position="learned", n_position=9)
    run(model, make_batch(model.cfg, steps=3))
    with pytest.raises(DtLensError, match="12 tokens do not fit this model's 9 positions"):
        run(model, make_batch(model.cfg, steps=4))


def test_shapes_are_checked_while_tests_run(make: Make, make_batch: Any) -> None:
    model = make()
    batch = make_batch(model.cfg)
    with pytest.raises(jaxtyping.TypeCheckError, match="returns_to_go"):
        model(**{**batch, "returns_to_go": batch["returns_to_go"][..., 0]})


def test_an_unknown_weight_is_named(make: Make) -> None:
    model = make()
    good = dict(model.weights)
    for weights, message in (
        ({**good, "blocks.0.mlp.Win": torch.zeros(1)}, r"no weight 'blocks.0.mlp.Win'.* mean 'blocks.0.mlp.W_in'"),
        ({k: v for k, v in good.items() if k != "ln_final.w"}, "'ln_final.w' is missing"),
        ({**good, "ln_final.w": torch.zeros(3)}, r"'ln_final.w' has shape \[3\]"),
        ({**good, "ln_final.w": torch.ones(8, dtype=torch.int8)}, "'ln_final.w' holds int8 numbers"),
        ({**good, "ln_final.w": torch.ones(8, dtype=torch.float64)}, "convert the model to one type"),
        ({**good, "ln_final.w": torch.ones(8, device="meta")}, "'ln_final.w' is on the meta device"),
    ):
        before = {name: weight.data_ptr() for name, weight in model.weights.items()}
        with pytest.raises(DtLensError, match=message):
            model.adopt(weights)
        assert {name: weight.data_ptr() for name, weight in model.weights.items()} == before


@pytest.mark.parametrize("embed_act", ["none", "tanh"])
def test_states_as_whole_numbers_are_one_hot_states(make_dt: Make, embed_act: str) -> None:
    model = make_dt(1, embed_act=embed_act)
    batch = model.probe()
    ids = torch.arange(batch["timesteps"].numel()).reshape(batch["timesteps"].shape) % model.cfg.state_dim
    seen = model(**{**batch, "states": nn.functional.one_hot(ids, model.cfg.state_dim).float()})
    for dtype in (torch.long, torch.int32, torch.uint8):
        found = model(**{**batch, "states": ids.to(dtype)})
        torch.testing.assert_close(found.last_hidden_state, seen.last_hidden_state)
    model.facts = replace(model.facts, state_mean=(0.0,) * 5, state_std=(1.0,) * 5)
    with pytest.raises(DtLensError, match=r"^states are whole numbers, .* reads normalised states .*\.$"):
        model(**{**batch, "states": ids})
