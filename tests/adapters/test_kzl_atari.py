"""kzl's Atari half: minGPT blocks and convolutions, held against a re-implementation of the original."""

from __future__ import annotations

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
from originals.kzl_atari import FRAMES, LONGEST, batch_of, lensed, make, original, saved


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
    lens = dt_lens.load(file, n_heads=2, environment="ALE/Breakout-v5", target_returns=[90], check=False)
    batch = batch_of(model)
    torch.testing.assert_close(lensed(lens, batch), original(model, batch), rtol=1e-5, atol=1e-5)
    cfg, encoder = lens.cfg, lens.embed["state"]
    assert encoder.pixels == 255 and encoder.image == (2, 84, 84)
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
    lens, batch = dt_lens.wrap(model, check=False), batch_of(model)
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
    lens = dt_lens.wrap(model, action_labels=["noop", "fire", "right", "left"], check=False)
    table = WeightSVD(lens).scan(matrices=["blocks.1.mlp.W_out"], embeddings=["action_out"], null="haar", seed=0)
    best = table.sort_values("cosine", key=np.abs, ascending=False).iloc[0]
    assert best["sv"] == 0 and best["label"] == "right" and abs(best["cosine"]) > 0.99
