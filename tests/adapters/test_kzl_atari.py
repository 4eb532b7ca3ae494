"""kzl's Atari half: minGPT blocks and convolutions, held against a re-implementation of the original."""

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
from dt_lens_adapters.kzl_atari import KZLAtariDecisionTransformer

FRAMES = 2  # kzl has four, and wider convolutions; the side of 84 pixels is written into its code
LONGEST = 30


class Attention(nn.Module):
    def __init__(self, d: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(d, d) for _ in range(4))
        self.register_buffer("mask", torch.ones(tokens, tokens).tril()[None, None])
        self.n_head = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t, e = x.shape[1], x.shape[2] // self.n_head
        parts = []
        for h in range(self.n_head):
            q, k, v = (net(x)[..., h * e : (h + 1) * e] for net in (self.query, self.key, self.value))
            scores = (q @ k.mT / math.sqrt(e)).masked_fill(self.mask[0, :, :t, :t] == 0, -torch.inf)
            parts.append(scores.softmax(-1) @ v)
        return self.proj(torch.cat(parts, -1))


class Block(nn.Module):
    def __init__(self, d: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attention(d, tokens, heads)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Minimal(nn.Module):
    """The original's names, argument order and computation, of the return-conditioned kind."""

    def __init__(self, actions: int, d: int, heads: int, blocks: int, context: int) -> None:
        super().__init__()
        tokens = 3 * context + 1
        self.tok_emb = nn.Embedding(actions, d)  # never used, there too
        self.pos_emb = nn.Parameter(torch.zeros(1, tokens, d))
        self.global_pos_emb = nn.Parameter(torch.zeros(1, LONGEST + 1, d))
        self.blocks = nn.Sequential(*(Block(d, tokens, heads) for _ in range(blocks)))
        self.ln_f, self.head = nn.LayerNorm(d), nn.Linear(d, actions, bias=False)
        convs = nn.Conv2d(FRAMES, 3, 8, 4), nn.ReLU(), nn.Conv2d(3, 2, 4, 2), nn.ReLU(), nn.Conv2d(2, 4, 3), nn.ReLU()
        self.state_encoder = nn.Sequential(*convs, nn.Flatten(), nn.Linear(4 * 49, d), nn.Tanh())
        self.ret_emb = nn.Sequential(nn.Linear(1, d), nn.Tanh())
        self.action_embeddings = nn.Sequential(nn.Embedding(actions, d), nn.Tanh())
        self.model_type, self.factor = "reward_conditioned", 1.0

    def forward(self, states: Any, actions: Any, targets: Any = None, rtgs: Any = None, timesteps: Any = None) -> Any:
        n, steps = states.shape[:2]
        seen = self.state_encoder(states.reshape(-1, FRAMES, 84, 84)).reshape(n, steps, -1)
        done = self.action_embeddings(actions.squeeze(-1))
        kinds = self.ret_emb(rtgs), seen, done
        tokens = [kind[:, t] for t in range(steps) for kind in kinds]
        x = torch.stack(tokens if targets is not None else tokens[:-1], 1)
        time = self.global_pos_emb[0][timesteps[:, 0, 0]][:, None]
        x = self.ln_f(self.blocks(x + time + self.pos_emb[:, : x.shape[1]]))
        return self.factor * self.head(x)[:, 1::3], None


def make(seed: int = 0, size: float = 0.2, **sizes: Any) -> Minimal:
    torch.manual_seed(seed)
    model = Minimal(**{"actions": 4, "d": 16, "heads": 2, "blocks": 2, "context": 4, **sizes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def batch_of(model: Minimal, n: int = 2, steps: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(LONGEST - steps, (n, 1), generator=generator)
    return {
        "states": torch.rand(n, steps, FRAMES * 84 * 84, generator=generator),
        "actions": torch.randint(model.head.out_features, (n, steps), generator=generator),
        "returns_to_go": torch.randn(n, steps, 1, generator=generator),
        "timesteps": starts + torch.arange(steps),
    }


def original(model: Minimal, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = batch["actions"][..., None]
    # As its own rollouts do: the current step's number for the whole window.
    now = batch["timesteps"][:, -1:, None]
    with torch.no_grad():
        return model(batch["states"], ids, rtgs=batch["returns_to_go"], timesteps=now)[0]


def lensed(lens: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return lens(**batch).action_preds


def saved(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "Breakout_123.pth")
    return folder / "Breakout_123.pth"


@settings(max_examples=5, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([1, 3]),
    blocks=st.integers(1, 3),
    actions=st.integers(2, 6),
    steps=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_the_same_predictions(heads: int, width: int, blocks: int, actions: int, steps: int, seed: int) -> None:
    model = make(seed, actions=actions, d=4 * width, heads=heads, blocks=blocks)
    lens, batch = dt_lens.wrap(model), batch_of(model, steps=steps, seed=seed)
    expected = original(model, batch)
    torch.testing.assert_close(lensed(lens, batch), expected, rtol=1e-5, atol=1e-5)
    one_hot = nn.functional.one_hot(batch["actions"], actions).float()
    frames = batch["states"].unflatten(-1, (FRAMES, 84, 84))
    torch.testing.assert_close(
        lensed(lens, {**batch, "actions": one_hot, "states": frames}), expected, rtol=1e-5, atol=1e-5
    )
    without = {**batch, "actions": batch["actions"][:, :-1]}  # the action to come
    torch.testing.assert_close(lensed(lens, without), expected, rtol=1e-5, atol=1e-5)


def test_a_file(tmp_path: Path) -> None:
    model = make()
    file = saved(model, tmp_path)
    with pytest.raises(DtLensError, match=r"pass n_heads= \(the code base's default is n_heads=8\)\.$"):
        dt_lens.load(file)
    lens = dt_lens.load(file, n_heads=2, environment="ALE/Breakout-v5", target_returns=[90])
    batch = batch_of(model)
    torch.testing.assert_close(lensed(lens, batch), original(model, batch), rtol=1e-5, atol=1e-5)
    cfg = lens.cfg
    assert (cfg.act_dim, cfg.state_dim, cfg.n_ctx, cfg.max_ep_len, cfg.n_position) == (
        4,
        2 * 84 * 84,
        4,
        LONGEST + 1,
        13,
    )
    assert cfg.discrete_actions and cfg.embed_act == "tanh" and lens.facts.return_scale == 1.0
    certificate = certify(lens, seed=3)
    assert set(catalogue(lens)) <= set(certificate.errors) and certificate.against == "the original model"
    assert "action_out" in lens.embeddings and "state_in" not in lens.embeddings
    lens.to(torch.float64)
    certify(lens)
    lens.require_shared(list(lens.weights))


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("blocks.1.ln2.bias", None, r"no tensor 'blocks\.1\.ln2\.bias'"),
        ("state_encoder.2.weight", None, r"no tensor 'state_encoder\.2\.weight'"),
        ("pos_emb", None, r"no tensor 'pos_emb'"),
        ("state_encoder.0.weight", lambda t: t[..., :4], r"'state_encoder\.0\.weight' has shape .*8, 8\] was expected"),
        ("state_encoder.7.weight", lambda t: t[:, :-1], r"'state_encoder\.7\.weight' has shape"),
        ("head.bias", lambda t: torch.zeros(4), r"'head\.bias' .* no place for"),
        ("blocks.0.attn.maskk", lambda t: torch.zeros(4), r"'blocks\.0\.attn\.maskk' .* no place for"),
        ("ret_emb.0.bias", lambda t: t.long(), "holds int64 numbers"),
        ("global_pos_emb", lambda t: t / 0, r"'global_pos_emb' in .* holds NaN or infinite"),
    ],
)
def test_damaged_files(tmp_path: Path, key: str, change: Any, message: str) -> None:
    tensors = dict(make().state_dict())
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors.get(key)).contiguous()
    torch.save(tensors, tmp_path / "agent.pth")
    with pytest.raises(DtLensError, match=message):
        dt_lens.load(tmp_path / "agent.pth", n_heads=2, adapter="kzl_atari")


def test_nobody_else_recognises_it(recognised_by: Any, tmp_path: Path) -> None:
    model = make()
    assert recognised_by(model) == recognised_by(read_checkpoint(saved(model, tmp_path))) == ["kzl_atari"]


def test_a_wrong_map_is_noticed(mistaken: Any) -> None:
    model = make()
    mistaken(KZLAtariDecisionTransformer.layout, lambda: dt_lens.wrap(model))


def test_a_wrong_map_of_the_convolutions_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layout: Any = KZLAtariDecisionTransformer.layout
    right, model = layout.canonical, make()
    for name in ("embed.state.convs.0.weight", "embed.state.linear.weight", "embed.position.W"):
        monkeypatch.setattr(layout, "canonical", lambda s, t, name=name: (w := right(s, t)) | {name: w[name].flip(-1)})
        with pytest.raises(DtLensError, match="certify: "):
            dt_lens.wrap(model)


def test_edits_reach_the_live_model(edits_reach: Any) -> None:
    model = make()
    lens, batch = dt_lens.wrap(model), batch_of(model)
    edits_reach(lens, lambda: original(model, batch), lambda: lensed(lens, batch))


def test_a_live_model_that_computes_something_else_is_refused() -> None:
    model = make()
    model.factor = 1.01
    with pytest.raises(DtLensError, match=r"certify: .* does not reproduce its activation in the original model"):
        dt_lens.wrap(model)
    model.factor, model.model_type = 1.0, "naive"
    with pytest.raises(DtLensError, match="of kzl's type 'naive', which reads no returns"):
        dt_lens.wrap(model)


def test_a_planted_direction_is_found() -> None:
    model = make(d=32)
    with torch.no_grad():
        head = model.head.weight[2] * model.ln_f.weight  # what it reads of the stream, but for its mean
        out = model.blocks[1].mlp[2].weight  # (out, in)
        out.mul_(0.01)
        out += torch.outer(head - head.mean(), torch.nn.functional.normalize(torch.randn(out.shape[1]), dim=0)) * 9
    lens = dt_lens.wrap(model, action_labels=["noop", "fire", "right", "left"])
    table = WeightSVD(lens).scan(matrices=["blocks.1.mlp.W_out"], embeddings=["action_out"], null="haar", seed=0)
    best = table.sort_values("cosine", key=np.abs, ascending=False).iloc[0]
    assert best["sv"] == 0 and best["label"] == "right" and abs(best["cosine"]) > 0.99
