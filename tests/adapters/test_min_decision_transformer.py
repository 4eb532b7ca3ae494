"""min-decision-transformer: post-LayerNorm blocks, held against a re-implementation of the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dt_lens
from dt_lens import WeightSVD
from dt_lens.errors import DtLensError
from dt_lens.lens.certification import certify
from dt_lens.lens.checkpoints import read_checkpoint
from dt_lens.lens.matrices import catalogue
from dt_lens_adapters.min_decision_transformer import MinDecisionTransformer
from originals.min_dt import batch_of, lensed, make, original, saved


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
    lens, batch = dt_lens.wrap(model, check=False), batch_of(model)
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
    lens = dt_lens.load(file, n_heads=2, environment="Hopper-v5", check=False)
    batch = batch_of(model)
    torch.testing.assert_close(lensed(lens, batch), original(model, batch), rtol=1e-5, atol=1e-5)
    assert lens.facts.context == lens.cfg.n_ctx == 7 and lens.facts.return_scale == 1000.0
    assert lens.cfg.normalization == "post" and not lens.cfg.final_ln and lens.facts.environment == "Hopper-v5"
    certificate = certify(lens, seed=3)
    assert set(catalogue(lens)) <= set(certificate.errors) and certificate.against == "the original model"
    assert dt_lens.load(file, n_heads=2, context=3, return_scale=1, check=False).facts.context == 3
    # It moves with its file's tensors, which stay one memory with it.
    lens.to(torch.float64)
    certify(lens)
    lens.require_shared(list(lens.weights))


@pytest.mark.parametrize("returned", ["three", "one"])
def test_an_action_head_only(tmp_path: Path, returned: str) -> None:
    model = make()
    batch = batch_of(model)
    expected = original(model, batch)[..., 5:8]  # between five numbers of the next state and one of the return
    forward = model.forward
    del model.predict_state, model.predict_rtg

    def without(*args: Any) -> Any:
        model.predict_state = model.predict_rtg = lambda x: None
        out = forward(*args)
        del model.predict_state, model.predict_rtg
        return out if returned == "three" else out[1]

    model.forward = without
    torch.save(model.state_dict(), tmp_path / "agent.pt")
    for lens in (dt_lens.load(tmp_path / "agent.pt", n_heads=2), dt_lens.wrap(model)):
        assert lens.cfg.predicts == ("action",)
        with torch.no_grad():
            mine = lens(**batch).action_preds
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


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
    lens, batch = dt_lens.wrap(model, check=False), batch_of(model)
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
    lens = dt_lens.wrap(model, action_labels=["left", "right", "up"], check=False)
    table = WeightSVD(lens).scan(matrices=["blocks.0.mlp.W_in"], embeddings=["action_in"], null="haar", seed=0)
    best = table.sort_values("cosine", key=np.abs, ascending=False).iloc[0]
    assert best["sv"] == 0 and best["label"] == "right" and abs(best["cosine"]) > 0.99
