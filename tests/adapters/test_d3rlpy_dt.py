"""d3rlpy's decision transformers, held against a re-implementation of its modules, files and stateful rollouts."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
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
from dt_lens_adapters.d3rlpy_dt import D3rlpyDecisionTransformer
from originals.d3rlpy import ACTS, LONGEST, Minimal, batch_of, lensed, make, original, vector, weights_file, whole_file


@settings(max_examples=10, deadline=None)
@given(
    discrete=st.booleans(),
    by_window=st.booleans(),
    heads=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([1, 3]),
    blocks=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 4)),
    context=st.integers(1, 4),
    acts=st.tuples(st.sampled_from(sorted(ACTS)), st.sampled_from(sorted(ACTS))),
    seed=st.integers(0, 99),
)
def test_the_same_predictions(
    discrete: bool, by_window: bool, heads: int, width: int, blocks: int, sizes: tuple[int, int], context: int,
    acts: tuple[str, str], seed: int,
) -> None:  # fmt: skip
    model = make(
        discrete, seed, states=sizes[0], act_dim=sizes[1], d=4 * width, heads=heads, blocks=blocks, context=context,
        act=acts[0], last=acts[1], by_window=by_window,
    )  # fmt: skip
    lens, batch = dt_lens.wrap(model), batch_of(model, seed=seed)
    torch.testing.assert_close(lensed(lens, batch), original(model, batch), rtol=1e-5, atol=1e-5)
    assert lens.cfg.n_heads == heads and lens.cfg.max_ep_len == LONGEST and lens.facts.context == context


@pytest.mark.parametrize("discrete", [False, True])
def test_images(tmp_path: Path, discrete: bool) -> None:
    model = make(discrete, states=(2, 20, 20))
    filters = {"filters": [[3, 6, 3], [4, 3, 2]], "activation": "relu", "feature_size": 16}
    act = "gelu" if discrete else "relu"
    said: dict[str, Any] = {"n_heads": 2, "act_fn": act}
    file = whole_file(model, tmp_path / "a.d3", act, {"type": "pixel", "params": filters})
    batch = batch_of(model)
    for lens in (
        dt_lens.load(file),
        dt_lens.wrap(model, image_side=20, check=False),
        dt_lens.load(weights_file(model, tmp_path / "a.pt"), **said, strides=[3, 2], image_side=20, check=False),
    ):
        assert lens.cfg.state_dim == 800
        torch.testing.assert_close(lensed(lens, batch), original(model, batch), rtol=1e-5, atol=1e-5)
    scaled = {"observation_scaler": {"type": "pixel", "params": {}}}
    file = whole_file(model, tmp_path / "b.d3", act, {"type": "pixel", "params": filters}, **scaled)
    for about in ({}, {"about": {"who": "I"}}):
        encoder: Any = dt_lens.load(file, check=False, **about).embed["state"]
        assert encoder.pixels == 255
    for options, message in (
        ({}, "do not say the strides of these 2 convolutions; pass strides="),
        ({"strides": [3, 0]}, "do not say the strides"),
        ({"strides": 3}, "do not say the strides"),
        ({"strides": [3, 2], "image_side": 40}, "image_side is 40; this checkpoint's layers fit images of 18 pixels"),
        ({"strides": [3, 2], "image_side": "20"}, "image_side is '20'"),
    ):
        with pytest.raises(DtLensError, match=message):
            dt_lens.load(tmp_path / "a.pt", **said, **options)


@pytest.mark.parametrize("discrete", [False, True])
def test_a_whole_file(tmp_path: Path, discrete: bool) -> None:
    model = make(discrete, act="swish", last="tanh")
    scalers = {
        "observation_scaler": {"type": "standard", "params": {"mean": [1.0] * 5, "std": [2.0] * 5, "eps": 0.5}},
        "reward_scaler": {"type": "multiply", "params": {"multiplier": 0.01}},
    }
    file = whole_file(model, tmp_path / "model_5000.d3", "swish", vector("swish", "tanh"), **scalers)
    lens, batch = dt_lens.load(file, check=False), batch_of(model)
    torch.testing.assert_close(lensed(lens, batch), original(model, batch), rtol=1e-5, atol=1e-5)
    assert lens.facts.state_mean == (1,) * 5 and lens.facts.state_std == (2.5,) * 5
    assert lens.facts.return_scale == 100 and lens.cfg.act_fn == "silu" and lens.cfg.discrete_actions == discrete
    certificate = certify(lens, seed=3)
    assert set(catalogue(lens)) <= set(certificate.errors) and certificate.against == "the original model"
    lens.to(torch.float64)
    certify(lens)
    lens.require_shared(list(lens.weights))
    assert dt_lens.load(file, return_scale=2.0, context=3, check=False).facts.return_scale == 2.0


def test_weights_alone(tmp_path: Path) -> None:
    model = make()
    file, batch = weights_file(model, tmp_path / "model.pt"), batch_of(model)
    with pytest.raises(DtLensError, match=r"do not say what n_heads is; pass n_heads= and act_fn= .* give the \.d3"):
        dt_lens.load(file)
    with pytest.raises(DtLensError, match="do not say what act_fn is"):
        dt_lens.load(file, n_heads=2)
    with pytest.raises(DtLensError, match=r"act_fn is 'geglu'; of d3rlpy's activations dt-lens knows relu"):
        dt_lens.load(file, n_heads=2, act_fn="geglu")
    lens = dt_lens.load(file, n_heads=2, act_fn="relu", check=False)
    torch.testing.assert_close(lensed(lens, batch), original(model, batch), rtol=1e-5, atol=1e-5)
    (tmp_path / "params.json").write_text('{"learning_rate": 0.1}')  # somebody else's
    with pytest.raises(DtLensError, match="pass n_heads="):
        dt_lens.load(file)
    whole_file(model, tmp_path / "x.d3", "relu", vector())
    config = pickle.loads((tmp_path / "x.d3").read_bytes())["config"]
    (tmp_path / "params.json").write_text(config)  # the training run's
    torch.testing.assert_close(
        lensed(dt_lens.load(file, check=False), batch), original(model, batch), rtol=1e-5, atol=1e-5
    )


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    for params, message in (
        ({"num_heads": 3}, "d_model 16 does not split into n_heads 3"),
        ({"activation_type": "geglu"}, "act_fn is 'geglu'"),
        ({"max_timestep": 32}, "max_timestep is 32; the checkpoint's timestep table has 32 rows, which allow 1 to 31"),
        ({"max_timestep": "30"}, "max_timestep is '30'"),
        ({"reward_scaler": {"type": "clip", "params": {}}}, r"pass ignore_options=\['reward_scaler'\]"),
    ):
        file = whole_file(make(), tmp_path / "a.d3", "relu", vector(), **params)
        with pytest.raises(DtLensError, match=message):
            dt_lens.load(file)
    assert dt_lens.load(file, ignore_options=["reward_scaler"], check=False).facts.return_scale == 1.0


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("_gpt2._transformer.1._layer_norm2.bias", None, r"no tensor '_gpt2\._transformer\.1\._layer_norm2\.bias'"),
        ("_encoder._layers.0.bias", None, r"no tensor '_encoder\._layers\.0\.bias'"),
        ("_position_encoding._embed.weight", None, r"no tensor '_position_encoding\._embed\.weight'"),
        ("_encoder._layers.1.weight", lambda t: torch.ones(9), r"'_encoder\._layers\.1\.weight' .* no place for"),
        ("_rtg_embed.weight", lambda t: t.T, r"'_rtg_embed\.weight' has shape \[1, 16\]; \[16, 1\] was expected"),
        ("_gpt2._transformer.0._attention._maskk", lambda t: torch.ones(2), r"_attention\._maskk' .* no place for"),
        ("_output.bias", lambda t: t.long(), "holds int64 numbers"),
        ("_embed_ln.weight", lambda t: t / 0, r"'_embed_ln\.weight' in .* holds NaN or infinite"),
    ],
)
def test_damaged_files(tmp_path: Path, key: str, change: Any, message: str) -> None:
    model = make()
    tensors = dict(model.state_dict())
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors.get(key)).contiguous()
    torch.save({"transformer": tensors}, tmp_path / "agent.pt")
    with pytest.raises(DtLensError, match=message):
        dt_lens.load(tmp_path / "agent.pt", n_heads=2, act_fn="relu")


class Hostile:
    """Makes a folder when it is unpickled with code allowed."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


def as_bytes(saved: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.getvalue()


def test_every_protocol_of_a_whole_file(tmp_path: Path) -> None:
    model = make()
    values = pickle.loads(whole_file(model, tmp_path / "a.d3", "relu", vector()).read_bytes())
    for protocol in (3, 4, 5):
        (tmp_path / "a.d3").write_bytes(pickle.dumps(values, protocol=protocol))
        checkpoint = read_checkpoint(tmp_path / "a.d3", D3rlpyDecisionTransformer().unpack)
        assert set(checkpoint.tensors) == set(model.state_dict())
        assert checkpoint.config["action_size"] == 3 and checkpoint.extra == {"optim": {"state": {}}}


def test_bad_whole_files(tmp_path: Path) -> None:
    good, trace = as_bytes({"a": torch.zeros(2)}), tmp_path / "trace"
    for values, message in (
        ({"torch": good, "config": "{"}, r"The configuration in .*agent\.d3 cannot be read as JSON"),
        ({"torch": good[:50], "config": "{}"}, "cannot be read as a checkpoint"),
        ({"torch": b"", "config": "{}"}, "cannot be read as a checkpoint"),
        ({"torch": "text"}, "cannot be read as a checkpoint"),
        ({"torch": as_bytes({"a": Hostile(trace)})}, "wants to run code"),
        ({"torch": good, "config": Hostile(trace)}, "wants to run code"),
    ):
        (tmp_path / "agent.d3").write_bytes(pickle.dumps(values))
        with pytest.raises(DtLensError, match=message):
            dt_lens.load(tmp_path / "agent.d3")
    assert not trace.exists()


@pytest.mark.parametrize("discrete", [False, True])
def test_nobody_else_recognises_it(recognised_by: Any, tmp_path: Path, discrete: bool) -> None:
    model = make(discrete)
    assert recognised_by(model) == ["d3rlpy"]
    whole = whole_file(model, tmp_path / "a.d3", "relu", vector())
    assert recognised_by(read_checkpoint(whole, D3rlpyDecisionTransformer().unpack)) == ["d3rlpy"]
    assert recognised_by(read_checkpoint(weights_file(model, tmp_path / "a.pt"))) == ["d3rlpy"]


@pytest.mark.parametrize("discrete", [False, True])
def test_a_wrong_map_is_noticed(mistaken: Any, discrete: bool) -> None:
    model = make(discrete)
    mistaken(D3rlpyDecisionTransformer.layout, lambda: dt_lens.wrap(model))


@pytest.mark.parametrize("discrete", [False, True])
def test_a_wrong_map_around_the_blocks_is_noticed(monkeypatch: pytest.MonkeyPatch, discrete: bool) -> None:
    layout: Any = D3rlpyDecisionTransformer.layout
    right, model = layout.canonical, make(discrete)
    for name in ("embed.state.layers.0.weight", *(["embed.position.W"] if discrete else ["embed.action.b"])):
        monkeypatch.setattr(layout, "canonical", lambda s, t, name=name: (w := right(s, t)) | {name: w[name].flip(-1)})
        with pytest.raises(DtLensError, match="certify: "):
            dt_lens.wrap(model)


@pytest.mark.parametrize("discrete", [False, True])
def test_edits_reach_the_live_model(edits_reach: Any, discrete: bool) -> None:
    model = make(discrete)
    lens, batch = dt_lens.wrap(model, check=False), batch_of(model)
    edits_reach(lens, lambda: original(model, batch), lambda: lensed(lens, batch))


def test_a_live_model_that_computes_something_else_is_refused() -> None:
    model = make()
    model.factor = 1.01
    with pytest.raises(DtLensError, match=r"certify: .* does not reproduce its activation in the original model"):
        dt_lens.wrap(model)
    model.forward = None  # type: ignore[method-assign, assignment]
    with pytest.raises(DtLensError, match="own forward pass fails"):
        dt_lens.wrap(model)


def test_a_planted_direction_is_found() -> None:
    model = make(d=32)
    with torch.no_grad():
        head = model._output.weight[2] * model._gpt2._layer_norm.weight  # what it reads of the stream, but for its mean
        out = model._gpt2._transformer[1]._mlp._l2.weight  # (out, in)
        out.mul_(0.01)
        out += torch.outer(head - head.mean(), nn.functional.normalize(torch.randn(out.shape[1]), dim=0)) * 9
    lens = dt_lens.wrap(model, action_labels=["hip", "knee", "foot"], check=False)
    table = WeightSVD(lens).scan(matrices=["blocks.1.mlp.W_out"], embeddings=["action_out"], null="haar", seed=0)
    best = table.sort_values("cosine", key=np.abs, ascending=False).iloc[0]
    assert best["sv"] == 0 and best["label"] == "foot" and abs(best["cosine"]) > 0.99


def stateful_return(model: Minimal, seed: int, target: float, limit: int) -> float:
    """An episode as d3rlpy's stateful wrapper plays it: windows padded to the full context, steps counted from 1."""
    env, c = gym.make("CartPole-v1"), model.context
    x, _ = env.reset(seed=seed)
    xs, acts, rests, total = [x], [0], [target], 0.0
    for _ in range(limit):
        n = min(len(xs), c)
        window = [torch.zeros(1, c, 4), torch.zeros(1, c, 1), torch.zeros(1, c, 1), torch.zeros(1, c).long()]
        window[0][0, c - n :] = torch.tensor(np.array(xs[-n:]))
        window[1][0, c - n :, 0] = torch.tensor(acts[-n:]).float()
        window[2][0, c - n :, 0] = torch.tensor(rests[-n:])
        window[3][0, c - n :] = torch.arange(len(xs) - n, len(xs)) + 1
        padding = torch.ones(1, c)
        padding[0, c - n :] = 0
        with torch.no_grad():
            acts[-1] = int(model(*window, padding)[1][0, -1].argmax())
        x, reward, terminated, truncated, _ = env.step(acts[-1])
        total += float(reward)
        xs, acts, rests = [*xs, x], [*acts, 0], [*rests, rests[-1] - float(reward)]
        if terminated or truncated:
            break
    env.close()
    return total


@pytest.mark.parametrize("by_window", [True, False])
def test_rollouts_are_d3rlpys_own(by_window: bool) -> None:
    model = make(True, seed=5, size=0.4, states=4, act_dim=2, by_window=by_window)
    lens = dt_lens.wrap(model, environment="CartPole-v1", target_returns=[20.0], check=False)
    result = dt_lens.evaluate(lens, episodes=3, seed=0, max_steps=25)
    assert list(result.to_frame()["return"]) == [stateful_return(model, seed, 20.0, 25) for seed in range(3)]
