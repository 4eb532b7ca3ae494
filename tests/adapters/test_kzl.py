"""kzl/decision-transformer: Hugging Face's tensors under other names, with less said about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dt_lens
from dt_lens import SingularEdit
from dt_lens.errors import DtLensError
from dt_lens.lens.checkpoints import read_checkpoint
from dt_lens.lens.matrices import catalogue
from originals.kzl import OPTIONS, LiveAroundGPT2, LiveKZL, predictions, renamed


@pytest.fixture
def hf(make_hf: Any) -> Any:
    model = make_hf(**OPTIONS)
    model.encoder.wpe.weight.data.zero_()  # kzl's blocks have no positions
    return model


@pytest.mark.parametrize("nested", [None, "model_state_dict", "state_dict"])
def test_a_state_dict_loads_to_the_same_outputs(hf: Any, make_batch: Any, tmp_path: Path, nested: str | None) -> None:
    tensors = renamed(hf)
    torch.save({nested: tensors, "iteration": 3} if nested else tensors, tmp_path / "agent.pt")
    lens = dt_lens.load(tmp_path / "agent.pt", n_heads=2, environment="Nowhere-v0")
    batch = make_batch(hf.config, padding="left")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        mine, theirs = predictions(lens(**batch)), predictions(hf(**batch))
    torch.testing.assert_close(mine[real], theirs[real], rtol=1e-5, atol=1e-5)
    # The mask is twelve tokens wide: four steps. Returns are divided by a thousand in all of kzl's gym experiments.
    assert lens.facts.context == 4 and lens.facts.return_scale == 1000.0 and lens.facts.environment == "Nowhere-v0"
    assert dt_lens.load(tmp_path / "agent.pt", n_heads=2, context=9, return_scale=10, check=False).facts.context == 9


def test_a_mask_of_gpt2s_default_width_says_nothing_of_the_context(hf: Any, tmp_path: Path) -> None:
    for width in (1024, None):
        torch.save(renamed(hf, width), tmp_path / "agent.pt")
        assert dt_lens.load(tmp_path / "agent.pt", n_heads=2, check=False).facts.context == 20


def test_the_attention_bias_is_not_taken_for_a_mask(hf: Any, tmp_path: Path) -> None:
    tensors = renamed(hf)
    torch.save(tensors, tmp_path / "agent.pt")
    lens = dt_lens.load(tmp_path / "agent.pt", n_heads=2, check=False)
    for layer in range(2):
        mine = [lens.weights[f"blocks.{layer}.attn.b_{letter}"].flatten() for letter in "QKV"]
        assert torch.equal(torch.cat(mine), tensors[f"transformer.h.{layer}.attn.c_attn.bias"])


def test_what_shapes_do_not_say_is_asked_for(hf: Any, tmp_path: Path) -> None:
    tensors = renamed(hf)
    file = tmp_path / "agent.pt"
    torch.save(tensors, file)
    with pytest.raises(DtLensError, match=r"how many attention heads it has; pass n_heads= .*n_heads=1\)\.$"):
        dt_lens.load(file)
    for given, message in (
        ({"n_heads": 3}, "d_model 16 does not split into n_heads 3"),
        ({"n_heads": "two"}, "n_heads is 'two'; it must be a positive whole number"),
        ({"n_heads": 2, "act_fn": "rely"}, r"act_fn is 'rely'; it must be one of .* mean 'relu'\?$"),
        ({"n_heads": 2, "max_ep_len": 41}, "max_ep_len=41 does not fit the checkpoint, whose timestep table has 40"),
        ({"n_heads": 2, "action_tanh": "no"}, "action_tanh is 'no'"),
        ({"n_heads": 2, "discrete_actions": "yes"}, "discrete_actions is 'yes'"),
        ({"nheads": 2}, r"Unknown option 'nheads' .* mean 'n_heads'\?$"),
        ({"n_heads": 2, "state_mean": [0.0], "state_std": [1.0]}, "state_mean has 1 entries; the model's state has 5"),
    ):
        with pytest.raises(DtLensError, match=message):
            dt_lens.load(file, **given)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("transformer.h.1.ln_2.bias", None, r"no tensor 'transformer\.h\.1\.ln_2\.bias'"),
        ("transformer.h.0.mlp.c_fc.weight", None, r"no matrix 'transformer\.h\.0\.mlp\.c_fc\.weight'"),
        ("embed_timestep.weight", lambda t: t[0], r"no matrix 'embed_timestep\.weight'"),
        ("embed_action.weight", lambda t: t.T, "has shape"),
        ("something.else", lambda t: torch.zeros(3), r"'something\.else' that .* has no place for"),
        ("transformer.h.0.mlp.c_proj.weight", lambda t: t.long(), "holds int64 numbers"),
        ("transformer.ln_f.weight", lambda t: t / 0, r"'transformer\.ln_f\.weight' in .* holds NaN or infinite"),
    ],
)
def test_damaged_state_dicts(
    hf: Any, tmp_path: Path, key: str, change: Callable[[Any], Any] | None, message: str
) -> None:
    tensors = renamed(hf)
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors.get(key)).contiguous()
    torch.save(tensors, tmp_path / "agent.pt")
    with pytest.raises(DtLensError, match=message):
        dt_lens.load(tmp_path / "agent.pt", n_heads=2)


def test_a_live_model_shares_its_memory(hf: Any, make_batch: Any) -> None:
    live = LiveKZL(hf).eval()
    lens = dt_lens.wrap(live)
    assert lens.original is live and lens.facts.context == 6 and lens.cfg.n_heads == 2 and lens.cfg.act_fn == "relu"
    batch = make_batch(hf.config)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat(live(**batch, rewards=None), -1)

    before = run()
    with torch.no_grad():
        torch.testing.assert_close(predictions(lens(**batch)), before, rtol=1e-5, atol=1e-5)
    for matrix in ("blocks.0.mlp.W_in", "blocks.1.attn.W_Q"):
        with SingularEdit(lens, matrix):
            assert not torch.allclose(run(), before, atol=1e-5)
        assert torch.equal(run(), before)
    lens.to(torch.float64)
    assert live.embed_state.weight.dtype == torch.float64
    dt_lens.certify(lens)
    lens.require_shared(list(lens.weights))
    live.float()
    with pytest.raises(DtLensError, match="no longer shares"):
        lens.require_shared(list(lens.weights))


def test_a_live_model_that_computes_something_else_is_refused(hf: Any) -> None:
    live = LiveKZL(hf).eval()
    live.factor = 1.01
    with pytest.raises(DtLensError, match=r"certify: .* does not reproduce its activation in the original model"):
        dt_lens.wrap(live)
    live.forward = None  # type: ignore[method-assign, assignment]
    with pytest.raises(DtLensError, match="own forward pass fails"):
        dt_lens.wrap(live)


def test_discrete_actions(make_hf: Any, make_batch: Any, tmp_path: Path) -> None:
    hf = make_hf(**OPTIONS, state_dim=4, act_dim=2, action_tanh=False)
    hf.encoder.wpe.weight.data.zero_()
    torch.save(renamed(hf), tmp_path / "agent.pt")
    facts = {"environment": "CartPole-v1", "target_returns": [20.0], "discrete_actions": True, "action_tanh": False}
    lens = dt_lens.load(tmp_path / "agent.pt", n_heads=2, return_scale=1.0, check=False, **facts)
    live = dt_lens.wrap(LiveKZL(hf).eval(), discrete_actions=True)
    assert live.cfg.discrete_actions and not live.cfg.action_tanh  # read off the live model's modules
    batch = make_batch(hf.config)
    with torch.no_grad():
        torch.testing.assert_close(predictions(live(**batch)), predictions(hf(**batch)), rtol=1e-5, atol=1e-5)
    assert lens.embeddings["action_out"].labels == ["push left", "push right"]
    outcomes = dt_lens.evaluate(lens, episodes=2, max_steps=5, workers=1).to_frame()
    assert list(outcomes["return"]) == [5.0, 5.0]


def test_an_action_head_only(hf: Any, make_batch: Any, tmp_path: Path) -> None:
    tensors = {k: v for k, v in renamed(hf).items() if not k.startswith(("predict_state", "predict_return"))}
    torch.save(tensors, tmp_path / "agent.pt")
    lens = dt_lens.load(tmp_path / "agent.pt", n_heads=2)
    batch = make_batch(hf.config)
    with torch.no_grad():
        torch.testing.assert_close(lens(**batch).action_preds, hf(**batch).action_preds, rtol=1e-5, atol=1e-5)

    class Live(LiveKZL):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            return (None, out[1], None) if self.max_length == 6 else out[1]

    for length in (6, 7):
        live = Live(hf, length).eval()
        del live.predict_state, live.predict_return
        wrapped = dt_lens.wrap(live)
        assert wrapped.cfg.predicts == lens.cfg.predicts == ("action",)
        assert dt_lens.certify(wrapped).errors.keys() == dt_lens.certify(lens).errors.keys()


def test_a_position_table_is_read_a_row_for_each_token(make_hf: Any, make_batch: Any, tmp_path: Path) -> None:
    """Its blocks are Hugging Face's own GPT2Model, which counts positions unless it is told otherwise."""
    hf = make_hf(**{**OPTIONS, "n_positions": 30})
    live = LiveAroundGPT2(hf).eval()
    torch.save(renamed(hf, position=True), tmp_path / "agent.pt")
    lens = dt_lens.load(tmp_path / "agent.pt", n_heads=2)
    batch = make_batch(hf.config, padding="left")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        mine, theirs = predictions(lens(**batch)), torch.cat(live(**batch, rewards=None), -1)
    torch.testing.assert_close(mine[real], theirs[real], rtol=1e-5, atol=1e-5)
    assert lens.cfg.position == dt_lens.wrap(live).cfg.position == "learned"
    assert dt_lens.load(tmp_path / "agent.pt", n_heads=2, position="constant", check=False).cfg.position == "constant"
    with pytest.raises(DtLensError, match=r"certify: .* does not reproduce its activation in the"):
        dt_lens.wrap(live, position="constant")
    with pytest.raises(DtLensError, match=r"position is 'rotary'; .* has 30 rows, it can be learned .* or constant"):
        dt_lens.load(tmp_path / "agent.pt", n_heads=2, position="rotary")
    torch.save(renamed(hf), tmp_path / "agent.pt")
    with pytest.raises(DtLensError, match=r"position is 'learned'; .* has 1 rows, it can be constant \(row 0"):
        dt_lens.load(tmp_path / "agent.pt", n_heads=2, position="learned")


def test_nobody_else_recognises_it(hf: Any, recognised_by: Any, tmp_path: Path) -> None:
    torch.save(renamed(hf), tmp_path / "agent.pt")
    assert recognised_by(read_checkpoint(tmp_path / "agent.pt")) == recognised_by(LiveKZL(hf)) == ["kzl"]
    hf.save_pretrained(tmp_path / "hf")
    assert recognised_by(read_checkpoint(tmp_path / "hf")) == recognised_by(hf) == ["hf_decision_transformer"]


def test_a_real_agent(real_checkpoints: Callable[[str], Path]) -> None:
    file = real_checkpoints("kzl-humanoid/humanoid.ckpt")
    with pytest.raises(DtLensError, match="pass n_heads="):
        dt_lens.load(file)
    lens = dt_lens.load(file, n_heads=1, check=False)
    certificate = dt_lens.certify(lens, seed=1)
    assert set(catalogue(lens)) <= set(certificate.errors) and certificate.against == "the original model"
    cfg = lens.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.d_mlp, cfg.state_dim, cfg.act_dim) == (3, 128, 512, 376, 17)
    assert cfg.n_ctx == lens.facts.context == 20 and cfg.max_ep_len == 1000 and cfg.act_fn == "relu"
    # Two heads fit every shape too, so only the user can tell.
    assert dt_lens.load(file, n_heads=2, check=False).cfg.d_head == 64
