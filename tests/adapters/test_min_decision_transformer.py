"""min-decision-transformer: post-LayerNorm blocks, held against a re-implementation of the original."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dt_lens
from dt_lens import WeightSVD
from dt_lens.errors import DtLensError
from dt_lens.lens.certification import certify
from dt_lens.lens.checkpoints import read_checkpoint
from dt_lens.lens.matrices import catalogue
from dt_lens_adapters.min_decision_transformer import MinDecisionTransformer


class Attention(nn.Module):
    def __init__(self, d: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.n_heads = heads
        self.q_net, self.k_net, self.v_net, self.proj_net = (nn.Linear(d, d) for _ in range(4))
        self.register_buffer("mask", torch.ones(tokens, tokens).tril()[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, t, d = x.shape
        heads = []
        for h in range(self.n_heads):
            part = slice(h * d // self.n_heads, (h + 1) * d // self.n_heads)
            q, k, v = self.q_net(x)[..., part], self.k_net(x)[..., part], self.v_net(x)[..., part]
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            scores[:, self.mask[0, 0, :t, :t] == 0] = -torch.inf
            heads.append(scores.softmax(-1) @ v)
        return self.proj_net(torch.cat(heads, -1))


class Block(nn.Module):
    def __init__(self, d: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(d, tokens, heads)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d), nn.Dropout(0.1))
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.ln1(x + self.attention(x))
        return self.ln2(x + self.mlp(x))


class Minimal(nn.Module):
    """The original's module names, argument order and computation."""

    def __init__(
        self, state_dim: int, act_dim: int, d: int, heads: int, blocks: int, context: int, discrete: bool = False
    ) -> None:
        super().__init__()
        self.transformer = nn.Sequential(*(Block(d, 3 * context, heads) for _ in range(blocks)))
        self.embed_ln = nn.LayerNorm(d)
        self.embed_timestep = nn.Embedding(40, d)
        self.embed_rtg, self.embed_state = nn.Linear(1, d), nn.Linear(state_dim, d)
        self.embed_action = nn.Embedding(act_dim, d) if discrete else nn.Linear(act_dim, d)
        self.predict_rtg, self.predict_state = nn.Linear(d, 1), nn.Linear(d, state_dim)
        self.predict_action = nn.Sequential(nn.Linear(d, act_dim), *([] if discrete else [nn.Tanh()]))
        self.factor = 1.0

    def forward(self, timesteps: Any, states: Any, actions: Any, returns_to_go: Any) -> Any:
        time = self.embed_timestep(timesteps)
        kinds = self.embed_rtg(returns_to_go), self.embed_state(states), self.embed_action(actions)
        tokens = [kind[:, t] + time[:, t] for t in range(time.shape[1]) for kind in kinds]
        x = self.transformer(self.embed_ln(torch.stack(tokens, 1)))
        state, action = x[:, 1::3], x[:, 2::3]
        return self.predict_state(action), self.factor * self.predict_action(state), self.predict_rtg(action)


def make(seed: int = 0, size: float = 0.3, **sizes: Any) -> Minimal:
    torch.manual_seed(seed)
    options = {"state_dim": 5, "act_dim": 3, "d": 16, "heads": 2, "blocks": 2, "context": 4, **sizes}
    model = Minimal(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def batch_of(model: Minimal, n: int = 3, steps: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state_dim, act_dim = model.predict_state.out_features, model.predict_action[0].out_features
    actions = torch.randn(n, steps, act_dim, generator=generator)
    if isinstance(model.embed_action, nn.Embedding):
        actions = torch.nn.functional.one_hot(actions.argmax(-1), act_dim).float()
    return {
        "states": torch.randn(n, steps, state_dim, generator=generator),
        "actions": actions,
        "returns_to_go": torch.randn(n, steps, 1, generator=generator),
        "timesteps": torch.randint(40, (n, steps), generator=generator),
    }


def original(model: Minimal, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    actions = batch["actions"].argmax(-1) if isinstance(model.embed_action, nn.Embedding) else batch["actions"]
    with torch.no_grad():
        return torch.cat(model(batch["timesteps"], batch["states"], actions, batch["returns_to_go"]), -1)


def lensed(lens: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        out = lens(**batch)
    return torch.cat([out.state_preds, out.action_preds, out.return_preds], -1)


def saved(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "dt_hopper-medium-v2_model.pt")
    return folder / "dt_hopper-medium-v2_model.pt"


@settings(max_examples=8, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([1, 3, 4]),
    blocks=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 4)),
    steps=st.integers(1, 4),
    discrete=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_same_predictions(
    heads: int, width: int, blocks: int, sizes: tuple[int, int], steps: int, discrete: bool, seed: int
) -> None:
    model = make(seed, state_dim=sizes[0], act_dim=sizes[1], d=4 * width, heads=heads, blocks=blocks, discrete=discrete)
    lens = dt_lens.wrap(model)
    batch = batch_of(model, steps=steps, seed=seed)
    torch.testing.assert_close(lensed(lens, batch), original(model, batch), rtol=1e-5, atol=1e-5)
    assert lens.cfg.n_heads == heads and lens.cfg.discrete_actions == discrete and lens.cfg.action_tanh != discrete


def test_padding_is_as_if_it_were_not_there() -> None:
    """The original knows no padding: at the beginning of an episode its windows are short."""
    model = make()
    lens, batch = dt_lens.wrap(model), batch_of(model)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]])
    mine = lensed(lens, {**batch, "attention_mask": mask})
    for row, real in enumerate(mask.bool()):
        alone = {name: x[row : row + 1, real] for name, x in batch.items()}
        torch.testing.assert_close(mine[row, real], original(model, alone)[0], rtol=1e-5, atol=1e-5)


def test_a_file(tmp_path: Path) -> None:
    model = make(context=7)
    file = saved(model, tmp_path)
    with pytest.raises(DtLensError, match=r"pass n_heads= \(the code base's default is n_heads=1\)\.$"):
        dt_lens.load(file)
    lens = dt_lens.load(file, n_heads=2, environment="Hopper-v5")
    batch = batch_of(model)
    torch.testing.assert_close(lensed(lens, batch), original(model, batch), rtol=1e-5, atol=1e-5)
    assert lens.facts.context == lens.cfg.n_ctx == 7 and lens.facts.return_scale == 1000.0
    assert lens.cfg.normalization == "post" and not lens.cfg.final_ln and lens.facts.environment == "Hopper-v5"
    certificate = certify(lens, seed=3)
    assert set(catalogue(lens)) <= set(certificate.errors) and certificate.against == "the original model"
    assert dt_lens.load(file, n_heads=2, context=3, return_scale=1).facts.context == 3
    # It moves with its file's tensors, which stay one memory with it.
    lens.to(torch.float64)
    certify(lens)
    lens.require_shared(list(lens.weights))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_heads": 3}, "d_model 16 does not split into n_heads 3"),
        ({"n_heads": "two"}, "n_heads is 'two'; it must be a positive whole number"),
        ({"n_heads": 2, "action_tanh": 1}, "action_tanh is 1; it must be true or false"),
        ({"n_heads": 2, "context": 0}, "context is 0; it must be a positive number of steps"),
        ({"nheads": 2}, r"Unknown option 'nheads' .* mean 'n_heads'\?$"),
        ({"n_heads": 2, "state_mean": [0.0], "state_std": [1.0]}, "state_mean has 1 entries; the model's state has 5"),
    ],
)
def test_what_was_given_wrongly(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(DtLensError, match=message):
        dt_lens.load(saved(make(), tmp_path), **given)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("transformer.1.ln2.bias", None, r"no tensor 'transformer\.1\.ln2\.bias'"),
        ("transformer.0.mlp.0.weight", None, r"no tensor 'transformer\.0\.mlp\.0\.weight'"),
        ("embed_ln.weight", None, r"no tensor 'embed_ln\.weight'"),
        ("embed_timestep.weight", lambda t: t[0], r"'embed_timestep\.weight' has shape \[16\]"),
        ("embed_action.weight", lambda t: t.T, r"'embed_action\.weight' has shape \[3, 16\]; \[16, 3\] was expected"),
        ("transformer.0.attention.q_nett.weight", lambda t: torch.zeros(3), r"q_nett\.weight' .* no place .* Did you"),
        ("transformer.0.attention.mask.more", lambda t: torch.zeros(3), r"attention\.mask\.more' .* has no place for"),
        ("predict_rtg.weight", lambda t: t.long(), "holds int64 numbers"),
        ("transformer.1.ln1.weight", lambda t: t / 0, r"'transformer\.1\.ln1\.weight' in .* holds NaN or infinite"),
    ],
)
def test_damaged_files(tmp_path: Path, key: str, change: Any, message: str) -> None:
    tensors = dict(make().state_dict())
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors.get(key)).contiguous()
    torch.save(tensors, tmp_path / "agent.pt")
    with pytest.raises(DtLensError, match=message):
        dt_lens.load(tmp_path / "agent.pt", n_heads=2)


def test_nobody_else_recognises_it(recognised_by: Any, tmp_path: Path) -> None:
    for discrete in (False, True):
        model = make(discrete=discrete)
        assert recognised_by(model) == ["min_decision_transformer"]
        assert recognised_by(read_checkpoint(saved(model, tmp_path))) == ["min_decision_transformer"]


def test_a_wrong_map_is_noticed(mistaken: Any) -> None:
    model = make()
    mistaken(MinDecisionTransformer.layout, lambda: dt_lens.wrap(model))


def test_edits_reach_the_live_model(edits_reach: Any) -> None:
    model = make()
    lens, batch = dt_lens.wrap(model), batch_of(model)
    edits_reach(lens, lambda: original(model, batch), lambda: lensed(lens, batch))


def test_a_live_model_that_computes_something_else_is_refused() -> None:
    model = make()
    model.factor = 1.01
    with pytest.raises(DtLensError, match=r"certify: .* does not reproduce its activation in the original model"):
        dt_lens.wrap(model)
    model.factor, model.transformer[1].attention.n_heads = 1.0, 4
    with pytest.raises(DtLensError, match="certify"):
        dt_lens.wrap(model)  # it says two heads first and four later
    model.forward = None  # type: ignore[method-assign, assignment]
    with pytest.raises(DtLensError, match="own forward pass fails"):
        dt_lens.wrap(model)


def test_a_planted_direction_is_found() -> None:
    model = make(d=32, act_dim=3, state_dim=6)
    with torch.no_grad():
        action = model.embed_action.weight[:, 1] * model.embed_ln.weight  # what arrives in the stream, but for its mean
        first = model.transformer[0].mlp[0].weight  # (out, in)
        first.mul_(0.01)
        first += torch.outer(torch.nn.functional.normalize(torch.randn(len(first)), dim=0), 9.0 * action)
    lens = dt_lens.wrap(model, action_labels=["left", "right", "up"])
    table = WeightSVD(lens).scan(matrices=["blocks.0.mlp.W_in"], embeddings=["action_in"], null="haar", seed=0)
    best = table.sort_values("cosine", key=np.abs, ascending=False).iloc[0]
    assert best["sv"] == 0 and best["label"] == "right" and abs(best["cosine"]) > 0.99
